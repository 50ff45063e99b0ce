"""
Which run of a process a pid names: the machine and boot it belongs to, and its start time there.

A pid alone names nobody for long. These few reads let a client tell, without opening a `Source`,
whether the process that wrote something is still the one that has its pid.
"""

import ctypes
import errno
import hashlib
import os
import sys
from contextlib import suppress
from typing import Any, Protocol

from vitalsd.sources.procfs import Malformed, parse_stat

__all__ = ["ANY_MACHINE", "Births", "DarwinBirths", "LinuxBirths", "Undecided", "births"]


ANY_MACHINE = "?"


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
        """Differs after each boot. Raises `Undecided`."""
        ...

    def start_key(self, pid: int) -> int | None:
        """
        The kernel's start time of `pid`, equal to `Identity.start_key`; ``None``: no such process.

        A zombie counts as no process. Raises `Undecided`.
        """
        ...


def births() -> Births:
    """Of the running kernel. Another system than Linux and macOS is undecided about everything."""
    return DarwinBirths() if sys.platform == "darwin" else LinuxBirths()


def _anonymous(machine: bytes) -> str:
    """machine-id(5) asks not to expose the id itself."""
    return hashlib.sha256(b"vitalsd " + machine).hexdigest()[:16] if machine else ANY_MACHINE


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
        return f"{_anonymous(machine)} {namespace}"

    def boot_id(self) -> str:
        try:
            with open(f"{self._root}/sys/kernel/random/boot_id", encoding="ascii") as file:
                return file.read(64).strip()
        except OSError as error:
            raise Undecided(f"no boot id: {error.strerror}") from None

    def start_key(self, pid: int) -> int | None:
        try:
            with open(f"{self._root}/{pid}/stat", "rb") as file:
                stat = parse_stat(file.read(4096))
        except (FileNotFoundError, ProcessLookupError):
            if self._is_hidden(pid):
                raise Undecided(f"process {pid} is not in {self._root}, and yet it exists") from None
            return None
        except (OSError, Malformed) as error:
            raise Undecided(f"process {pid}: {error}") from None
        return None if stat.state in "ZX" and stat.thread_count <= 1 else stat.start_ticks

    def _is_hidden(self, pid: int) -> bool:
        """Without a procfs, and under hidepid, nothing is listed that the kernel knows all the same."""
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return not os.path.exists(f"{self._root}/{pid}/stat")


class DarwinBirths:
    """
    Asks sysctl(3).

    `KERN_PROC_PID` answers for any user's process, zombies too, and with length 0 for none
    (bsd/kern/kern_sysctl.c, sysdoproc_callback). p_starttime is taken at fork and kept across exec.

    Args:
        lib: libSystem, or whatever exports ``sysctl``, ``sysctlbyname`` and ``gethostuuid``.
    """

    KINFO_PROC_SIZE = 648
    P_STAT = 36
    SZOMB = 5

    def __init__(self, lib: Any = None) -> None:
        self._lib = ctypes.CDLL(None, use_errno=True) if lib is None else lib
        size_p = ctypes.POINTER(ctypes.c_size_t)
        self._lib.sysctl.argtypes = (
            ctypes.POINTER(ctypes.c_int),
            ctypes.c_uint,
            ctypes.c_void_p,
            size_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
        )
        self._lib.sysctl.restype = ctypes.c_int
        self._lib.sysctlbyname.argtypes = (
            ctypes.c_char_p,
            ctypes.c_void_p,
            size_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
        )
        self._lib.sysctlbyname.restype = ctypes.c_int
        # int gethostuuid(uuid_t id, const struct timespec *wait)
        self._lib.gethostuuid.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._lib.gethostuuid.restype = ctypes.c_int

    def realm(self) -> str:
        uuid = (ctypes.c_ubyte * 16)()
        wait = (ctypes.c_long * 2)(1, 0)
        return _anonymous(bytes(uuid) if self._lib.gethostuuid(uuid, wait) == 0 else b"")

    def boot_id(self) -> str:
        text = ctypes.create_string_buffer(64)
        size = ctypes.c_size_t(len(text))
        if self._lib.sysctlbyname(b"kern.bootsessionuuid", text, ctypes.byref(size), None, 0) != 0:
            raise Undecided(f"no boot id: {os.strerror(ctypes.get_errno())}")
        return text.value.decode("ascii", "replace")

    def start_key(self, pid: int) -> int | None:
        name = (ctypes.c_int * 4)(1, 14, 1, pid)  # CTL_KERN, KERN_PROC, KERN_PROC_PID
        info = ctypes.create_string_buffer(self.KINFO_PROC_SIZE)
        size = ctypes.c_size_t(len(info))
        if self._lib.sysctl(name, 4, info, ctypes.byref(size), None, 0) != 0:
            code = ctypes.get_errno()
            if code == errno.ESRCH:
                return None
            raise Undecided(f"process {pid}: {os.strerror(code)}")
        if size.value == 0 or info.raw[self.P_STAT] == self.SZOMB:
            return None
        seconds = int.from_bytes(info.raw[0:8], "little")
        return seconds * 1_000_000 + int.from_bytes(info.raw[8:12], "little")
