"""
Which run of a process a pid names: the machine and boot it belongs to, and its start time there.

A pid alone names nobody for long. These few reads let a client tell, without opening a `Source`,
whether the process that wrote something is still the one that has its pid.
"""

import hashlib
from typing import Protocol

__all__ = ["ANY_MACHINE", "UNKNOWN_BOOT", "Births", "IdentityUnknownError", "anonymous"]


ANY_MACHINE = "?"
UNKNOWN_BOOT = "unknown"
"""Where the system does not tell which boot it is, as with ``ProcSubset=pid`` of systemd.exec(5) and in gVisor."""


class IdentityUnknownError(Exception):
    """The kernel does not tell whether the process lives."""


class Births(Protocol):
    """What a kernel says about the lives of its processes."""

    def realm(self) -> str:
        """
        Within which pids and boots can be compared: this machine and, on Linux, the pid namespace.

        A home directory may be shared between machines or containers, and then a dead pid here is
        nothing to go by for a file written there. It starts with `ANY_MACHINE` where this machine
        cannot be told from others.
        """
        ...

    def boot_id(self) -> str:
        """Differs after each boot; `UNKNOWN_BOOT`: the system does not tell."""
        ...

    def booted_unix_ns(self) -> int:
        """When this boot began, Unix time by the wall clock of now, ns."""
        ...

    def start_key(self, pid: int) -> int | None:
        """
        The kernel's start time of `pid`, equal to `Identity.start_key`; ``None``: no such process.

        A zombie counts as no process. Raises `IdentityUnknownError`.
        """
        ...


def anonymous(machine: bytes) -> str:
    """A machine's id made useless elsewhere: machine-id(5) asks not to expose the id itself."""
    return hashlib.sha256(b"vitalsd " + machine).hexdigest()[:16] if machine else ANY_MACHINE
