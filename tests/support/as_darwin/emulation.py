"""
Emulate on Linux what Python and the sockets of the kernel show on Darwin.

`install` changes the running interpreter: it takes away the names that Python lacks on macOS, has socket options, Unix
addresses and ``getrusage`` answer as XNU, hides ``/proc``, ``/sys`` and ``/dev/shm``, and lets ``ctypes.CDLL(None)``
load the simulated libSystem. `enable` does that for all programs that this one starts, too. It does not emulate
``uname``, the shell and its programs, and the directories of a Mac.

Sources: xnu-11417 (files are named at each rule); configure.ac and the ``Availability`` notes of CPython 3.11 to 3.14.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["COUNTED", "LACKING", "LIBRARY", "SIMULATOR", "TEARDOWN_MS", "Kqueue", "enable", "install"]

LIBRARY = "VITALSD_AS_DARWIN"
"""Variable with the path of the simulated libSystem; programs with it in their environment run as on Darwin."""
TEARDOWN_MS = "SIM_TEARDOWN_MS"
"""Variable with the time that the kernel takes between the first ESRCH of a process and its NOTE_EXIT, ms."""

SIMULATOR = "VITALSD_SIMULATOR"
"""Variable with the path of the simulated libSystem for the plugin, which builds one without it."""
COUNTED = "passed as on a Mac"
"""Property of a test that ran others under the plugin: how many passed."""

LACKING: dict[types.ModuleType, str] = {
    os: "O_PATH O_TMPFILE O_RSYNC P_PIDFD copy_file_range dup3 eventfd fdatasync getrandom getresgid getresuid getxattr"
    " listxattr memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate removexattr sched_getaffinity"
    " sched_getparam sched_getscheduler sched_setaffinity sched_setscheduler setns setresgid setresuid setxattr splice"
    " timerfd_create unshare waitid",
    socket: "AF_ALG AF_NETLINK AF_PACKET AF_VSOCK MSG_CMSG_CLOEXEC MSG_CONFIRM MSG_ERRQUEUE MSG_FASTOPEN MSG_MORE"
    " SCM_CREDENTIALS SOCK_CLOEXEC SOCK_NONBLOCK SO_BINDTODEVICE SO_DOMAIN SO_MARK SO_PASSCRED SO_PASSSEC SO_PEERCRED"
    " SO_PEERSEC SO_PRIORITY SO_PROTOCOL TCP_CONGESTION TCP_CORK TCP_DEFER_ACCEPT TCP_INFO TCP_LINGER2 TCP_QUICKACK"
    " TCP_SYNCNT TCP_USER_TIMEOUT TCP_WINDOW_CLAMP",
    select: "epoll EPOLLIN EPOLLOUT EPOLLPRI EPOLLERR EPOLLHUP EPOLLET EPOLLONESHOT EPOLLRDHUP EPOLL_CLOEXEC",
    resource: "RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_OFILE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RUSAGE_THREAD"
    " prlimit",
    fcntl: "DN_ACCESS DN_CREATE DN_DELETE DN_MODIFY F_ADD_SEALS F_GET_SEALS F_GETLEASE F_GETPIPE_SZ F_GETSIG F_NOTIFY"
    " F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_SEAL_SEAL F_SETLEASE F_SETPIPE_SZ F_SETSIG FICLONE FICLONERANGE",
    signal: "SIGCLD SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT sigtimedwait sigwaitinfo",
    time: "CLOCK_BOOTTIME CLOCK_TAI pthread_getcpuclockid",
    mmap: "MAP_POPULATE MAP_STACK MAP_DENYWRITE MAP_EXECUTABLE MADV_HUGEPAGE MADV_DONTFORK MADV_REMOVE",
}
"""Names that Python 3.11 has on Linux and not on macOS, as far as a program could come to use them."""

HIDDEN = ("/proc", "/sys", "/dev/shm")
"""Directories that macOS does not have."""
SUN_PATH = 104
"""Bytes of ``sun_path``, the NUL among them (bsd/sys/un.h)."""
LOCAL_PEERCRED = 0, 1
"""Level and name of the option (bsd/sys/un.h); its struct xucred has 76 bytes (bsd/sys/ucred.h)."""
SO_PEERCRED = 17
KNOWN_OPTIONS = (
    "SO_BROADCAST SO_DEBUG SO_DONTROUTE SO_ERROR SO_KEEPALIVE SO_LINGER SO_OOBINLINE SO_RCVBUF SO_RCVLOWAT SO_RCVTIMEO"
    " SO_REUSEADDR SO_REUSEPORT SO_SNDBUF SO_SNDLOWAT SO_SNDTIMEO SO_TYPE"
)
"""Options of SOL_SOCKET that sogetoptlock and sosetoptlock know (bsd/kern/uipc_socket.c), as far as Linux has them."""

EVFILT_PROC = -5
NOTE_EXIT, NOTE_EXITSTATUS = 0x80000000, 0x04000000

_poll = select.poll
_pidfd_open = getattr(os, "pidfd_open", None)


class Kevent(NamedTuple):
    """Hold the used fields of ``struct kevent`` (kqueue(2))."""

    ident: int
    filter: int = -1
    flags: int = 1
    fflags: int = 0
    data: int = 0
    udata: int = 0


class Kqueue:
    """
    Emulate kqueue(2) for ``EVFILT_PROC`` with ``NOTE_EXIT``: one event per process, after its teardown.

    Attaching fails with ESRCH for a process that has begun to exit, and with EACCES if the status is wanted of a
    process that the caller may not kill (filt_procattach, bsd/kern/kern_event.c).
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._ended, self._end = os.pipe()
        self._watches: list[threading.Thread] = []
        self._events: list[Kevent] = []
        self._teardown_s = float(os.environ.get(TEARDOWN_MS, "0")) / 1000

    def fileno(self) -> int:
        """Return a descriptor that is readable while an event is pending."""
        return self._reader

    def control(self, changes: Any, most: int, timeout: float | None = None) -> list[Kevent]:
        """Register `changes`; return up to `most` pending events, after at most `timeout` seconds."""
        for change in changes or ():
            self._attach(change)
        if not most:
            return []
        waiting = _poll()
        waiting.register(self._reader, select.POLLIN)
        if not waiting.poll(None if timeout is None else timeout * 1000):
            return []
        os.read(self._reader, 1)
        return [self._events.pop(0)]

    def close(self) -> None:
        """Close the queue. A second call does nothing."""
        if self._reader >= 0:
            os.write(self._end, b"!")
            for watch in self._watches:
                watch.join()
            for fd in (self._reader, self._writer, self._ended, self._end):
                os.close(fd)
            self._reader = -1

    def _attach(self, change: Kevent) -> None:
        if change.filter != EVFILT_PROC or not change.fflags & NOTE_EXIT:
            raise OSError(errno.ENOTSUP, "this emulation knows NOTE_EXIT alone")
        try:
            if change.fflags & NOTE_EXITSTATUS:
                os.kill(change.ident, 0)
            assert _pidfd_open is not None
            pidfd = _pidfd_open(change.ident)
        except PermissionError:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES)) from None
        waiting = _poll()
        waiting.register(pidfd, select.POLLIN)
        if waiting.poll(0):
            os.close(pidfd)
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        waiting.register(self._ended, select.POLLIN)
        watch = threading.Thread(target=self._watch, args=(change, pidfd, waiting), daemon=True, name="kqueue")
        watch.start()
        self._watches.append(watch)

    def _watch(self, change: Kevent, pidfd: int, waiting: Any) -> None:
        ended = self._ended in dict(waiting.poll())
        status = None
        if not ended:
            if change.fflags & NOTE_EXITSTATUS:
                status = _exit_status(pidfd)
            waiting.unregister(pidfd)
            ended = bool(waiting.poll(self._teardown_s * 1000))
        os.close(pidfd)
        if not ended:
            fflags = NOTE_EXIT if status is None else NOTE_EXIT | NOTE_EXITSTATUS
            self._events.append(change._replace(fflags=fflags, data=status or 0))
            os.write(self._writer, b"!")


