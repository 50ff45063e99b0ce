"""
Read or create the key of this user with which `vitalsd.sources.programs` makes digests of programs.

The key is in the state directory, so that all sidecars and clients of one user make the same digests. No report
contains it, so that the receiver of a report cannot find the path of a program by trying likely ones.
"""

import os
import secrets
import stat
from pathlib import Path

from vitalsd.discovery.atomic_file import draft
from vitalsd.discovery.directories import EndpointError, state_directory

__all__ = ["program_key"]

FILE = "program.key"
KEY_BYTES = 32


def program_key(directory: Path | None = None) -> bytes | None:
    """
    Return the key; create it if there is none.

    Args:
        directory: contains the file of the key; default: the state directory.

    Returns:
        32 bytes; ``None`` if the file can be neither read nor created, or is not a private file of this user.
    """
    try:
        path = (state_directory() if directory is None else directory) / FILE
        return _read(path) or _make(path)
    except (EndpointError, OSError):
        return None


def _read(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{path} is not a private file of this user")
        key = file.read(KEY_BYTES + 1)
    return key if len(key) == KEY_BYTES else None


def _make(path: Path) -> bytes | None:
    """Write a new key, or read the key that another process has written meanwhile."""
    temporary = path.with_name(f".{FILE}.{secrets.token_hex(8)}.tmp")
    with draft(temporary, secrets.token_bytes(KEY_BYTES)):
        try:
            os.link(temporary, path, follow_symlinks=False)
        except FileExistsError:
            if _read(path) is None:  # of another length, because a file system lost its content
                os.rename(temporary, path)
        except OSError:  # a file system without links
            os.rename(temporary, path)
    return _read(path)
