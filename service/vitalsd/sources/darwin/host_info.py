"""Read sysctl variables, clocks and UUID of the machine, which Mach calls the host."""

import ctypes
from ctypes import Structure, c_size_t
from typing import Any, TypeVar

from vitalsd.sources.darwin.apple_headers import mach_timebase_info
from vitalsd.sources.darwin.functions import MachError, os_error

__all__ = ["HostInfo"]

StructureT = TypeVar("StructureT", bound=Structure)


class HostInfo:
    """
    Calls on the running machine.

    Args:
        quick, slow: see `vitalsd.sources.darwin.libsystem.LibSystem`.

    Raises:
        OSError: a call failed, with its errno.
        MachError: a reply does not have the documented form.
    """

    def __init__(self, quick: Any, slow: Any) -> None:
        self._quick = quick
        self._slow = slow
        timebase = mach_timebase_info()
        quick.mach_timebase_info(ctypes.addressof(timebase))
        self._numer, self._denom = int(timebase.numer), int(timebase.denom)

    def uuid(self) -> bytes:
        """Return the UUID of this machine, the same across reboots; empty if the system does not give it within 1 s."""
        uuid = (ctypes.c_ubyte * 16)()
        wait = (ctypes.c_long * 2)(1, 0)  # struct timespec
        try:
            self._slow.gethostuuid(ctypes.addressof(uuid), ctypes.addressof(wait))
        except OSError:
            return b""
        return bytes(uuid)

    def sysctl(self, name: str) -> bytes:
        """Return the value of a variable, at most 256 bytes."""
        buffer = ctypes.create_string_buffer(256)
        size = c_size_t(len(buffer))
        try:
            self._slow.sysctlbyname(name.encode("ascii"), ctypes.addressof(buffer), ctypes.addressof(size), None, 0)
        except OSError as error:
            raise os_error(f"sysctlbyname({name})", error.errno or 0) from None
        return buffer.raw[: size.value]

    def sysctl_int(self, name: str) -> int:
        """Return the value of an integer variable of 4 or 8 bytes."""
        value = self.sysctl(name)
        if len(value) not in (4, 8):
            raise MachError(f"sysctlbyname({name}) answered {len(value)} bytes, not an integer")
        return int.from_bytes(value, "little", signed=True)

    def sysctl_struct(self, name: str, struct: type[StructureT]) -> StructureT:
        """Return the value of a variable that has the type `struct`."""
        value, size = self.sysctl(name), ctypes.sizeof(struct)
        if len(value) != size:
            raise MachError(f"sysctlbyname({name}) answered {len(value)} bytes of {size}")
        return struct.from_buffer_copy(value)

    def absolute_ns(self) -> int:
        """
        Return the time since boot without the time asleep, ns.

        It is scaled by ``mach_timebase_info``. That is correct for the clocks of user space, also under Rosetta, and
        under Rosetta wrong for ticks that the kernel writes (see `vitalsd.sources.darwin.task`).
        """
        return self._user_clock_ns(self._quick.mach_absolute_time())

    def continuous_ns(self) -> int:
        """Return the time since boot with the time asleep, ns."""
        return self._user_clock_ns(self._quick.mach_continuous_time())

    def _user_clock_ns(self, ticks: int) -> int:
        return ticks * self._numer // self._denom
