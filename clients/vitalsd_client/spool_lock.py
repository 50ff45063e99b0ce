"""Lock a report in the spool for one sender at a time; without file locks, for one thread of a process."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["SpoolError", "locked"]

NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF))
"""Errors of flock(2) on file systems without locks, such as NFS without lockd and some of FUSE."""

_claims: dict[tuple[int, int, int], object] = {}
"""Reports that a thread of this process is sending, by pid, device and inode: on a file system without locks this alone
keeps two threads from sending one report. A forked child has another pid, so it inherits no claim."""


class SpoolError(Exception):
    """Report that the spool cannot keep or return a report; ``str(error)`` is the reason."""


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO | None]:
    """
    Open and lock the file at `path`, and yield it; ``None``: another sender has the lock, or the file is removed.

    On a file system without locks only the other threads of this process are excluded.

    Raises:
        SpoolError: flock(2) failed for another reason.
    """
    try:
        found = os.lstat(path)
    except OSError:
        yield None
        return
    # Claim it before opening it: on NFS the process owns the lock, and loses it when any thread closes the file.
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
    """Return the open file; ``None``: it cannot be opened. NFS locks only a file that is open for writing."""
    for mode in os.O_RDWR, os.O_RDONLY:
        with suppress(OSError):
            return os.fdopen(os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    return None


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock the file if its file system has locks; return whether it still is ours at `path`. Raises `SpoolError`."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: from fcntl(2), which NFS uses for it
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
