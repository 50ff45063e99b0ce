"""
Find the directories of this user: for runtime files and sockets, and for state that outlives a reboot.

No directory is trusted in which another user can write. This module imports only the standard library, because clients
import it without the service.
"""

import os
import pwd
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = [
    "MAX_SOCKET_PATH",
    "EndpointError",
    "agent_socket",
    "check_socket_path",
    "private_directory",
    "runtime_directories",
    "runtime_directory",
    "socket_name",
    "state_directory",
    "state_path",
]

MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket, bytes; sun_path of the kernel has one byte more, for the NUL."""


class EndpointError(Exception):
    """A runtime file, a socket or a directory cannot be trusted or used; ``str(error)`` states why in a sentence."""


def runtime_directories(environ: Mapping[str, str] | None = None) -> list[Path]:
    """
    Return the directories in which runtime files may be, the preferred one first; create and check none.

    If ``VITALSD_RUNTIME_DIR`` is set, it is the only one. Otherwise a client looks in all of them, because a sidecar
    that is started in a login session and a client that is started by cron have different environments.
    """
    environ = os.environ if environ is None else environ
    if given := environ.get("VITALSD_RUNTIME_DIR"):
        return [Path(os.path.abspath(given))]
    found: list[Path] = []
    if sys.platform == "darwin":
        found += [home / "Library/Application Support/vitalsd/run" for home in _homes(environ)]
        # macOS: one per user, with a path short enough for a socket if that of the home directory is too long.
        found += [Path(base) / "vitalsd" for base in (environ.get("TMPDIR", ""),) if _private(base)]
    else:
        for base in (environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.geteuid()}"):
            if os.path.isabs(base) and _owned(base):
                found.append(Path(base) / "vitalsd")
        found += [home / ".local/state/vitalsd/run" for home in _homes(environ)]
    return list(dict.fromkeys(found))


def runtime_directory(environ: Mapping[str, str] | None = None) -> Path:
    """
    Return the directory for this user's runtime files and sockets; create it if it does not exist.

    A directory with a path too long for a socket is used only if no other can be.

    Raises:
        EndpointError: none of the candidates can be used.
    """
    reasons = []
    too_long: list[Path] = []
    for path in runtime_directories(environ):
        try:
            check_socket_path(path / socket_name(2**22))
        except EndpointError:
            too_long.append(path)
            continue
        try:
            return private_directory(path)
        except EndpointError as error:
            reasons.append(str(error))
    for path in too_long:  # Too long for a socket, and usable for a runtime file.
        try:
            return private_directory(path)
        except EndpointError as error:
            reasons.append(str(error))
    raise EndpointError("; ".join(reasons) or "no home directory of this user; set VITALSD_RUNTIME_DIR")


def state_path(environ: Mapping[str, str] | None = None) -> Path:
    """
    Return the directory for state that outlives a reboot; do not create or check it.

    Raises:
        EndpointError: this user has no home directory.
    """
    environ = os.environ if environ is None else environ
    if given := environ.get("VITALSD_STATE_DIR"):
        return Path(os.path.abspath(given))
    if sys.platform != "darwin" and os.path.isabs(base := environ.get("XDG_STATE_HOME", "")) and _owned(base):
        return Path(base) / "vitalsd"
    for home in _homes(environ):
        return home / ("Library/Application Support/vitalsd" if sys.platform == "darwin" else ".local/state/vitalsd")
    raise EndpointError("no home directory of this user; set VITALSD_STATE_DIR")


def state_directory(environ: Mapping[str, str] | None = None) -> Path:
    """
    Return the directory for state that outlives a reboot; create it if it does not exist.

    Raises:
        EndpointError: the directory cannot be created or used, see `private_directory`.
    """
    path = state_path(environ)
    try:
        return private_directory(path)
    except EndpointError as error:
        raise EndpointError(f"{error}; set VITALSD_STATE_DIR to use another") from None


def private_directory(path: Path) -> Path:
    """
    Create `path` with mode 0700, or check that it is a directory that only this user can enter.

    An empty directory of this user that other users may read gets mode 0700. One that is not empty is refused, because
    its files may be meant for them. One that they may write is refused, because it may already have files of theirs.

    Raises:
        EndpointError: `path` is a symlink, is not a directory, belongs to another user, is writable by other users, is
            not empty and open to other users, or cannot be created.
    """
    try:
        _make(path)
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            raise EndpointError(f"{path} is a symbolic link; a directory of yours is needed")
        if not stat.S_ISDIR(found.st_mode):
            raise EndpointError(f"{path} is not a directory")
        if found.st_uid != os.geteuid():
            raise EndpointError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
        if found.st_mode & 0o022:
            raise EndpointError(f"{path} may be written by other users (mode {stat.S_IMODE(found.st_mode):04o})")
        if found.st_mode & 0o077 and os.listdir(path):
            raise EndpointError(
                f"{path} is open to other users, and what is in it may be for them;"
                f" name a directory that is empty or not there yet, or close it: chmod 700 {path}"
            )
        if found.st_mode & 0o777 != 0o700:
            os.chmod(path, 0o700)
    except OSError as error:
        raise EndpointError(f"cannot use {path}: {error.strerror}") from None
    return path


def _make(path: Path) -> None:
    if path.is_symlink() or path.exists():
        return
    _make(path.parent)
    with suppress(FileExistsError):
        path.mkdir(0o700)
        os.chmod(path, 0o700)  # the umask may have removed permissions of the owner


def _owned(path: str) -> bool:
    """
    Return whether this user owns a directory.

    Under ``sudo -E`` and ``su`` the environment names directories of the other user, and our files there would disturb
    that user's programs.
    """
    try:
        return os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _private(path: str) -> bool:
    return os.path.isabs(path) and _owned(path) and os.stat(path).st_mode & 0o077 == 0


def _homes(environ: Mapping[str, str]) -> Iterator[Path]:
    named = environ.get("HOME", "")
    if os.path.isabs(named) and _owned(named):
        yield Path(named)
        return
    with suppress(KeyError):
        known = pwd.getpwuid(os.geteuid()).pw_dir
        if _owned(known):
            yield Path(known)


def socket_name(pid: int) -> str:
    """Return the file name of the Unix socket of the sidecar `pid`."""
    return f"metrics-{pid}.sock"


def agent_socket(directory: Path) -> Path:
    """
    Return the path of the Unix socket on which launchd or systemd listens for the background agent.

    `sweep` does not match this name, because a connection to the socket would start the agent.
    """
    return directory / "agent.sock"


def check_socket_path(path: Path) -> None:
    """Raise `EndpointError` if `path` does not fit into a socket address."""
    if (size := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise EndpointError(f"{path} is {size} bytes long and a socket's path may have {MAX_SOCKET_PATH}")
