"""
Which run of a process a pid names: the machine and boot it belongs to, and its start time there.

A pid alone names nobody for long. These few reads let a client tell, without opening a `Source`,
whether the process that wrote something is still the one that has its pid.
"""

import hashlib
import os
import sys
import time
from contextlib import suppress
from typing import Protocol

from vitalsd.sources.linux.procfs import Malformed, parse_stat

__all__ = [
    "ANY_MACHINE",
    "UNKNOWN_BOOT",
    "Births",
    "LinuxBirths",
    "Undecided",
    "anonymous",
    "births",
    "boottime_offset_ticks",
]


ANY_MACHINE = "?"
UNKNOWN_BOOT = "unknown"
"""Where the system does not tell which boot it is, as with ``ProcSubset=pid`` of systemd.exec(5) and in gVisor."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CLOCK_BOOTTIME = 7  # linux/time.h; the time module has it on Linux only


class Undecided(Exception):
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

        A zombie counts as no process. Raises `Undecided`.
        """
        ...


def births() -> Births:
    """Of the running kernel. Another system than Linux and macOS is undecided about everything."""
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.libsystem import load
        from vitalsd.sources.darwin.process_identity import DarwinBirths

        return DarwinBirths(load())
    return LinuxBirths()


def anonymous(machine: bytes) -> str:
    """A machine's id made useless elsewhere: machine-id(5) asks not to expose the id itself."""
    return hashlib.sha256(b"vitalsd " + machine).hexdigest()[:16] if machine else ANY_MACHINE


def boottime_offset_ticks() -> int:
    """
    Return by how many clock ticks the start times in ``/proc`` differ in our time namespace, see time_namespaces(7).

    0 if the offset is no multiple of a tick: the kernel rounds the sum, and the difference is not exact.
    """
    ticks, rest_ns = divmod(_boottime_offset_ns() * TICKS_PER_S, 1_000_000_000)
    return 0 if rest_ns else ticks


def _boottime_offset_ns() -> int:
    try:
        with open("/proc/self/timens_offsets", encoding="ascii") as file:
            for line in file:
                clock, seconds, ns = line.split()
                if clock in ("boottime", str(CLOCK_BOOTTIME)):
                    return int(seconds) * 1_000_000_000 + int(ns)
    except (OSError, ValueError):
        pass
    return 0


class LinuxBirths:
    """
    Reads ``/proc``.

    Args:
        root: where procfs is mounted.
        machine_id: machine-id(5), which survives reboots.
    """

    def __init__(self, root: str = "/proc", machine_id: str = "/etc/machine-id") -> None:
        self._root = root
        self._machine_id = machine_id

    def realm(self) -> str:
        machine, namespace = b"", ""
        with suppress(OSError), open(self._machine_id, "rb") as file:
            machine = file.read(64).strip()
        with suppress(OSError):
            namespace = os.readlink(f"{self._root}/self/ns/pid")
            if _boottime_offset_ns() * TICKS_PER_S % 1_000_000_000:  # start times cannot be compared with others'
                namespace += " " + os.readlink(f"{self._root}/self/ns/time")
        return f"{anonymous(machine)} {namespace}"

    def boot_id(self) -> str:
        try:
            with open(f"{self._root}/sys/kernel/random/boot_id", encoding="ascii") as file:
                return file.read().strip() or UNKNOWN_BOOT
        except (OSError, ValueError):
            return UNKNOWN_BOOT

    def booted_unix_ns(self) -> int:
        return time.time_ns() - time.clock_gettime_ns(CLOCK_BOOTTIME) + _boottime_offset_ns()

    def start_key(self, pid: int) -> int | None:
        try:
            with open(f"{self._root}/{pid}/stat", "rb") as file:
                stat = parse_stat(file.read())
        except (FileNotFoundError, ProcessLookupError):
            if self._is_hidden(pid):
                raise Undecided(f"process {pid} is not in {self._root}, and yet it exists") from None
            return None
        except (OSError, Malformed) as error:
            raise Undecided(f"process {pid}: {error}") from None
        dead = stat.state in "ZX" and stat.thread_count <= 1
        return None if dead else stat.start_ticks - boottime_offset_ticks()

    def _is_hidden(self, pid: int) -> bool:
        """Without a procfs, and under hidepid, nothing is listed that the kernel knows all the same."""
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return not os.path.exists(f"{self._root}/{pid}/stat")
