"""
The sockets a sidecar listens on: TCP, a Unix socket of its own, and those inherited from a supervisor.

Each is made here and not by the HTTP server, which would make the Unix socket writable by
everybody, take over a live one, and learn of a busy port only in its own thread.
"""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from vitalsd.discovery.directories import (
    EndpointError,
    check_socket_path,
    private_directory,
    runtime_directories,
    socket_name,
)
from vitalsd.discovery.unix_socket import ELSEWHERE, SocketLock, answers, direct_socket
from vitalsd.sidecar.config import DEFAULT_PORT

__all__ = [
    "BACKLOG",
    "ListenError",
    "Listeners",
    "NoAddress",
    "PortInUse",
    "UnixListener",
    "adopt",
    "bind_tcp",
    "inherited",
    "is_remote",
    "listen",
]

LOOPBACK, LOOPBACK_6 = "127.0.0.1", "::1"
PAIR_TRIES = 8
"""Free ports of 127.0.0.1 that are tried until one is free on ::1 too."""
BACKLOG = 64
"""Kept small: without free descriptors asyncio retries the whole backlog at once, a traceback each."""


class ListenError(Exception):
    """It cannot be listened there; ``str(error)`` says why in a sentence."""


class PortInUse(ListenError):
    """Somebody else listens on the port."""


class NoAddress(ListenError):
    """The machine has no such address: IPv6 is off, for example."""


def is_remote(host: str) -> bool:
    """
    Whether a listener on `host` could be reached from another machine.

    Raises:
        ListenError: `host` is neither an address nor ``localhost``.
    """
    return not _address(host).is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
    except ValueError:
        raise ListenError(f"{host} is not an IP address; give one such as {LOOPBACK}") from None


