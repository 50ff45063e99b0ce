"""
The functions of libSystem that are called, as a table, and how their results become errors.

Nothing is loaded here, so the module imports on every system. Error channels are dealt with here and nowhere above.
"""

import ctypes
import os
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, Literal, NamedTuple

from vitalsd.sources.darwin.apple_headers import KERN_SUCCESS

__all__ = ["DATA", "FUNCTIONS", "Function", "MachError", "as_passed", "bind", "mach_error", "os_error"]


class MachError(Exception):
    """A Mach call failed, or an answer is shorter than its contract; the text names call and code."""


class Function(NamedTuple):
    """How one function of libSystem is called."""

    prototype: str
    """As in Apple's header; the ABI proof redeclares the function by it."""
    restype: Any
    argtypes: tuple[Any, ...]
    check: Literal["kern_return", "errno", "caller"]
    """Who looks at the result: it is a code, -1 or 0 means errno, or the caller has to."""


FUNCTIONS = {
    "task_info": Function(
        "kern_return_t task_info(task_name_t, task_flavor_t, task_info_t, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_uint32, c_void_p, c_void_p),
        "kern_return",
    ),
    # The array is ours: vm_deallocate it, and release each port in it.
    "task_threads": Function(
        "kern_return_t task_threads(task_inspect_t, thread_act_array_t *, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_void_p, c_void_p),
        "kern_return",
    ),
    # Three of its codes are an answer: the thread has ended.
    "thread_info": Function(
        "kern_return_t thread_info(thread_inspect_t, thread_flavor_t, thread_info_t, mach_msg_type_number_t *)",
        c_int,
        (c_uint32, c_uint32, c_void_p, c_void_p),
        "caller",
    ),
    # An exception halfway through the releases would leak the others.
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
    # The text is static: not to be freed.
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
"""Variables, by their type; a child re-initialises its own after fork, so the value is not kept."""


def bind(library: Any) -> None:
    """
    Declare the functions of `FUNCTIONS` in a library of ctypes, with errors raised as they say.

    `OSError` (by errno) is raised by ``proc_*``, ``sysctl*`` and ``gethostuuid``, `MachError` by the others.

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
    Return a function that is called once a thread: ints of 32 bits, ctypes' own integers and `byref` go on as they are.

    To look each argument over by ``argtypes`` first takes ctypes longer than the call.
    """
    function = library[name]
    function.restype = FUNCTIONS[name].restype
    return function


def mach_error(library: Any, call: str, code: int) -> MachError:
    """Return the error for a `code` that `call` returned."""
    text = library.mach_error_string(code) or b"unknown"
    return MachError(f"{call} failed: {text.decode('utf-8', 'replace')} ({code:#x})")


def os_error(call: str, number: int) -> OSError:
    """Return the error for the errno that `call` left."""
    return OSError(number, f"{call} failed: {os.strerror(number)}")


def _raise_errno(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0 or (result == 0 and function.__name__ == "proc_listallpids"):
        raise os_error(function.__name__, ctypes.get_errno())
    return result
