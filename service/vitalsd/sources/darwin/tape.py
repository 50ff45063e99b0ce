"""
Record every call of libSystem, its arguments and the bytes of its reply, on a tape that does not identify a user.

A tape of one run on one Mac becomes a test that needs no Mac: ``tests/support/darwin/tape_player.py`` plays it in place
of libSystem.
The format is JSON lines: a head, then one object per call, in the order in which the calls returned::

    {"call": "proc_pidinfo", "args": [4242, 2, 0, 232], "result": 232, "errno": 0, "reply": ["10000000..."]}

``args`` are the integers of the call without addresses, and the name of a sysctl. ``reply`` are the buffers that the
kernel filled, in hexadecimal, in the order of the arguments.

Each byte of a name, path, argument, environment variable or UUID in a reply is replaced by ``x``; user ids by 501,
group ids by 20. Lengths, counts, numbers and errors are kept.
"""

import ctypes
import json
import platform
import threading
from collections.abc import Callable, Sequence
from ctypes import Structure, c_char, c_size_t, c_uint8, c_uint32
from typing import IO, Any, NamedTuple

from vitalsd.sources.darwin.apple_headers import (
    PROC_PIDT_SHORTBSDINFO,
    PROC_PIDTASKALLINFO,
    PROC_PIDTHREADID64INFO,
    PROC_PIDUNIQIDENTIFIERINFO,
    PROC_PIDVNODEPATHINFO,
    RUSAGE_INFO_V2,
    RUSAGE_INFO_V4,
    RUSAGE_INFO_V6,
    THREAD_EXTENDED_INFO,
    ipc_info_space_basic,
    mach_timebase_info,
    proc_bsdshortinfo,
    proc_taskallinfo,
    proc_threadinfo,
    proc_uniqidentifierinfo,
    proc_vnodepathinfo,
    rusage_info_v2,
    rusage_info_v4,
    rusage_info_v6,
    thread_extended_info,
)

__all__ = ["ARGUMENTS", "FORMAT", "Tape"]

FORMAT = 1
MAX_BYTES = 256 << 20
"""Longest tape, bytes; later calls are left out, and a last line marks that."""
USER, GROUP = 501, 20
"""Ids of the first user of a Mac, and of its group."""

ARGUMENTS: dict[str, tuple[int, ...]] = {
    "task_info": (1,),
    "task_threads": (),
    "thread_info": (0, 1),
    "mach_port_deallocate": (1,),
    "vm_deallocate": (2,),
    "mach_port_space_basic_info": (),
    "mach_port_get_refs": (1, 2),
    "mach_error_string": (0,),
    "mach_timebase_info": (),
    "mach_absolute_time": (),
    "mach_continuous_time": (),
    "proc_pidinfo": (0, 1, 2, 4),
    "proc_pid_rusage": (0, 1),
    "proc_listallpids": (1,),
    "proc_listchildpids": (0, 2),
    "mach_host_self": (),
    "host_processor_info": (1,),
    "host_statistics64": (1,),
    "gethostuuid": (),
    "sysctl": (),
    "sysctlbyname": (),
}
"""
Positions of the arguments that are on the tape, by function. The other arguments are addresses, or always the same.
"""

PROC_STRUCTS: dict[int, type[Structure]] = {
    PROC_PIDTASKALLINFO: proc_taskallinfo,
    PROC_PIDT_SHORTBSDINFO: proc_bsdshortinfo,
    PROC_PIDTHREADID64INFO: proc_threadinfo,
    PROC_PIDUNIQIDENTIFIERINFO: proc_uniqidentifierinfo,
    PROC_PIDVNODEPATHINFO: proc_vnodepathinfo,
}


RUSAGE_STRUCTS: dict[int, type[Structure]] = {
    RUSAGE_INFO_V2: rusage_info_v2,
    RUSAGE_INFO_V4: rusage_info_v4,
    RUSAGE_INFO_V6: rusage_info_v6,
}

NUMBERS = frozenset((b"vm.loadavg", b"vm.swapusage"))
"""Variables longer than a number that consist of numbers; of others that long each byte is replaced."""


class Reply(NamedTuple):
    """A buffer that the kernel filled."""

    address: int
    size: int
    struct: type[Structure] | None = None
    """Layout of the buffer, if it contains names or ids."""
    hidden_from: int | None = None
    """Offset from which on all bytes are a name, and are replaced."""


