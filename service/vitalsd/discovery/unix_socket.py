"""
Create sockets, and examine the file of a Unix socket: which sidecar owns it, and which process answers there.

Of the standard library alone: clients import this without the service.
"""

import _socket
import errno
import fcntl
import os
import socket
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitalsd.discovery.directories import EndpointError

__all__ = ["ELSEWHERE", "SocketLock", "answers", "direct_socket", "peer_uid"]

if TYPE_CHECKING:
    _Standard = socket.socket
else:
    # A host may have replaced that name before; eventlet makes a copy of the class, so it is the first one.
    _Standard = next(each for each in _socket.socket.__subclasses__() if each.__module__ == "socket")

OF_GREENLETS = ("gevent", "eventlet")
"""Packages that replace `socket.socket` so that other greenlets run while one waits."""
ELSEWHERE = "name another socket with --uds (in Python uds=)"
"""What a user can do where another file or process is in the way."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Of flock(2) where the file system has no locks, such as NFS without its daemon."""


class SocketLock:
    """
    The lock of the socket at `path`, held for as long as a sidecar owns that socket.

    A connect alone does not tell a dead socket from one whose owner is between bind and listen. The
    lock file goes with the lock; the kernel lets go of it when the owner dies.

    Raises:
        EndpointError: another process holds it, or what is at its path is not a file of this user.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = f"{path}.lock"
        self._fd = -1
        while self._fd < 0:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            except OSError:
                self._check_owner(path)
                raise
            try:
                self._check_owner(path)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it before us may have removed the file that we have open.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.lstat(self._path)):
                        self._fd = fd
            except BlockingIOError:
                raise EndpointError(f"another sidecar is serving on {path}; stop it, or {ELSEWHERE}") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._fd = fd  # A file system without locks: whether a connection is accepted must do.
            finally:
                if self._fd < 0:
                    os.close(fd)

    def _check_owner(self, path: Path) -> None:
        """Raise `EndpointError` if what is there is not a regular file of this user: others could keep us waiting."""
        try:
            found = os.lstat(self._path)
        except OSError:
            return
        what = (
            f"belongs to user {found.st_uid}"
            if found.st_uid != os.geteuid()
            else "is not a regular file"
            if not stat.S_ISREG(found.st_mode)
            else None
        )
        if what is not None:
            raise EndpointError(
                f"{self._path} {what}, so the lock of {path} cannot be taken; remove it, or {ELSEWHERE}"
            )

    def release(self) -> None:
        """Let go of it and remove its file."""
        if self._fd >= 0:
            with suppress(OSError):
                os.unlink(self._path)
        self.forget()

    def forget(self) -> None:
        """Close it in a forked child: the parent goes on holding it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def answers(path: Path) -> bool:
    """
    Somebody accepts connections on the socket at `path`, or may do so.

    Only a refusal, or no socket there, is a no; a full backlog or a missing permission is not.
    """
    with direct_socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True


def direct_socket(family: int, proto: int = 0) -> socket.socket:
    """
    Return a stream socket that connects to where it is told, whatever the host program has put in its place.

    A host replaces ``socket.socket``, by that of PySocks for instance, so that all of its connections go through a
    proxy; there is none on the way to a sidecar. What gevent and eventlet put there is used: a greenlet that waited
    otherwise would hold up the sidecar in the same thread.

    Raises:
        OSError: there are no descriptors left, or the family is not known.
    """
    kinds = getattr(socket.socket, "__mro__", ())
    kind = next((each for each in kinds if each.__module__.partition(".")[0] in OF_GREENLETS), _Direct)
    made: socket.socket = kind(family, socket.SOCK_STREAM, proto)
    return made


class _Direct(_Standard):
    """A socket whose accepted connections are of the standard library as well: its own takes ``socket.socket``."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection that does not block only if the listener does not, and the address of its client."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        connection = _Standard(self.family, self.type, self.proto, fileno=fd)
        connection.setblocking(self.gettimeout() != 0)
        return connection, address


def peer_uid(connected: socket.socket) -> int:
    """
    The user at the other end of a Unix socket, as of connect(2) or listen(2) there.

    Linux: struct ucred of SO_PEERCRED (unix(7)): pid, uid, gid. macOS: struct xucred of
    LOCAL_PEERCRED (bsd/sys/ucred.h): version, uid, groups.

    Raises:
        OSError: nobody can tell.
    """
    if sys.platform == "darwin":
        sol_local, local_peercred, size = 0, 1, 76
        _, uid = struct.unpack_from("=II", connected.getsockopt(sol_local, local_peercred, size))
        return int(uid)
    _, uid, _ = struct.unpack("=iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)
