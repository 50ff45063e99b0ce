"""
Create sockets, lock the path of a Unix socket, and find out whether a process answers there and of which user.

This module imports only the standard library, because clients import it without the service.
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
    # The host may have replaced ``socket.socket`` already. eventlet copies the class, so the first one is the original.
    _Standard = next(each for each in _socket.socket.__subclasses__() if each.__module__ == "socket")

OF_GREENLETS = ("gevent", "eventlet")
"""Packages that replace `socket.socket` so that other greenlets run while one waits."""
ELSEWHERE = "name another socket with --uds (in Python uds=)"
"""The remedy in errors about a path that another file or process occupies."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Errors of flock(2) on a file system without locks, such as NFS without its lock daemon."""


class SocketLock:
    """
    The lock of the socket at `path`, which a sidecar holds as long as it owns that socket.

    It exists because connect(2) fails in the same way for a dead socket and for one with an owner between bind(2) and
    listen(2). The lock file is removed with the lock; the kernel releases the lock when the owner dies.

    Raises:
        EndpointError: another process holds the lock, or the lock file is not a regular file of this user.
        OSError: the lock file cannot be created.
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
                # The process that held the lock before may have removed the file that we have open.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.lstat(self._path)):
                        self._fd = fd
            except BlockingIOError:
                raise EndpointError(f"another sidecar is serving on {path}; stop it, or {ELSEWHERE}") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._fd = fd  # A file system without locks: the caller relies on connect(2) alone.
            finally:
                if self._fd < 0:
                    os.close(fd)

    def _check_owner(self, path: Path) -> None:
        """Raise `EndpointError` unless the lock file is a regular file of this user: others could keep it locked."""
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
        """Release the lock and remove its file."""
        if self._fd >= 0:
            with suppress(OSError):
                os.unlink(self._path)
        self.close()

    def close(self) -> None:
        """Close the file without removing it; in a forked child, because the parent still holds the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def answers(path: Path) -> bool:
    """
    Return whether a process accepts connections on the socket at `path`, or may do so.

    False only if the connection is refused or there is no socket; True for a full backlog or a missing permission.
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
    Return a stream socket that connects directly, even if the host program has replaced ``socket.socket``.

    A host replaces it, by that of PySocks for instance, to send its connections through a proxy, which is wrong for a
    sidecar. The sockets of gevent and eventlet are used, because a greenlet that waited on another socket would block
    the sidecar in the same thread.

    Raises:
        OSError: there are no descriptors left, or the family is not known.
    """
    kinds = getattr(socket.socket, "__mro__", ())
    kind = next((each for each in kinds if each.__module__.partition(".")[0] in OF_GREENLETS), _Direct)
    made: socket.socket = kind(family, socket.SOCK_STREAM, proto)
    return made


class _Direct(_Standard):
    """A socket that accepts connections of the standard library; the inherited `accept` makes ``socket.socket``."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection that does not block only if the listener does not, and the address of its client."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        connection = _Standard(self.family, self.type, self.proto, fileno=fd)
        connection.setblocking(self.gettimeout() != 0)
        return connection, address


def peer_uid(connected: socket.socket) -> int:
    """
    Return the user id at the other end of a Unix socket, as of its connect(2) or listen(2).

    Linux: struct ucred of SO_PEERCRED (unix(7)): pid, uid, gid. macOS: struct xucred of
    LOCAL_PEERCRED (bsd/sys/ucred.h): version, uid, groups.

    Raises:
        OSError: the kernel does not report it.
    """
    if sys.platform == "darwin":
        sol_local, local_peercred, size = 0, 1, 76
        _, uid = struct.unpack_from("=II", connected.getsockopt(sol_local, local_peercred, size))
        return int(uid)
    _, uid, _ = struct.unpack("=iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)
