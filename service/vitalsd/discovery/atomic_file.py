"""
Write files atomically and durably: after a crash of the program a file is complete or absent.

Any program may remove such a file. Its content is written with fsync(2). Platform limit: on macOS fsync(2) returns
before the drive has written its cache, so a power failure may lose the last writes. F_FULLFSYNC waits for the drive,
but takes tens of milliseconds.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["draft", "is_gone", "sync_directory"]


@contextmanager
def draft(path: Path, content: bytes, *, mode: int = 0o600) -> Iterator[None]:
    """
    Write a temporary file, which the body of the context renames or links; remove the rest of it afterwards.

    Args:
        path: the temporary name, which no reader looks for, in the directory of the final name.
        content: written to the disk before the body runs.
        mode: permissions; the umask does not change them.

    Raises:
        OSError: the file could not be written; no part of it is left.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(content)
            file.flush()
            os.fsync(fd)
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)


def is_gone(path: Path) -> bool:
    """Return whether the file was removed; False if it cannot be examined."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


def sync_directory(directory: Path) -> None:
    """Write renames and links in a directory to the disk with fsync(2). Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some file systems do not support it for directories, and do not need it
            raise
    finally:
        os.close(fd)