def bind_tcp(host: str, port: int) -> socket.socket:
    """
    A listening TCP socket; `port` 0 takes a free one.

    `proto` is given because asyncio switches off Nagle's algorithm only for a listener that says
    TCP; without it every answer on a kept connection waits 40 ms for an acknowledgement.

    Raises:
        PortInUse: the port is taken.
        NoAddress: this machine has no such address.
        ListenError: any other refusal.
    """
    address = _address(host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        listener = direct_socket(family, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((str(address), port))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {address} is in use") from None
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise NoAddress(f"this machine has no address {address}: {error.strerror}") from None
        raise ListenError(f"cannot listen on {address} port {port}: {error.strerror}") from None
    return listener


class UnixListener:
    """
    A listening Unix socket with mode 0600 that this process made, and removes again.

    A socket left by a sidecar that died is replaced; that of a live one, or anything else at `path`,
    is never touched. A missing directory is made private.

    Raises:
        ListenError: it cannot be listened there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_socket_path(path)
            if not path.parent.exists():
                private_directory(path.parent)
            _check_directory(path.parent)
            self._lock = SocketLock(path)
        except EndpointError as error:
            raise ListenError(str(error)) from None
        except OSError as error:
            raise ListenError(f"cannot listen on {path}: {error.strerror}") from None
        try:
            self.socket = direct_socket(socket.AF_UNIX)
            self._clear()
            with suppress(OSError):
                os.fchmod(self.socket.fileno(), 0o600)  # Linux: bind makes it with this mode; macOS refuses
            self.socket.bind(str(path))
            self._inode = os.lstat(path)
            os.chmod(path, 0o600)  # before listen: nobody can have connected yet
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.close()
            raise ListenError(f"cannot listen on {path}: {error.strerror}") from None
        except ListenError:
            self.close()
            raise

    def _clear(self) -> None:
        """Make way for the socket, if what is there is one of this user that no process has open."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if found.st_uid != os.geteuid():
            raise ListenError(
                f"{self.path} exists and belongs to user {found.st_uid}; it is left alone: remove it, or {ELSEWHERE}"
            )
        if not stat.S_ISSOCK(found.st_mode):
            raise ListenError(f"{self.path} exists and is not a socket; it is left alone: move it away, or {ELSEWHERE}")
        if answers(self.path):
            raise ListenError(f"{self.path} is in use by another process of yours; end it, or {ELSEWHERE}")
        os.unlink(self.path)

    def close(self) -> None:
        """Stop listening and remove the socket file, if it is still ours. A second call does nothing."""
        with suppress(OSError, AttributeError):  # as far as it was made
            self.socket.close()
            if os.path.samestat(self._inode, os.lstat(self.path)):
                os.unlink(self.path)
        self._lock.release()

    def forget(self) -> None:
        """Close it in a forked child, and leave everything to the parent."""
        self.socket.close()
        self._lock.forget()

    def __enter__(self) -> "UnixListener":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_directory(path: Path) -> None:
    """Refuse a directory where another user could put a socket in the place of ours."""
    found = os.stat(path)
    if found.st_uid not in (0, os.geteuid()):
        raise ListenError(f"{path} belongs to user {found.st_uid}, who could replace a socket in it")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise ListenError(f"{path} may be written by other users, who could replace a socket in it")


def inherited(fd: int) -> socket.socket:
    """
    The listener that a supervisor passed as descriptor `fd`.

    Not `socket.fromfd`, and with `proto` named: macOS cannot tell it from the descriptor, and asyncio
    would leave Nagle's algorithm on.

    Raises:
        ListenError: it is not a listening stream socket, as far as the kernel reports that.
    """
    try:
        os.set_inheritable(fd, False)
        found = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(f"descriptor {fd} is not a socket: {error.strerror}") from None
    if found.type != socket.SOCK_STREAM or not _may_listen(found):
        found.close()
        raise ListenError(f"descriptor {fd} is not a listening stream socket")
    if found.family in (socket.AF_INET, socket.AF_INET6):
        return socket.socket(found.family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())
    return found


def _may_listen(stream: socket.socket) -> bool:
    """
    Return whether an inherited stream socket listens, as far as the kernel reports it.

    Platform limit: XNU has no getsockopt(SO_ACCEPTCONN) and returns ENOPROTOOPT (sogetoptlock, bsd/kern/uipc_socket.c
    of xnu-11417). There a connected socket is refused and the supervisor is trusted for the rest: a second listen(2)
    would replace its backlog, and on failure end the listening (solisten, the same file).
    """
    try:
        return bool(stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return False
    try:
        stream.getpeername()
    except OSError:
        return True
    return False


@dataclass(slots=True)
class Listeners:
    """The sockets of one sidecar."""

    tcp: list[socket.socket] = field(default_factory=list)
    unix: UnixListener | None = None
    others: list[socket.socket] = field(default_factory=list)
    """Unix sockets that a supervisor made, and removes."""
    notes: list[str] = field(default_factory=list)
    """What is other than was to be expected, in sentences for the user."""

    @property
    def sockets(self) -> list[socket.socket]:
        return [*self.tcp, *self.others, *([self.unix.socket] if self.unix else [])]

    @property
    def socket_path(self) -> str | None:
        if self.unix is not None:
            return str(self.unix.path)
        return next((str(name) for each in self.others if (name := each.getsockname())), None)

    @property
    def address(self) -> tuple[str, int] | tuple[None, None]:
        """Host and port over TCP, of IPv4 if it listens there; ``None`` for both without TCP."""
        first = min(self.tcp, key=lambda each: each.family != socket.AF_INET, default=None)
        return (None, None) if first is None else first.getsockname()[:2]

    def close(self) -> None:
        """Close all of them. A second call does nothing."""
        for each in (*self.tcp, *self.others):
            each.close()
        if self.unix is not None:
            self.unix.close()

    def forget(self) -> None:
        """Close them in a forked child, and leave the socket's file to the parent."""
        for each in (*self.tcp, *self.others):
            each.close()
        if self.unix is not None:
            self.unix.forget()


def listen(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    tcp: bool = True,
    uds: str | Path | None = None,
    directory: Path | None = None,
    guarded: bool = False,
    allow_remote: bool = False,
) -> Listeners:
    """
    Open the listeners of a sidecar.

    Args:
        host: TCP address; with 127.0.0.1 the same port of ::1 is held too, where it can be had.
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        tcp: whether to listen on TCP at all.
        uds: path of the Unix socket; ``None`` puts it into `directory`.
        directory: of the runtime files; ``None``: no Unix socket unless `uds` names one.
        guarded: a token will be asked for.
        allow_remote: another machine may connect; it needs `guarded` too.

    Raises:
        PortInUse: the port that was asked for is taken.
        ListenError: any other reason. Nothing is left open.
    """
    listeners = Listeners()
    try:
        if tcp:
            if is_remote(host):
                if not (guarded and allow_remote):
                    raise _unguarded(host)
                listeners.notes.append(_unencrypted(host))
            listeners.tcp += _bind_tcp(host, port, listeners.notes)
        if uds is not None:
            listeners.unix = UnixListener(Path(os.path.abspath(uds)))
        elif directory is not None:
            listeners.unix = _default_unix(directory, listeners.notes if tcp else None)
        if not listeners.sockets:
            raise ListenError("there is nothing to listen on: no TCP, and no directory for a Unix socket")
    except BaseException:
        listeners.close()
        raise
    return listeners


def adopt(sockets: Sequence[socket.socket], *, guarded: bool, allow_remote: bool) -> Listeners:
    """
    The listeners that a supervisor made.

    Raises:
        ListenError: other machines could reach one of them, and that was not allowed.
    """
    unix = [each for each in sockets if each.family == socket.AF_UNIX]
    tcp = [each for each in sockets if each.family != socket.AF_UNIX]
    remote = [each.getsockname()[0] for each in tcp if is_remote(each.getsockname()[0])]
    if remote and not (guarded and allow_remote):
        for each in sockets:
            each.close()
        raise _unguarded(remote[0])
    return Listeners(tcp=tcp, others=unix, notes=[_unencrypted(host) for host in remote])


def _unguarded(host: str) -> ListenError:
    return ListenError(
        f"{host} can be reached from other machines; that needs both --auth token and --allow-remote"
        ' (in Python auth="token", allow_remote=True)'
    )


def _unencrypted(host: str) -> str:
    return f"{host} can be reached from other machines, and nothing is encrypted"


def _default_unix(directory: Path, notes: list[str] | None) -> UnixListener | None:
    """
    Open the Unix socket in `directory`, or else in another runtime directory of this user.

    A home may be on a file system that makes no sockets (SMB, vboxsf, some FUSE), or have too long a path.

    Args:
        notes: the reason is added here if there can be none; ``None``: that is an error.

    Raises:
        ListenError: there can be none, and there is no other listener.
    """
    reasons: list[str] = []
    for candidate in dict.fromkeys((directory, *runtime_directories())):
        try:
            if candidate != directory:
                private_directory(candidate)
            return UnixListener(candidate / socket_name(os.getpid()))
        except (ListenError, EndpointError) as error:
            reasons.append(str(error))
    if notes is None:
        raise ListenError("; ".join(reasons))
    notes.append(f"no Unix socket: {'; '.join(reasons)}")
    return None


def _bind_tcp(host: str, port: int | None, notes: list[str]) -> list[socket.socket]:
    if port is not None:
        return _bind(host, port, notes)
    try:
        return _bind(host, DEFAULT_PORT, notes)
    except PortInUse as error:
        notes.append(f"{error}; taking a free one")
        return _bind(host, 0, notes)


def _bind(host: str, port: int, notes: list[str]) -> list[socket.socket]:
    """
    Bind `host`, and with 127.0.0.1 also ::1.

    Clients that look up ``localhost`` may try ::1 first. If another user listened there, that user would get their
    requests, with the token that some of them send. A port that is free on 127.0.0.1 alone is used all the same: it
    is the address that documents and the runtime file name.
    """
    if _address(host) != _address(LOOPBACK):
        return [bind_tcp(host, port)]
    passed_over: list[socket.socket] = []
    """Open until the end, so that the kernel gives another port at the next try."""
    try:
        for _ in range(PAIR_TRIES if port == 0 else 1):
            try:
                listener = bind_tcp(host, port)
            except PortInUse:
                if not passed_over:
                    raise
                break
            number = listener.getsockname()[1]
            try:
                return [listener, bind_tcp(LOOPBACK_6, number)]
            except NoAddress:
                return [listener]
            except PortInUse:
                reason = "is held by another process"
                passed_over.append(listener)
            except ListenError as error:
                reason = f"cannot be held ({error})"
                passed_over.append(listener)
                break
        listener = passed_over.pop()
        number = listener.getsockname()[1]
        notes.append(
            f"[{LOOPBACK_6}]:{number} {reason}, so http://localhost:{number} may lead to another program;"
            f" use http://{LOOPBACK}:{number}"
        )
        return [listener]
    finally:
        for each in passed_over:
            each.close()
