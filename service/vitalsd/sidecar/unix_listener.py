"""Open the Unix socket of a sidecar: a file of mode 0600 that the sidecar makes, and removes again."""

import os
import socket
import stat
from contextlib import suppress
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
from vitalsd.sidecar.listen_errors import ListenError
from vitalsd.sidecar.tcp_listener import BACKLOG

__all__ = ["UnixListener", "default_unix_listener"]


class UnixListener:
    """
    Listen on a Unix socket with mode 0600, which this process makes and removes again.

    The socket of a sidecar that died is replaced. The socket of a live process, or any other file at `path`, stays as
    it is. A missing directory is made with access for this user alone.

    Raises:
        ListenError: the sidecar cannot listen there.
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
            os.chmod(path, 0o600)  # before listen: no client can have connected yet
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.close()
            raise ListenError(f"cannot listen on {path}: {error.strerror}") from None
        except ListenError:
            self.close()
            raise

    def _clear(self) -> None:
        """Remove what is at the path, if it is a socket of this user that no process has open."""
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

    def close_in_child(self) -> None:
        """Close the socket in a forked child; its file stays the parent's."""
        self.socket.close()
        self._lock.close()

    def __enter__(self) -> "UnixListener":
        """Return this listener, which is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, see `close`."""
        self.close()


def _check_directory(path: Path) -> None:
    """Refuse a directory where another user could put a socket in the place of ours."""
    found = os.stat(path)
    if found.st_uid not in (0, os.geteuid()):
        raise ListenError(f"{path} belongs to user {found.st_uid}, which could replace a socket in it")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise ListenError(f"{path} may be written by other users, which could replace a socket in it")


def default_unix_listener(directory: Path, notes: list[str] | None) -> UnixListener | None:
    """
    Open the Unix socket in `directory`, or else in another runtime directory of this user.

    A home may be on a file system without sockets (SMB, vboxsf, some FUSE), or have too long a path.

    Args:
        directory: the preferred directory of runtime files.
        notes: if there can be no socket, the reason is added here and `None` is returned; ``None``: raise instead.

    Raises:
        ListenError: there can be no socket, and `notes` is ``None``.
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
