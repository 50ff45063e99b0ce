"""
Where the files of this user are: runtime files and sockets, and what outlives a reboot.

Nothing is trusted that others may have put there. Of the standard library alone: clients import this
without the service.
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
"""Bytes of a Unix socket's path; sun_path holds one more, the NUL."""


class EndpointError(Exception):
    """A runtime file, a socket or a directory cannot be trusted or used; ``str(error)`` says why in a sentence."""


def runtime_directories(environ: Mapping[str, str] | None = None) -> list[Path]:
    """
    Where runtime files may be, the preferred place first. Nothing is created or checked.

    ``VITALSD_RUNTIME_DIR`` stands alone. Otherwise a sidecar started in a login session and a client
    started by cron see different environments, so a client looks in all of these.
    """
    environ = os.environ if environ is None else environ
    if given := environ.get("VITALSD_RUNTIME_DIR"):
        return [Path(os.path.abspath(given))]
    found: list[Path] = []
    if sys.platform == "darwin":
        found += [home / "Library/Application Support/vitalsd/run" for home in _homes(environ)]
        # Per user on macOS, and short enough for a socket where the home's path is not.
        found += [Path(base) / "vitalsd" for base in (environ.get("TMPDIR", ""),) if _private(base)]
    else:
        for base in (environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.geteuid()}"):
            if os.path.isabs(base) and _owned(base):
                found.append(Path(base) / "vitalsd")
        found += [home / ".local/state/vitalsd/run" for home in _homes(environ)]
    return list(dict.fromkeys(found))


def runtime_directory(environ: Mapping[str, str] | None = None) -> Path:
    """
    Return the directory for this user's runtime files and sockets, made if need be.

    A directory with a path too long for a socket is used only if there is no other.

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
    for path in too_long:  # A runtime file fits there, if no socket does.
        try:
            return private_directory(path)
        except EndpointError as error:
            reasons.append(str(error))
    raise EndpointError("; ".join(reasons) or "no home directory of this user; set VITALSD_RUNTIME_DIR")


def state_path(environ: Mapping[str, str] | None = None) -> Path:
    """
    Where what outlives a reboot is kept. Nothing is created or checked.

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
    The directory for what outlives a reboot, made if need be.

    Raises:
        EndpointError: it cannot be made, or others may write it.
    """
    path = state_path(environ)
    try:
        return private_directory(path)
    except EndpointError as error:
        raise EndpointError(f"{error}; set VITALSD_STATE_DIR to use another") from None


def private_directory(path: Path) -> Path:
    """
    Make `path` (mode 0700) or check that it is a directory of ours that nobody else can enter.

    An empty one of ours that others may read is closed to them. One with something in it is refused: it may be
    there for them; and so is one that they may write, for it may hold their files already.

    Raises:
        EndpointError: it is a symlink, not a directory, somebody else's, writable by others, not empty and
            open to others, or cannot be made.
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
        os.chmod(path, 0o700)  # a strange umask may have taken our own bits away


def _owned(path: str) -> bool:
    """
    A directory of this user's. Under ``sudo -E`` or ``su`` the environment still names another
    user's, where ours would be in the way of theirs.
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
    """File name of the Unix socket of the sidecar `pid`."""
    return f"metrics-{pid}.sock"


def agent_socket(directory: Path) -> Path:
    """
    The Unix socket that launchd or systemd listens on for the background agent.

    `sweep` does not know the name on purpose: to probe this socket would start the agent.
    """
    return directory / "agent.sock"


def check_socket_path(path: Path) -> None:
    """Raises `EndpointError`: `path` does not fit into a socket address."""
    if (size := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise EndpointError(f"{path} is {size} bytes long and a socket's path may have {MAX_SOCKET_PATH}")