def _exit_status(pidfd: int) -> int | None:
    """Return the status of wait(2) from PIDFD_GET_INFO (Linux 6.15), reaped or not; ``None`` if there is none."""
    reply = bytearray(64)
    for _ in range(20):
        with suppress(OSError):
            struct.pack_into("=Q", reply, 0, 8)  # PIDFD_INFO_EXIT
            fcntl.ioctl(pidfd, 0xC040FF0B, reply)
            mask, status = struct.unpack_from("=Q52xi", reply)
            if mask & 8:
                return int(status)
        # The status is there once the process is reaped; of a zombie only the parent may ask, by waitid(2).
        with suppress(OSError):
            siginfo = (ctypes.c_int * 32)()
            wnowait, wexited, p_pidfd = 0x01000000, 4, 3
            if ctypes.CDLL("libc.so.6").waitid(p_pidfd, pidfd, siginfo, wnowait | wexited | 1) == 0 and siginfo[4]:
                code, value = siginfo[2], siginfo[6]
                return value << 8 if code == 1 else value | (0x80 if code == 3 else 0)
        time.sleep(0.01)
    return None


def install(library: str) -> None:
    """
    Make this interpreter run as on Darwin; there is no way back.

    Args:
        library: path of the simulated libSystem.
    """
    selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc,assignment]
    for module, names in LACKING.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    if (tempfile := sys.modules.get("tempfile")) is not None:
        tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined]
    # sysconfig looks for the module of the platform that Python was built for.
    os.environ.setdefault(
        "_PYTHON_SYSCONFIGDATA_NAME", f"_sysconfigdata_{sys.abiflags}_linux_{sys.implementation._multiarch}"
    )
    sys.modules["_scproxy"] = _scproxy()
    sys.platform = "darwin"
    platform.mac_ver = lambda *_: ("15.4", ("", "", ""), "arm64")
    _libsystem(library)
    _kqueue()
    _sockets()
    _files()
    usage = resource.getrusage
    resource.getrusage = lambda target: _in_bytes(usage(target))


