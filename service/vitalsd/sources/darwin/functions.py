"""
Declare the functions of libSystem that vitalsd calls, in a table, and turn their error codes into exceptions.

This module loads no library, so it can be imported on every system. No module above it handles error codes.
"""

import ctypes
import os
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, Literal, NamedTuple

from vitalsd.sources.darwin.apple_headers import KERN_SUCCESS

__all__ = ["DATA", "FUNCTIONS", "Function", "MachError", "as_passed", "bind", "mach_error", "os_error"]


class MachError(Exception):
    """A Mach call failed, or a reply is shorter than documented; the text names call and code."""


class Function(NamedTuple):
    """The declaration of one function of libSystem."""

    prototype: str
    """Declaration in Apple's header; the ABI proof redeclares the function with it."""
    restype: Any
    argtypes: tuple[Any, ...]
    check: Literal["kern_return", "errno", "caller"]
    """
    How the result is checked: ``kern_return``: it is an error code; ``errno``: a failure sets errno; ``caller``: the
    caller checks it.
    """


FUNCTIONS = {
    "task_info": Function(
        "kern_return_t task_info(task_name_t, task_flavor_t, task_info_t, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_uint32, c_void_p, c_void_p),
        "kern_return",
    ),
    # The caller owns the array: it has to release each port in it, and the array with vm_deallocate.
    "task_threads": Function(
        "kern_return_t task_threads(task_inspect_t, thread_act_array_t *, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_void_p, c_void_p),
        "kern_return",
    ),
    # Three of its codes are no errors: they mean that the thread has ended.
    "thread_info": Function(
        "kern_return_t thread_info(thread_inspect_t, thread_flavor_t, thread_info_t, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_uint32, c_void_p, c_void_p),
        "caller",
    ),
    # An exception after some of the releases would leak the other ports.
    "mach_port_deallocate": Function(
        "kern_return_t mach_port_deallocate(ipc_space_t, mach_port_name_t)", c_int, (c_uint32, c_uint32), "caller"
    ),
    # The size is in bytes.
    "vm_deallocate": Function(
        "kern_return_t vm_deallocate(vm_map_t, vm_address_t, vm_size_t)",
        c_int,
        (c_uint32, c_size_t, c_size_t),
        "kern_return",
    ),
    "mach_port_space_basic_info": Function(
        "kern_return_t mach_port_space_basic_info(ipc_space_inspect_t, ipc_info_space_basic_t *)",
        c_int,
        (c_uint32, c_void_p),
        "kern_return",
    ),
    "mach_port_get_refs": Function(
        "kern_return_t mach_port_get_refs(ipc_space_t, mach_port_name_t, mach_port_right_t, mach_port_urefs_t *)",
        c_int,
        (c_uint32, c_uint32, c_uint32, c_void_p),
        "kern_return",
    ),
    # The text is static and must not be freed.
    "mach_error_string": Function("char *mach_error_string(mach_error_t)", c_char_p, (c_int,), "caller"),
    "mach_timebase_info": Function(
        "kern_return_t mach_timebase_info(mach_timebase_info_t)", c_int, (c_void_p,), "kern_return"
    ),
    "mach_absolute_time": Function("uint64_t mach_absolute_time(void)", c_uint64, (), "caller"),
    "mach_continuous_time": Function("uint64_t mach_continuous_time(void)", c_uint64, (), "caller"),
    "proc_pidinfo": Function(
        "int proc_pidinfo(int, int, uint64_t, void *, int)",
        c_int,
        (c_int, c_int, c_uint64, c_void_p, c_int),
        "caller",
    ),
    "proc_pid_rusage": Function(
        "int proc_pid_rusage(int, int, rusage_info_t *)", c_int, (c_int, c_int, c_void_p), "errno"
    ),
    "proc_listallpids": Function("int proc_listallpids(void *, int)", c_int, (c_void_p, c_int), "errno"),
    # It returns 0 for an error and for a process without children.
    "proc_listchildpids": Function(
        "int proc_listchildpids(pid_t, void *, int)", c_int, (c_int, c_void_p, c_int), "caller"
    ),
    # Each call adds a reference to the send right that it returns; the caller has to release it.
    "mach_host_self": Function("mach_port_t mach_host_self(void)", c_uint32, (), "caller"),
    # The caller has to free the array with vm_deallocate.
    "host_processor_info": Function(
        "kern_return_t host_processor_info(host_t, processor_flavor_t, natural_t *, processor_info_array_t *, "
        "mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_int, c_void_p, c_void_p, c_void_p),
        "kern_return",
    ),
    "host_statistics64": Function(
        "kern_return_t host_statistics64(host_t, host_flavor_t, host_info64_t, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_int, c_void_p, c_void_p),
        "kern_return",
    ),
    "gethostuuid": Function(
        "int gethostuuid(unsigned char *, const struct timespec *)", c_int, (c_void_p, c_void_p), "errno"
    ),
    "sysctl": Function(
        "int sysctl(int *, u_int, void *, size_t *, void *, size_t)",
        c_int,
        (c_void_p, c_uint32, c_void_p, c_void_p, c_void_p, c_size_t),
        "errno",
    ),
    "sysctlbyname": Function(
        "int sysctlbyname(const char *, void *, size_t *, void *, size_t)",
        c_int,
        (c_char_p, c_void_p, c_void_p, c_void_p, c_size_t),
        "errno",
    ),
}

DATA = {"mach_task_self_": c_uint32}
"""Types of variables of libSystem. A forked child initialises its own anew, so the value is never stored."""


def bind(library: Any) -> None:
    """
    Declare the functions of `FUNCTIONS` in a library of ctypes, so that they raise errors according to `check`.

    ``proc_*``, ``sysctl*`` and ``gethostuuid`` raise `OSError` with errno; the others raise `MachError`.

    Raises:
        AttributeError: the library lacks a function; the text names it.
    """

    def raise_code(code: int, function: Any, arguments: tuple[Any, ...]) -> int:
        if code != KERN_SUCCESS:
            raise mach_error(library, function.__name__, code)
        return code

    for name, function in FUNCTIONS.items():
        symbol = getattr(library, name)
        symbol.restype = function.restype
        symbol.argtypes = function.argtypes
        if function.check == "errno":
            symbol.errcheck = _raise_errno
        elif function.check == "kern_return":
            symbol.errcheck = raise_code


def as_passed(library: Any, name: str) -> Any:
    """
    Return a function without ``argtypes``, for calls that are made once for each thread.

    ctypes passes ints as 32 bits, and its own integers and `byref` unchanged. To convert each argument by ``argtypes``
    takes ctypes longer than the call.
    """
    function = library[name]
    function.restype = FUNCTIONS[name].restype
    return function


def mach_error(library: Any, call: str, code: int) -> MachError:
    """Return the error for a `code` that `call` returned."""
    text = library.mach_error_string(code) or b"unknown"
    return MachError(f"{call} failed: {text.decode('utf-8', 'replace')} ({code:#x})")


def os_error(call: str, number: int) -> OSError:
    """Return the error for the errno that `call` set."""
    return OSError(number, f"{call} failed: {os.strerror(number)}")


def _raise_errno(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0 or (result == 0 and function.__name__ == "proc_listallpids"):
        raise os_error(function.__name__, ctypes.get_errno())
    return result
