"""The machine, in Mach's words the host: sysctl variables, clocks and UUID."""

import ctypes
from ctypes import c_size_t
from typing import Any

from vitalsd.sources.darwin.apple_headers import mach_timebase_info
from vitalsd.sources.darwin.functions import MachError, os_error

__all__ = ["HostInfo"]


class HostInfo:
    """
    The running machine.

    Args:
        quick, slow: see `vitalsd.sources.darwin.libsystem.LibSystem`.

    Raises:
        OSError: by errno.
        MachError: an answer is not what it has to be.
    """

    def __init__(self, quick: Any, slow: Any) -> None:
        self._quick = quick
        self._slow = slow
        timebase = mach_timebase_info()
        quick.mach_timebase_info(ctypes.addressof(timebase))
        self._numer, self._denom = int(timebase.numer), int(timebase.denom)

    def uuid(self) -> bytes:
        """What tells this machine from others, across reboots; empty where it is not told within a second."""
        uuid = (ctypes.c_ubyte * 16)()
        wait = (ctypes.c_long * 2)(1, 0)  # struct timespec
        try:
            self._slow.gethostuuid(ctypes.addressof(uuid), ctypes.addressof(wait))
        except OSError:
            return b""
        return bytes(uuid)

    def sysctl(self, name: str) -> bytes:
        """The value of a variable, at most 256 bytes of it."""
        buffer = ctypes.create_string_buffer(256)
        size = c_size_t(len(buffer))
        try:
            self._slow.sysctlbyname(name.encode("ascii"), ctypes.addressof(buffer), ctypes.addressof(size), None, 0)
        except OSError as error:
            raise os_error(f"sysctlbyname({name})", error.errno or 0) from None
        return buffer.raw[: size.value]

    def sysctl_int(self, name: str) -> int:
        """The value of an integer variable of 4 or 8 bytes."""
        value = self.sysctl(name)
        if len(value) not in (4, 8):
            raise MachError(f"sysctlbyname({name}) answered {len(value)} bytes, not an integer")
        return int.from_bytes(value, "little", signed=True)

    def absolute_ns(self) -> int:
        """
        Since boot, sleep left out, ns.

        Scaled by ``mach_timebase_info``, which is right for the clocks of user space, also under
        Rosetta, and wrong there for every tick the kernel writes (see `vitalsd.sources.darwin.task`).
        """
        return self._user_clock_ns(self._quick.mach_absolute_time())

    def continuous_ns(self) -> int:
        """Since boot, sleep included, ns."""
        return self._user_clock_ns(self._quick.mach_continuous_time())

    def _user_clock_ns(self, ticks: int) -> int:
        return ticks * self._numer // self._denom