def enable(library: str, home: Path) -> None:
    """Let every program that this one starts run as on Darwin, with `home` as its user's; and this one."""
    os.environ["HOME"] = str(home)
    _inherit(os.environ, library)
    install(library)
    start = subprocess.Popen.__init__

    def starts(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        if options.get("env") is not None:
            options["env"] = dict(options["env"])
            _inherit(options["env"], library)
        start(self, command, *arguments, **options)

    subprocess.Popen.__init__ = starts  # type: ignore[method-assign,assignment]


def _inherit(environ: MutableMapping[str, str], library: str) -> None:
    """Add to the environment of a program what makes it run as on Darwin."""
    environ[LIBRARY] = library
    here, path = str(Path(__file__).parent), environ.get("PYTHONPATH", "")
    if here not in path.split(os.pathsep):
        environ["PYTHONPATH"] = os.pathsep.join([here, *([path] if path else [])])


def _scproxy() -> types.ModuleType:
    """Return the module that `urllib.request` asks for the proxies of System Settings: none are set."""
    module = types.ModuleType("_scproxy")
    module._get_proxies = dict  # type: ignore[attr-defined]
    module._get_proxy_settings = dict  # type: ignore[attr-defined]
    return module


def _libsystem(library: str) -> None:
    for kind in (ctypes.CDLL, ctypes.PyDLL):
        original = kind.__init__

        def loads(self: Any, name: Any, *arguments: Any, _original: Any = original, **options: Any) -> None:
            _original(self, library if name is None else name, *arguments, **options)

        if "__init__" in vars(kind):
            kind.__init__ = loads  # type: ignore[method-assign]
    raw = ctypes.CDLL(None)
    raw.sim_teardown.argtypes = (ctypes.c_longlong,)
    # The note is sent before the process is a zombie; the thread that sends it here may be late.
    raw.sim_teardown(round(float(os.environ.get(TEARDOWN_MS, "0")) * 1e6) + 300_000_000)


def _kqueue() -> None:
    names: dict[str, Any] = {"kqueue": Kqueue, "kevent": Kevent}
    numbers = {"KQ_FILTER_PROC": EVFILT_PROC, "KQ_EV_ADD": 1, "KQ_NOTE_EXIT": NOTE_EXIT}
    for name, value in (names | numbers).items():
        setattr(select, name, value)


def _sockets() -> None:
    class_ = socket.socket
    getsockopt, setsockopt = class_.getsockopt, class_.setsockopt
    bind, connect, connect_ex = class_.bind, class_.connect, class_.connect_ex

    known = {getattr(socket, name) for name in KNOWN_OPTIONS.split()}

    def is_known(level: int, name: int) -> bool:
        return level != socket.SOL_SOCKET or name in known

    def xnu_getsockopt(self: socket.socket, level: int, name: int, size: int = 0) -> int | bytes:
        if self.family == socket.AF_UNIX and (level, name) == LOCAL_PEERCRED:
            _, uid, gid = struct.unpack("=iII", getsockopt(self, socket.SOL_SOCKET, SO_PEERCRED, 12))
            return struct.pack("=IIhxxI60x", 0, uid, 1, gid)[:size]
        if not is_known(level, name):
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        return getsockopt(self, level, name, size) if size else getsockopt(self, level, name)

    def xnu_setsockopt(self: socket.socket, level: int, name: int, *value: Any) -> None:
        if not is_known(level, name):
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        setsockopt(self, level, name, *value)

    def with_address(call: Any) -> Any:
        def checked(self: socket.socket, address: Any) -> Any:
            if self.family == socket.AF_UNIX:
                path = os.fsencode(address)
                if path[:1] == b"\0":
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))  # no abstract namespace
                if len(path) >= SUN_PATH:
                    raise OSError("AF_UNIX path too long")
            return call(self, address)

        return checked

    class_.getsockopt = xnu_getsockopt  # type: ignore[method-assign,assignment]
    class_.setsockopt = xnu_setsockopt  # type: ignore[method-assign,assignment]
    class_.bind = with_address(bind)  # type: ignore[method-assign]
    class_.connect = with_address(connect)  # type: ignore[method-assign]
    class_.connect_ex = with_address(connect_ex)  # type: ignore[method-assign]


