"""
Read statistics of the machine through its host port.

Facts about the kernel (xnu-11417; each has a test over the simulator):

- Each ``mach_host_self`` adds a reference to the send right of the host port. Each reading takes one and releases it,
  so that no number of sources leaves one behind.
- ``host_statistics`` and ``host_statistics64`` answer all programs that are not Apple's together 2 to 10 times in a
  second, and after that repeat the last answer (osfmk/kern/host.c, rate_limit_host_statistics). So an amount of memory
  can be a second old, and a CPU time read there could stand still for a second and then jump. ``host_processor_info``
  has no such limit, and each of its counters is of one processor: it wraps after 497 days, their sum within a month.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_uint32, c_void_p
from typing import Any

from vitalsd.sources.darwin.apple_headers import (
    CPU_STATE_IDLE,
    CPU_STATE_MAX,
    HOST_VM_INFO64,
    KERN_SUCCESS,
    MACH_PORT_DEAD,
    MACH_PORT_NULL,
    MACH_PORT_RIGHT_SEND,
    PROCESSOR_CPU_LOAD_INFO,
    vm_statistics64,
)
from vitalsd.sources.darwin.functions import MachError, mach_error

__all__ = ["HostStatistics"]


class HostStatistics:
    """
    Calls on the host port, which every process may make.

    Args:
        slow: see `vitalsd.sources.darwin.libsystem.LibSystem`.
        task: ``mach_task_self_``; its value is read at each call, because a forked child has another one.

    Raises:
        MachError: a call failed, or its reply does not have the documented form.
    """

    def __init__(self, slow: Any, task: c_uint32) -> None:
        self._slow = slow
        self._task = task

    def busy_ticks(self) -> int:
        """Return the time that all processors were not idle since boot, in ticks of 1/100 s."""
        processors, count, array = c_uint32(), c_uint32(), POINTER(c_uint32)()
        try:
            with self._port() as port:
                self._slow.host_processor_info(
                    port,
                    PROCESSOR_CPU_LOAD_INFO,
                    ctypes.addressof(processors),
                    ctypes.addressof(array),
                    ctypes.addressof(count),
                )
            words = array[: count.value]
        finally:
            if (address := ctypes.cast(array, c_void_p).value) is not None:
                self._slow.vm_deallocate(self._task.value, address, count.value * ctypes.sizeof(c_uint32))
        if not words or len(words) != processors.value * CPU_STATE_MAX:
            raise MachError(f"host_processor_info answered {len(words)} words for {processors.value} processors")
        busy: int = sum(words) - sum(words[CPU_STATE_IDLE::CPU_STATE_MAX])
        return busy

    def memory(self) -> vm_statistics64:
        """Return the pages of the machine by use; they may be a second old."""
        pages, words = vm_statistics64(), ctypes.sizeof(vm_statistics64) // 4
        count = c_uint32(words)
        with self._port() as port:
            self._slow.host_statistics64(port, HOST_VM_INFO64, ctypes.addressof(pages), ctypes.addressof(count))
        if count.value < words:
            raise MachError(f"host_statistics64(HOST_VM_INFO64) answered {count.value} words of {words}")
        return pages

    def references(self) -> int:
        """Return the number of user references on the host port, this call's own included."""
        references = c_uint32()
        with self._port() as port:
            self._slow.mach_port_get_refs(self._task.value, port, MACH_PORT_RIGHT_SEND, ctypes.addressof(references))
        return references.value

    @contextmanager
    def _port(self) -> Iterator[int]:
        """Yield the host port, and release the reference at the end, also after an exception."""
        port = self._slow.mach_host_self()
        if port in (MACH_PORT_NULL, MACH_PORT_DEAD):
            raise MachError("mach_host_self gives no port")
        try:
            yield port
        finally:
            code = self._slow.mach_port_deallocate(self._task.value, port)
        if code != KERN_SUCCESS:
            raise mach_error(self._slow, "mach_port_deallocate", code)
