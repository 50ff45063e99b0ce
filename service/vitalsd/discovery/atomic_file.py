"""
Files that are there whole or not at all, also after a crash of the program, and may be removed by anybody.

fsync(2) hands a file to the disk. Platform limit: macOS returns before the drive has written its cache (fsync(2) there;
F_FULLFSYNC, which waits for that, takes tens of milliseconds), so a power failure may lose what was written last.
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
    A new file with `content`, on disk, which the context gives its name; what is left of it then is removed.

    Args:
        path: a name that nobody looks at, in the directory it is meant for.
        mode: whatever the umask.

    Raises:
        OSError: it could not be written; nothing is left.
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
    """Whether somebody has removed it; not if it only cannot be looked at just now."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


def sync_directory(directory: Path) -> None:
    """Hand a rename or link in it to the disk, as `draft` does the content. Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not
            raise
    finally:
        os.close(fd)