def _files() -> None:
    def hidden(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        name = os.fsdecode(path)
        return name in HIDDEN or name.startswith(tuple(f"{each}/" for each in HIDDEN))

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.listdir", "os.scandir", "os.chdir") or not hidden(arguments[0]):
            return
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("psutil"):  # the judge of some tests; on macOS it asks libproc
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])

    def with_path(call: Any) -> Any:
        def checked(path: Any, *arguments: Any, **options: Any) -> Any:
            if hidden(path) and not sys._getframe(1).f_globals.get("__name__", "").startswith("psutil"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return call(path, *arguments, **options)

        return checked

    fchmod = os.fchmod

    def xnu_fchmod(fd: int, mode: int) -> None:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # fchmod1, bsd/vfs/vfs_syscalls.c: vnodes alone
        fchmod(fd, mode)

    sys.addaudithook(refuse)
    follows = os.supports_follow_symlinks, os.supports_dir_fd
    for name in ("stat", "lstat", "readlink", "access"):
        call = getattr(os, name)
        checked = with_path(call)
        setattr(os, name, checked)
        for supported in follows:
            if call in supported:
                supported.add(checked)
    os.fchmod = xnu_fchmod


def _in_bytes(usage: Any) -> Any:
    """Return `usage` with ``ru_maxrss`` in bytes, as XNU reports it (bsd/kern/kern_resource.c)."""
    fields = list(usage)
    fields[2] *= 1024
    return resource.struct_rusage(fields)
