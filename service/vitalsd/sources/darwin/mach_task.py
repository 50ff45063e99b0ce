"""
Make the Mach calls on our own task: on its threads, times, memory and ports.

Facts about the kernel on which the calls depend (xnu-11417):

- ``task_info`` and ``thread_info`` count in words of 4 bytes, in arguments and replies; a smaller count than that of
  the flavor is KERN_INVALID_ARGUMENT.
- Each entry of ``task_threads`` has one reference, also if its thread has died meanwhile.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_uint32, c_void_p
from itertools import repeat
from typing import Any

from vitalsd.sources.darwin.apple_headers import (
    KERN_INVALID_ARGUMENT,
    KERN_SUCCESS,
    KERN_TERMINATED,
    MACH_PORT_DEAD,
    MACH_PORT_NULL,
    MACH_PORT_RIGHT_SEND,
    MACH_SEND_INVALID_DEST,
    MACH_TASK_BASIC_INFO,
    TASK_ABSOLUTETIME_INFO,
    TASK_EVENTS_INFO,
    TASK_VM_INFO,
    THREAD_EXTENDED_INFO,
    THREAD_IDENTIFIER_INFO,
    ipc_info_space_basic,
    mach_task_basic_info,
    task_absolutetime_info,
    task_events_info,
    task_vm_info,
)
from vitalsd.sources.darwin.functions import MachError, as_passed, mach_error
from vitalsd.sources.darwin.thread_rows import ThreadRows

__all__ = ["MachTask"]

THREAD_GONE = frozenset((KERN_INVALID_ARGUMENT, KERN_TERMINATED, MACH_SEND_INVALID_DEST))
"""Codes of ``thread_info`` for a thread that has ended: detached, inactive, dead name."""

_TASK_FLAVORS: dict[type[Structure], tuple[str, int]] = {
    task_absolutetime_info: ("TASK_ABSOLUTETIME_INFO", TASK_ABSOLUTETIME_INFO),
    task_events_info: ("TASK_EVENTS_INFO", TASK_EVENTS_INFO),
    mach_task_basic_info: ("MACH_TASK_BASIC_INFO", MACH_TASK_BASIC_INFO),
    task_vm_info: ("TASK_VM_INFO", TASK_VM_INFO),
}


class MachTask:
    """
    Calls on our own task.

    The calls are short and hold the interpreter lock: to take it again after each of 3000 calls would cost a wait of up
    to the switch interval each time. ``TASK_VM_INFO`` releases it, because it can wait for the map lock in the kernel.

    Args:
        quick, slow: see `vitalsd.sources.darwin.libsystem.LibSystem`.
        task: ``mach_task_self_``; its value is read at each call, because a forked child has another one.

    Raises:
        MachError: a call failed, or its reply is short.
    """

    def __init__(self, quick: Any, slow: Any, task: c_uint32) -> None:
        self._quick = quick
        self._slow = slow
        self._task = task
        self._thread_info = as_passed(quick, "thread_info")
        self._release = as_passed(quick, "mach_port_deallocate")

    def task_info(self, info: Structure) -> None:
        """Fill `info`; its type determines the flavor."""
        name, flavor = _TASK_FLAVORS[type(info)]
        library = self._slow if flavor == TASK_VM_INFO else self._quick
        words = ctypes.sizeof(info) // 4
        count = c_uint32(words)
        try:
            library.task_info(self._task.value, flavor, ctypes.addressof(info), ctypes.addressof(count))
        except MachError as error:
            raise MachError(f"{name}: {error}") from None
        if count.value < words:
            raise MachError(f"{name}: task_info answered {count.value} words of {words}")

    @contextmanager
    def thread_ports(self) -> Iterator[Sequence[int]]:
        """
        Yield the ports of our own threads; that of a dying thread may be MACH_PORT_NULL or MACH_PORT_DEAD.

        At the end of the context, also after an exception, each other port is released once and the array is freed.
        The two variables that the kernel fills record what has to be released, so that an exception cannot come between
        the call and the record.
        """
        array = POINTER(c_uint32)()
        count = c_uint32()
        codes: list[int] = []
        ports: Sequence[int] = ()
        try:
            self._quick.task_threads(self._task.value, ctypes.addressof(array), ctypes.addressof(count))
            ports = array[: count.value]
            yield ports
        finally:
            if (address := ctypes.cast(array, c_void_p).value) is not None:
                ports = ports or array[: count.value]
                if MACH_PORT_NULL in ports or MACH_PORT_DEAD in ports:
                    ports = [port for port in ports if port not in (MACH_PORT_NULL, MACH_PORT_DEAD)]
                try:
                    codes = list(map(self._release, repeat(self._task.value), ports))
                finally:
                    self._quick.vm_deallocate(self._task.value, address, count.value * ctypes.sizeof(c_uint32))
        for code in codes:
            if code != KERN_SUCCESS:
                raise mach_error(self._quick, "mach_port_deallocate", code)

    def ports_in_use(self) -> int:
        """Return the number of port names of any kind that our task holds."""
        info = ipc_info_space_basic()
        self._quick.mach_port_space_basic_info(self._task.value, ctypes.addressof(info))
        return int(info.iisb_table_inuse)

    def send_references(self, port: int) -> int:
        """Return the number of user references on the send right `port`."""
        references = c_uint32()
        self._quick.mach_port_get_refs(self._task.value, port, MACH_PORT_RIGHT_SEND, ctypes.addressof(references))
        return references.value

    def thread_infos(self, ports: Sequence[int], rows: ThreadRows) -> Sequence[int]:
        """
        Fill `rows` with the threads of `ports`, and return their ids, 0 for a thread that has ended.

        It makes two calls per thread, without a line of Python in between.
        """
        number = len(ports)
        rows.reserve(number)
        call = self._thread_info
        extended = list(map(call, ports, repeat(THREAD_EXTENDED_INFO), rows.infos, rows.info_counts))
        identifier = list(map(call, ports, repeat(THREAD_IDENTIFIER_INFO), rows.ids, rows.id_counts))
        rows.require_counts(number)
        thread_ids = rows.thread_ids(number)
        if any(extended) or any(identifier):
            for i, codes in enumerate(zip(extended, identifier, strict=True)):
                for flavor, code in zip(("THREAD_EXTENDED_INFO", "THREAD_IDENTIFIER_INFO"), codes, strict=True):
                    if code in THREAD_GONE:
                        thread_ids[i] = 0
                    elif code != KERN_SUCCESS:
                        raise mach_error(self._quick, f"thread_info({flavor})", code)
        return thread_ids
