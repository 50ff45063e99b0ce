"""
libSystem of macOS: one table of functions, how they are called, and nothing above ctypes.

Nothing is loaded before `load`, so the module imports on every system. Word counts, sizes, releases
and error channels are dealt with here and nowhere above.

Facts that shape the calls (xnu-11417):

- ``task_info`` and ``thread_info`` count in words of 4 bytes, in and out; a smaller count than the
  flavor's own is KERN_INVALID_ARGUMENT.
- Each entry of ``task_threads`` carries one reference, also when its thread is dead by then.
- ``proc_pidinfo`` answers 0 for an error *and* for an empty list; only errno tells them apart.
- ``proc_pid_rusage`` is not told the size of the buffer, and writes all of its flavor.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_char, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from itertools import repeat
from struct import Struct
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitalsd.sources.base import Unsupported
from vitalsd.sources.darwin.apple_headers import (
    ARG_MAX,
    CTL_KERN,
    KERN_INVALID_ARGUMENT,
    KERN_PROCARGS2,
    KERN_SUCCESS,
    KERN_TERMINATED,
    MACH_PORT_DEAD,
    MACH_PORT_NULL,
    MACH_PORT_RIGHT_SEND,
    MACH_SEND_INVALID_DEST,
    MACH_TASK_BASIC_INFO,
    MAXTHREADNAMESIZE,
    PROC_PIDLISTFDS,
    PROC_PIDLISTTHREADIDS,
    PROC_PIDT_SHORTBSDINFO,
    PROC_PIDTASKALLINFO,
    PROC_PIDTHREADID64INFO,
    PROC_PIDUNIQIDENTIFIERINFO,
    PROC_PIDVNODEPATHINFO,
    TASK_ABSOLUTETIME_INFO,
    TASK_EVENTS_INFO,
    TASK_VM_INFO,
    THREAD_EXTENDED_INFO,
    THREAD_IDENTIFIER_INFO,
    ipc_info_space_basic,
    mach_task_basic_info,
    mach_timebase_info,
    proc_bsdshortinfo,
    proc_taskallinfo,
    proc_threadinfo,
    proc_uniqidentifierinfo,
    proc_vnodepathinfo,
    rusage_info_v6,
    task_absolutetime_info,
    task_events_info,
    task_vm_info,
    thread_extended_info,
    thread_identifier_info,
)

if TYPE_CHECKING:
    from vitalsd.sources.darwin.tape import Tape

__all__ = ["LibSystem", "MachError", "ThreadRows", "load"]

THREAD_GONE = frozenset((KERN_INVALID_ARGUMENT, KERN_TERMINATED, MACH_SEND_INVALID_DEST))
"""How ``thread_info`` says that the thread has ended: detached, inactive, dead name."""


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

_TASK_FLAVORS: dict[type[Structure], tuple[str, int]] = {
    task_absolutetime_info: ("TASK_ABSOLUTETIME_INFO", TASK_ABSOLUTETIME_INFO),
    task_events_info: ("TASK_EVENTS_INFO", TASK_EVENTS_INFO),
    mach_task_basic_info: ("MACH_TASK_BASIC_INFO", MACH_TASK_BASIC_INFO),
    task_vm_info: ("TASK_VM_INFO", TASK_VM_INFO),
}
_PROC_FLAVORS: dict[type[Structure], tuple[str, int]] = {
    proc_taskallinfo: ("PROC_PIDTASKALLINFO", PROC_PIDTASKALLINFO),
    proc_bsdshortinfo: ("PROC_PIDT_SHORTBSDINFO", PROC_PIDT_SHORTBSDINFO),
    proc_uniqidentifierinfo: ("PROC_PIDUNIQIDENTIFIERINFO", PROC_PIDUNIQIDENTIFIERINFO),
    proc_vnodepathinfo: ("PROC_PIDVNODEPATHINFO", PROC_PIDVNODEPATHINFO),
}


class MachError(Exception):
    """A Mach call failed, or an answer is shorter than its contract; the text names call and code."""


class LibSystem:
    """
    The loaded library.

    `OSError` (by errno) is raised by the ``proc_*`` and ``sysctl_*`` methods, `MachError` by the
    others and for a short reply. The calls on our own task are short and keep the interpreter lock:
    taking it back after each of 3000 calls would cost a wait of up to the switch interval each. What
    can wait in the kernel gives it up: ``TASK_VM_INFO`` (map lock) and every ``proc_*`` (a target
    inside exec).

    Args:
        quick: the functions of libSystem, to be called with the interpreter lock; they leave errno alone.
        slow: the same, to be called without it, with ctypes' copy of errno.
        task: ``mach_task_self_``.

    Raises:
        Unsupported: a function is missing; the text names it.
    """

    def __init__(self, quick: Any, slow: Any, task: c_uint32) -> None:
        self._quick = quick
        self._slow = slow
        self._task = task
        try:
            for name, function in FUNCTIONS.items():
                for library in (self._quick, self._slow):
                    symbol = getattr(library, name)
                    symbol.restype = function.restype
                    symbol.argtypes = function.argtypes
                    if function.check == "errno":
                        symbol.errcheck = _raise_errno
                    elif function.check == "kern_return":
                        symbol.errcheck = self._raise_code
            self._thread_info = _as_passed(self._quick, "thread_info")
            self._release = _as_passed(self._quick, "mach_port_deallocate")
            self._thread_pidinfo = _as_passed(self._slow, "proc_pidinfo")
        except AttributeError as error:
            raise Unsupported(f"libSystem lacks a symbol: {error}") from None
        timebase = mach_timebase_info()
        self._quick.mach_timebase_info(ctypes.addressof(timebase))
        self._numer, self._denom = int(timebase.numer), int(timebase.denom)

    # Mach: our own task

    def task_info(self, info: Structure) -> None:
        """Fill `info`, whose type tells the flavor."""
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
        Ports of our own threads; one that is dying may be MACH_PORT_NULL or MACH_PORT_DEAD.

        On leaving, however that happens, each of the others is released once and the array is freed.
        The two variables filled by the kernel are themselves the record of what is owed, so that no
        exception can come between the call and the record.
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
                raise self.mach_error("mach_port_deallocate", code)

    def ports_in_use(self) -> int:
        """Port names our task holds, of any kind."""
        info = ipc_info_space_basic()
        self._quick.mach_port_space_basic_info(self._task.value, ctypes.addressof(info))
        return int(info.iisb_table_inuse)

    def send_references(self, port: int) -> int:
        """User references on the send right named `port`."""
        references = c_uint32()
        self._quick.mach_port_get_refs(self._task.value, port, MACH_PORT_RIGHT_SEND, ctypes.addressof(references))
        return references.value

    def mach_error(self, call: str, code: int) -> MachError:
        """The error for a `code` that `call` returned."""
        text = self._quick.mach_error_string(code) or b"unknown"
        return MachError(f"{call} failed: {text.decode('utf-8', 'replace')} ({code:#x})")

    def _raise_code(self, code: int, function: Any, arguments: tuple[Any, ...]) -> int:
        if code != KERN_SUCCESS:
            raise self.mach_error(function.__name__, code)
        return code

    # libproc: any process of our effective user

    def proc_info(self, pid: int, info: Structure, arg: int = 0) -> None:
        """Fill `info`, whose type tells the flavor."""
        name, flavor = _PROC_FLAVORS[type(info)]
        size = ctypes.sizeof(info)
        got = self._proc_pidinfo(name, pid, flavor, arg, ctypes.addressof(info), size)
        if got < size:
            raise MachError(f"proc_pidinfo({name}) answered {got} bytes of {size}")

    def proc_list(self, pid: int, flavor: Literal["PROC_PIDLISTFDS", "PROC_PIDLISTTHREADIDS"], buffer: Any) -> int:
        """Bytes written to `buffer`; as many as it has room for may mean that there is more."""
        number = PROC_PIDLISTFDS if flavor == "PROC_PIDLISTFDS" else PROC_PIDLISTTHREADIDS
        return self._proc_pidinfo(flavor, pid, number, 0, ctypes.addressof(buffer), ctypes.sizeof(buffer))

    def proc_rusage(self, pid: int, info: rusage_info_v6, flavor: int) -> None:
        """Fill `info` as far as `flavor` (RUSAGE_INFO_V6 or an older one) goes."""
        self._slow.proc_pid_rusage(pid, flavor, ctypes.addressof(info))

    def command_line(self, pid: int) -> tuple[str, list[bytes]]:
        """
        Path of the executable, and the words of the command line, the name of the program first.

        What follows them in the answer, the environment, goes no further.

        Raises:
            OSError: EINVAL for a process that is gone, a zombie or another user's.
        """
        oid = (c_int * 3)(CTL_KERN, KERN_PROCARGS2, pid)
        # Of less room than the answer takes the kernel fills in the end of it, which is the environment.
        buffer = (c_char * ARG_MAX)()
        size = c_size_t(ARG_MAX)
        try:
            self._slow.sysctl(
                ctypes.addressof(oid), len(oid), ctypes.addressof(buffer), ctypes.addressof(size), None, 0
            )
        except OSError as error:
            raise _os_error("sysctl(KERN_PROCARGS2)", error.errno or 0) from None
        answer = ctypes.string_at(buffer, size.value)
        number = int.from_bytes(answer[:4], sys.byteorder)
        path, _, padded = answer[4:].partition(b"\0")
        return os.fsdecode(path), padded.lstrip(b"\0").split(b"\0", number)[:number]

    def working_directory(self, pid: int) -> str:
        """
        Return the absolute path of the current directory of process `pid`.

        Source: ``pvi_cdir`` of PROC_PIDVNODEPATHINFO. The kernel puts the path together from the names in its cache and
        leaves out the first names of one that is longer than 1023 bytes, which the reply does not show. The kernel also
        reads the attributes of the directory, so the call can wait for a file server.

        Raises:
            OSError: ESRCH for a process that is gone or a zombie; EPERM for another user's; ENOENT if the kernel has
                no path of the directory; any other errno of the file system or of a security policy.
            MachError: the reply is shorter than the struct.
        """
        info = proc_vnodepathinfo()
        self.proc_info(pid, info)
        path = os.fsdecode(info.pvi_cdir.vip_path)
        if not path:
            raise _os_error("proc_pidinfo(PROC_PIDVNODEPATHINFO)", errno.ENOENT)
        return path

    def proc_pids(self) -> list[int]:
        """Every process, zombies and other users' too."""
        room = int(self._slow.proc_listallpids(None, 0))
        while True:
            buffer = (c_int32 * (room + 32))()
            count = int(self._slow.proc_listallpids(ctypes.addressof(buffer), ctypes.sizeof(buffer)))
            if count < len(buffer):
                return sorted(buffer[:count])
            room = 2 * len(buffer)

    def _proc_pidinfo(self, name: str, pid: int, flavor: int, arg: int, address: int, size: int) -> int:
        ctypes.set_errno(0)
        got: int = self._slow.proc_pidinfo(pid, flavor, arg, address, size)
        if got <= 0 and ctypes.get_errno():
            raise _os_error(f"proc_pidinfo({name})", ctypes.get_errno())
        return got

    # The machine

    def host_uuid(self) -> bytes:
        """What tells this machine from others, across reboots; empty where it is not told within a second."""
        uuid = (ctypes.c_ubyte * 16)()
        wait = (ctypes.c_long * 2)(1, 0)  # struct timespec
        try:
            self._slow.gethostuuid(ctypes.addressof(uuid), ctypes.addressof(wait))
        except OSError:
            return b""
        return bytes(uuid)

    # sysctl and clocks

    def sysctl(self, name: str) -> bytes:
        """The value of a variable, at most 256 bytes of it."""
        buffer = ctypes.create_string_buffer(256)
        size = c_size_t(len(buffer))
        try:
            self._slow.sysctlbyname(name.encode("ascii"), ctypes.addressof(buffer), ctypes.addressof(size), None, 0)
        except OSError as error:
            raise _os_error(f"sysctlbyname({name})", error.errno or 0) from None
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

    # Many threads at once

    def thread_infos(self, ports: Sequence[int], rows: "ThreadRows") -> Sequence[int]:
        """
        Fill `rows` with the threads behind `ports`, and return the ids of those, 0 for one that has ended.

        Per thread two calls, without a line of Python run in between.
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
                        raise self.mach_error(f"thread_info({flavor})", code)
        return thread_ids

    def proc_thread_infos(self, pid: int, thread_ids: Sequence[int], rows: "ThreadRows") -> Sequence[int]:
        """
        Fill `rows` with the threads `thread_ids` of any process, and return these, 0 for one that has ended.

        Per thread one call. Whoever is not found in it is asked for again, for what errno said is gone by then.
        """
        size = ctypes.sizeof(proc_threadinfo)
        rows.reserve(len(thread_ids))
        asked = map(c_uint64, thread_ids)
        got = list(
            map(self._thread_pidinfo, repeat(pid), repeat(PROC_PIDTHREADID64INFO), asked, rows.infos, repeat(size))
        )
        if got.count(size) == len(got):
            return thread_ids
        return [
            tid if bytes_got == size or self._proc_thread_info(pid, tid, address) else 0
            for tid, bytes_got, address in zip(thread_ids, got, rows.info_at, strict=False)
        ]

    def _proc_thread_info(self, pid: int, thread_id: int, address: int) -> bool:
        """Write the `proc_threadinfo` of a thread to `address`; False if it or its process has ended."""
        name, size = "PROC_PIDTHREADID64INFO", ctypes.sizeof(proc_threadinfo)
        try:
            got = self._proc_pidinfo(name, pid, PROC_PIDTHREADID64INFO, thread_id, address, size)
        except ProcessLookupError:
            return False
        if got < size:
            raise MachError(f"proc_pidinfo({name}) answered {got} bytes of {size}")
        return True


class ThreadRows:
    """Room for one `thread_extended_info` (or `proc_threadinfo`) per thread, reused and grown by need."""

    _name = Struct(f"{thread_extended_info.pth_name.offset}x{MAXTHREADNAMESIZE}s")
    _info_count = ctypes.sizeof(thread_extended_info) // 4
    _id_count = ctypes.sizeof(thread_identifier_info) // 4

    def __init__(self) -> None:
        self._room = 0
        self.reserve(64)

    def reserve(self, number: int) -> None:
        """Make room for `number` threads; what is there may be lost."""
        if number > self._room:
            self._room = room = max(number, 2 * self._room)
            self._infos = (thread_extended_info * room)()
            self._ids = (thread_identifier_info * room)()
            self._info_counts = (c_uint32 * room)()
            self._id_counts = (c_uint32 * room)()
            self._asked = bytes((c_uint32 * room)(*repeat(self._info_count, room)))
            self._asked_ids = bytes((c_uint32 * room)(*repeat(self._id_count, room)))
            self.info_at = _addresses(self._infos)
            self.infos = _references(self._infos)
            self.info_counts = _references(self._info_counts)
            self.ids = _references(self._ids)
            self.id_counts = _references(self._id_counts)
        # The kernel writes the counts back, also to those it answered short.
        ctypes.memmove(self._info_counts, self._asked, 4 * number)
        ctypes.memmove(self._id_counts, self._asked_ids, 4 * number)

    def require_counts(self, number: int) -> None:
        """Raises `MachError` if ``thread_info`` answered any of the first `number` threads short."""
        for flavor, counts, asked in (
            ("THREAD_EXTENDED_INFO", self._info_counts, self._asked),
            ("THREAD_IDENTIFIER_INFO", self._id_counts, self._asked_ids),
        ):
            size = 4 * number
            if ctypes.string_at(counts, size) != asked[:size]:
                words = int.from_bytes(asked[:4], "little")
                raise MachError(f"thread_info({flavor}) answered {min(counts[:number])} words of {words}")

    def thread_ids(self, number: int) -> list[int]:
        ids: list[int] = memoryview(self._ids).cast("B").cast("Q")[: 3 * number : 3].tolist()
        return ids

    def user_ns(self, number: int) -> list[int]:
        return self._column("Q", thread_extended_info.pth_user_time.offset // 8, number)

    def system_ns(self, number: int) -> list[int]:
        return self._column("Q", thread_extended_info.pth_system_time.offset // 8, number)

    def run_states(self, number: int) -> list[int]:
        return self._column("i", thread_extended_info.pth_run_state.offset // 4, number)

    def priorities(self, number: int) -> list[int]:
        return self._column("i", thread_extended_info.pth_curpri.offset // 4, number)

    def names(self, number: int) -> list[tuple[bytes]]:
        """As the kernel wrote them, padding and all."""
        size = number * ctypes.sizeof(thread_extended_info)
        return list(self._name.iter_unpack(memoryview(self._infos).cast("B")[:size]))

    def _column(self, kind: Literal["Q", "i"], first: int, number: int) -> list[int]:
        step = ctypes.sizeof(thread_extended_info) // (8 if kind == "Q" else 4)
        view = memoryview(self._infos).cast("B").cast(kind)
        column: list[int] = view[first : first + step * number : step].tolist()
        return column


def _as_passed(library: ctypes.CDLL, name: str) -> Any:
    """
    A function that is called once a thread: ints of 32 bits, ctypes' own integers and `byref` go on as they are.

    To look each argument over by ``argtypes`` first takes ctypes longer than the call.
    """
    function = library[name]
    function.restype = FUNCTIONS[name].restype
    return function


def _addresses(array: Any) -> list[int]:
    base, step = ctypes.addressof(array), ctypes.sizeof(array._type_)
    return list(range(base, base + step * len(array), step))


def _references(array: Any) -> list[Any]:
    """What `ctypes.byref` makes of each element."""
    return list(map(ctypes.byref, repeat(array), range(0, ctypes.sizeof(array), ctypes.sizeof(array._type_))))


def _os_error(call: str, number: int) -> OSError:
    return OSError(number, f"{call} failed: {os.strerror(number)}")


def _raise_errno(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0 or (result == 0 and function.__name__ == "proc_listallpids"):
        raise _os_error(function.__name__, ctypes.get_errno())
    return result


def load(path: str | None = None, tape: "Tape | None" = None) -> LibSystem:
    """
    Load libSystem, or the library at `path`.

    Args:
        tape: gets every call and its reply.

    Raises:
        Unsupported: it does not load or lacks a function; the text names it.
    """
    try:
        quick: Any = ctypes.PyDLL(path)
        slow: Any = ctypes.CDLL(path, use_errno=True)
    except OSError as error:
        raise Unsupported(f"cannot load libSystem: {error}") from None
    try:
        task = DATA["mach_task_self_"].in_dll(quick, "mach_task_self_")
    except ValueError as error:
        raise Unsupported(f"libSystem lacks a symbol: {error}") from None
    if tape is not None:
        quick, slow = tape.of(quick), tape.of(slow)
    return LibSystem(quick, slow, task)