class Tape:
    """
    Write the calls of a library to a file; the docstring of this module has the format.

    Args:
        file: open for text; the caller closes it.
        pid: of this process; the source of this process needs it when the tape is played.
    """

    def __init__(self, file: IO[str], pid: int) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._room = MAX_BYTES
        head = {"tape": FORMAT, "pid": pid, "machine": platform.machine(), "release": platform.release()}
        self._write(head | {"macos": platform.mac_ver()[0]})

    def of(self, library: ctypes.CDLL) -> "_Taped":
        """Return `library` with its calls recorded on the tape."""
        return _Taped(self, library)

    def add(self, name: str, arguments: Sequence[Any], result: Any, errno: int) -> None:
        """Write one call that has returned."""
        kept: list[Any] = [_number(arguments[i]) for i in ARGUMENTS[name]]
        if name == "sysctlbyname":
            kept.append(arguments[0].decode("ascii"))
        elif name == "sysctl":
            kept += (ctypes.c_int * 3).from_address(_address(arguments[0]))[:]
        elif name in ("mach_port_deallocate", "thread_info"):
            kept = [number & 0xFFFFFFFF for number in kept]
        by_code = name.startswith(("task_", "thread_", "mach_port_", "host_"))
        failed = isinstance(result, int) and (result < 0 or (by_code and result != 0))
        replies = [] if failed else [_redacted(reply).hex() for reply in _replies(name, arguments, result)]
        self._write(
            {
                "call": name,
                "args": kept,
                "result": result.decode("utf-8", "replace") if isinstance(result, bytes) else result,
                "errno": errno,
                "reply": replies,
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        with self._lock:
            if self._room > 0:
                self._room -= len(text)
                self._file.write(text if self._room > 0 else '{"full":true}\n')


class _Taped:
    """A library of ctypes that records its calls on a tape."""

    def __init__(self, tape: Tape, library: ctypes.CDLL) -> None:
        self._tape = tape
        self._library = library

    def __getattr__(self, name: str) -> "_TapedFunction":
        function = _TapedFunction(self._tape, getattr(self._library, name))
        setattr(self, name, function)
        return function

    def __getitem__(self, name: str) -> "_TapedFunction":
        return _TapedFunction(self._tape, self._library[name])


class _TapedFunction:
    """A function of ctypes that records its result on a tape before `errcheck` checks it."""

    def __init__(self, tape: Tape, function: Any) -> None:
        self._tape = tape
        self._function = function
        self.__name__ = str(function.__name__)
        self.restype: Any = None
        self.argtypes: Any = None
        self.errcheck: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        self._function.restype = self.restype
        if self.argtypes is not None:
            self._function.argtypes = self.argtypes
        result = self._function(*arguments)
        errno = ctypes.get_errno() if self.__name__.startswith(("proc_", "sysctl", "gethost")) else 0
        self._tape.add(self.__name__, arguments, result, errno)
        return result if self.errcheck is None else self.errcheck(result, self, arguments)


def _number(argument: Any) -> int:
    return int(getattr(argument, "value", argument))


def _address(argument: Any) -> int:
    """Return the address in a pointer argument: a number, ``None`` or a result of `ctypes.byref`."""
    if argument is None or isinstance(argument, int):
        return argument or 0
    return ctypes.cast(argument, ctypes.c_void_p).value or 0


def _word(argument: Any) -> int:
    """Return the 32 bits at a pointer argument."""
    return c_uint32.from_address(_address(argument)).value


def _replies(name: str, arguments: Sequence[Any], result: Any) -> list[Reply]:
    """Return the buffers that a successful call filled."""
    match name:
        case "task_info" | "thread_info":
            count = _word(arguments[3])
            struct = thread_extended_info if (name, arguments[1]) == ("thread_info", THREAD_EXTENDED_INFO) else None
            return [Reply(_address(arguments[2]), 4 * count, struct)]
        case "task_threads":
            array = c_size_t.from_address(_address(arguments[1])).value
            return [Reply(array, 4 * _word(arguments[2]))]
        case "mach_port_space_basic_info":
            return [Reply(_address(arguments[1]), ctypes.sizeof(ipc_info_space_basic))]
        case "mach_port_get_refs":
            return [Reply(_address(arguments[3]), 4)]
        case "mach_timebase_info":
            return [Reply(_address(arguments[0]), ctypes.sizeof(mach_timebase_info))]
        case "proc_pidinfo":
            return [Reply(_address(arguments[3]), result, PROC_STRUCTS.get(_number(arguments[1])))] if result else []
        case "host_processor_info":
            array = c_size_t.from_address(_address(arguments[3])).value
            return [Reply(array, 4 * _word(arguments[4]))]
        case "host_statistics64":
            return [Reply(_address(arguments[2]), 4 * _word(arguments[3]))]
        case "proc_pid_rusage":
            usage = RUSAGE_STRUCTS[_number(arguments[1])]
            return [Reply(_address(arguments[2]), ctypes.sizeof(usage), usage)]
        case "proc_listallpids":
            return [Reply(address, 4 * result)] if (address := _address(arguments[0])) else []
        case "proc_listchildpids":
            return [Reply(_address(arguments[1]), 4 * result)] if result > 0 else []
        case "gethostuuid":
            return [Reply(_address(arguments[0]), 16, hidden_from=0)]
        case "sysctl":  # KERN_PROCARGS2: the number of words, then the words
            return [Reply(_address(arguments[2]), c_size_t.from_address(_address(arguments[3])).value, hidden_from=4)]
        case "sysctlbyname":
            size = c_size_t.from_address(_address(arguments[2])).value
            is_number = size <= 8 or arguments[0] in NUMBERS
            return [Reply(_address(arguments[1]), size, hidden_from=None if is_number else 0)]
    return []


def _redacted(reply: Reply) -> bytes:
    content = bytearray(ctypes.string_at(reply.address, reply.size))
    if reply.hidden_from is not None:
        content[reply.hidden_from :] = _crossed(content[reply.hidden_from :])
    if reply.struct is not None and len(content) >= ctypes.sizeof(reply.struct):
        _redact(content, 0, reply.struct)
    return bytes(content)


def _redact(content: bytearray, at: int, struct: type[Structure]) -> None:
    """Replace the names, UUIDs and ids in the struct at offset `at`."""
    for name, kind, *_ in struct._fields_:
        field = getattr(struct, name)
        begin, end = at + field.offset, at + field.offset + field.size
        if issubclass(kind, Structure):
            _redact(content, begin, kind)
        elif kind in (c_char * field.size, c_uint8 * field.size):
            content[begin:end] = _crossed(content[begin:end])
        elif name.endswith("uid"):
            content[begin:end] = USER.to_bytes(4, "little")
        elif name.endswith("gid") and not name.endswith("pgid"):
            content[begin:end] = GROUP.to_bytes(4, "little")


def _crossed(name: bytes | bytearray) -> bytes:
    """Return `name` with every byte but NUL replaced, because bytes after the first NUL may be of an older name."""
    return bytes(0 if byte == 0 else ord("x") for byte in name)
