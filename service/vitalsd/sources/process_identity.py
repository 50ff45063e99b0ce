"""
Identify the run of a process that has a pid, by machine, boot and start time.

The kernel reuses pids. With these few reads a client finds out, without opening a `Source`, whether the process that
wrote a file is still the one that has its pid.
"""

import hashlib
from typing import Protocol

__all__ = ["ANY_MACHINE", "UNKNOWN_BOOT", "IdentityUnknownError", "ProcessIdentityReader", "hash_machine_id"]


ANY_MACHINE = "?"
"""Prefix of the host scope of a machine without a readable id."""
UNKNOWN_BOOT = "unknown"
"""Boot id if the system does not report it, as with ``ProcSubset=pid`` of systemd.exec(5) and in gVisor."""


class IdentityUnknownError(Exception):
    """The kernel does not show whether the process lives."""


class ProcessIdentityReader(Protocol):
    """A reader of the start times of processes, and of the machine and boot that they are valid for."""

    def host_scope(self) -> str:
        """
        Return the scope in which pids and boots can be compared: this machine and, on Linux, the pid namespace.

        Machines or containers may share a home directory, and a pid that is dead here may be alive where a file in it
        was written. The scope starts with `ANY_MACHINE` if this machine cannot be distinguished from others.
        """
        ...

    def boot_id(self) -> str:
        """Return the id of this boot, which is new after each boot; `UNKNOWN_BOOT`: the system does not report it."""
        ...

    def booted_unix_ns(self) -> int:
        """Return when this boot began, as Unix time by the present wall clock, ns."""
        ...

    def start_key(self, pid: int) -> int | None:
        """
        Return the kernel's start time of `pid`, equal to `Identity.start_key`; ``None``: there is no such process.

        A zombie counts as no process. Raises `IdentityUnknownError`.
        """
        ...


def hash_machine_id(machine: bytes) -> str:
    """Hash the id of a machine, because machine-id(5) requires that the id itself is not exposed."""
    return hashlib.sha256(b"vitalsd " + machine).hexdigest()[:16] if machine else ANY_MACHINE
