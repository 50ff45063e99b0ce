"""Lock a report in the spool, so that one sender at a time has it, on file systems without locks as well."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["SpoolError", "locked"]

NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF))
"""What flock(2) says where the file system has no locks, as NFS without lockd and some of FUSE."""

_claims: dict[tuple[int, int, int], object] = {}
"""The reports that a thread of this process has now, by pid, device and inode: where there are no locks, nothing else
keeps two threads from sending one report. A forked child has another pid, so it inherits no claim."""


class SpoolError(Exception):
    """The spool cannot keep or give the report; ``str(error)`` says why."""


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO | None]:
    """
    Give the file at `path`, opened and locked; ``None`` if another sender has it, or it is there no longer.

    On a file system without locks it keeps out the other threads of this process alone.

    Raises:
        SpoolError: the lock cannot be asked for.
    """
    try:
        found = os.lstat(path)
    except OSError:
        yield None
        return
    # Claimed before it is opened: on NFS the process has the lock, and loses it when any thread closes the file.
    key, claim = (os.getpid(), found.st_dev, found.st_ino), object()
    if _claims.setdefault(key, claim) is not claim:
        yield None
        return
    try:
        file = _opened(path)
        with nullcontext() if file is None else file:
            yield file if file is not None and _lock(file, path) else None
    finally:
        del _claims[key]


def _opened(path: Path) -> BinaryIO | None:
    """Return the open file, or ``None`` if it cannot be opened. To lock it, NFS wants it open for writing."""
    for mode in os.O_RDWR, os.O_RDONLY:
        with suppress(OSError):
            return os.fdopen(os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    return None


def _lock(file: BinaryIO, path: Path) -> bool:
    """Return whether the file is locked now, or cannot be, and still is at `path`. Raises `SpoolError`."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: what fcntl(2) may say, which NFS makes of it
            return False
        if error.errno not in NO_LOCKS:
            raise SpoolError(
                f"cannot lock {path}: {error.strerror}; keep the spool on a file system with flock(2)"
            ) from None
    try:
        # The process that held the lock before may have moved the file on.
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False
