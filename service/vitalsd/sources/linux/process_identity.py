"""Identify on Linux the run of a process that has a pid, from /proc."""

import os
import time
from contextlib import suppress

from vitalsd.sources.linux.procfs import MalformedError, parse_stat
from vitalsd.sources.process_identity import UNKNOWN_BOOT, IdentityUnknownError, hash_machine_id

__all__ = ["LinuxProcessIdentityReader", "boottime_offset_ticks"]

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


CLOCK_BOOTTIME = 7  # linux/time.h; the time module has it on Linux only


def boottime_offset_ticks() -> int:
    """
    Return by how many clock ticks the start times in ``/proc`` differ in our time namespace, see time_namespaces(7).

    0 if the offset is not a multiple of a tick, because the kernel rounds the sum and the difference is not exact.
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


class LinuxProcessIdentityReader:
    """
    The `ProcessIdentityReader` of Linux, read from ``/proc``.

    Args:
        root: mount point of procfs.
        machine_id: path of machine-id(5), which stays the same across reboots.
    """

    def __init__(self, root: str = "/proc", machine_id: str = "/etc/machine-id") -> None:
        self._root = root
        self._machine_id = machine_id

    def host_scope(self) -> str:
        """Return a digest of the machine id, and the pid namespace; the time namespace if start times depend on it."""
        machine, namespace = b"", ""
        with suppress(OSError), open(self._machine_id, "rb") as file:
            machine = file.read(64).strip()
        with suppress(OSError):
            namespace = os.readlink(f"{self._root}/self/ns/pid")
            if (
                _boottime_offset_ns() * TICKS_PER_S % 1_000_000_000
            ):  # start times cannot be compared with those of other time namespaces
                namespace += " " + os.readlink(f"{self._root}/self/ns/time")
        return f"{hash_machine_id(machine)} {namespace}"

    def boot_id(self) -> str:
        """Return the random id that the kernel makes at each boot."""
        try:
            with open(f"{self._root}/sys/kernel/random/boot_id", encoding="ascii") as file:
                return file.read().strip() or UNKNOWN_BOOT
        except (OSError, ValueError):
            return UNKNOWN_BOOT

    def booted_unix_ns(self) -> int:
        """Return the wall clock less CLOCK_BOOTTIME without the offset of the time namespace, ns."""
        return time.time_ns() - time.clock_gettime_ns(CLOCK_BOOTTIME) + _boottime_offset_ns()

    def start_key(self, pid: int) -> int | None:
        """Return the start in clock ticks after boot; ``None``: no such process. Raises `IdentityUnknownError`."""
        try:
            with open(f"{self._root}/{pid}/stat", "rb") as file:
                stat = parse_stat(file.read())
        except (FileNotFoundError, ProcessLookupError):
            if self._is_hidden(pid):
                raise IdentityUnknownError(f"process {pid} is not in {self._root}, and yet it exists") from None
            return None
        except (OSError, MalformedError) as error:
            raise IdentityUnknownError(f"process {pid}: {error}") from None
        dead = stat.state in "ZX" and stat.thread_count <= 1
        return None if dead else stat.start_ticks - boottime_offset_ticks()

    def _is_hidden(self, pid: int) -> bool:
        """Return whether the kernel has the process although /proc does not list it: without procfs, or by hidepid."""
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return not os.path.exists(f"{self._root}/{pid}/stat")
