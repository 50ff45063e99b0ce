"""
List the files of one run: its database with SQLite's own two files, and its lock.

Their names come from the identity of the run, never from input. The writer holds the ``.lock`` with flock(2); the
kernel releases it when the writer dies, however it dies. A file is changed or deleted only if `check_own_run`
establishes that vitalsd wrote it.
"""

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

__all__ = [
    "APPLICATION_ID",
    "ForeignRunError",
    "check_own_run",
    "delete_run",
    "disk_bytes",
    "has_run_name",
    "is_being_written",
    "is_of",
    "is_own_run",
    "is_own_writer",
    "new_run",
    "open_regular",
]

MAX_FILES = 1000
"""Number of names that are tried for a new run of one process and one writer."""
APPLICATION_ID = 0x76697461
"""``vita`` in ASCII, in the header of the file, where file(1) shows it."""
RUN_NAME = re.compile(r"[0-9]{1,20}-[0-9]{1,20}-[0-9A-Za-z]{1,8}-([0-9]{1,20})(-[0-9]{1,4})?\.sqlite", re.ASCII)
"""Name of a run: `Identity.start_id`, the pid of the writer, and a number if that name was taken."""
HEADER_BYTES = 100
"""Size of the header of a database file (fileformat2.html of SQLite, section 1.3)."""
MAGIC = b"SQLite format 3\0"
"""First bytes of a database file (fileformat2.html of SQLite, section 1.3.1)."""


class ForeignRunError(Exception):
    """Report that vitalsd did not write the file, so it may not change or delete it; ``str(error)`` is the reason."""


def new_run(directory: Path, stem: str) -> tuple[Path, int]:
    """Make an empty file, named after `stem`; return its path and a descriptor that holds its lock."""
    for number in range(MAX_FILES):
        path = directory / f"{stem}-{number}.sqlite" if number else directory / f"{stem}.sqlite"
        if any(os.path.lexists(part) for part in _sqlite_parts(path)):
            continue  # SQLite would use a log or a journal of that name for the new file
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            lock_fd = os.open(path.with_suffix(".lock"), flags, 0o600)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a socket
                continue
            raise
        try:
            if stat.S_ISREG(os.fstat(lock_fd).st_mode):
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.close(os.open(path, flags | os.O_EXCL, 0o600))
                return path, lock_fd
        except (BlockingIOError, FileExistsError):
            pass
        except OSError:
            os.close(lock_fd)
            raise
        os.close(lock_fd)
    raise OSError(f"{directory} has a thousand runs of this process")


def has_run_name(path: Path) -> bool:
    """Return whether the file is named as `new_run` names it."""
    return RUN_NAME.fullmatch(path.name) is not None


def is_of(path: Path, start_id: str) -> bool:
    """Return whether a run is of the process `start_id`; with ``-PID`` added, whether that process recorded it too."""
    return f"{path.stem}-".startswith(f"{start_id}-")


def is_own_writer(path: Path) -> bool:
    """Return whether the name says that this process writes the run."""
    match = RUN_NAME.fullmatch(path.name)
    return match is not None and match[1] == str(os.getpid())


def open_regular(path: Path) -> int:
    """
    Return a descriptor of the regular file `path`, for reading.

    A FIFO does not block the call; the lease of a file server on the file may (fcntl(2)).

    Raises:
        OSError: it cannot be opened, or it is a symbolic link or no regular file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise
        fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return fd


def is_being_written(path: Path) -> bool:
    """Return whether a living process holds the lock of this run, or may hold it: the lock cannot be read."""
    lock = path.with_suffix(".lock")
    try:
        fd = open_regular(lock)
    except OSError:
        try:
            return stat.S_ISREG(os.lstat(lock).st_mode)  # no descriptor or no permission: it may be held
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, or the file system does not support flock
        return True
    finally:
        os.close(fd)
    return False


def check_own_run(path: Path, *, empty: bool = False) -> None:
    """
    Raise `ForeignRunError` unless vitalsd wrote the run `path`, and `OSError` if the file cannot be read.

    It must be a regular file of this user with one name, which is one that `new_run` gives. Its header must have the
    application id and the WAL mode of SQLite. There must be no rollback journal: SQLite would apply it, and delete any
    file that it names. The files beside it must not be links either.

    Args:
        path: the database of the run.
        empty: whether to accept an empty file too: its writer died before it wrote the header.
    """
    if not has_run_name(path):
        raise ForeignRunError(f"{path.name} does not have the name of a run")
    for part in (path, *_sqlite_parts(path)):
        try:
            found = os.lstat(part)
        except FileNotFoundError:
            if part == path:
                raise
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ForeignRunError(f"{part.name} is not a regular file")
        if found.st_uid != os.geteuid():
            raise ForeignRunError(f"{part.name} belongs to user {found.st_uid}")
        if found.st_nlink != 1:
            raise ForeignRunError(f"{part.name} has {found.st_nlink} names (hard links), so other programs use it")
    if os.path.lexists(f"{path}-journal"):
        raise ForeignRunError(f"{path.name} has a rollback journal, {path.name}-journal, which vitalsd never makes")
    fd = open_regular(path)
    try:
        header = os.pread(fd, HEADER_BYTES, 0)
    finally:
        os.close(fd)
    if header or not empty:
        if not header.startswith(MAGIC) or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
            raise ForeignRunError(f"{path.name} is not a black box of vitalsd")
        if header[18:20] != b"\2\2":
            raise ForeignRunError(f"{path.name} is not in WAL mode, so another program has changed it")


def is_own_run(path: Path) -> bool:
    """Return whether vitalsd wrote the run, so that it may be deleted to make room."""
    with suppress(ForeignRunError, OSError):
        check_own_run(path, empty=True)
        return True
    return False


def _sqlite_parts(path: Path) -> list[Path]:
    return [Path(f"{path}-wal"), Path(f"{path}-shm"), Path(f"{path}-journal")]


def _parts(path: Path) -> list[Path]:
    """Return all files of a run, the database first: while the lock is there, no other run takes the name."""
    return [path, Path(f"{path}-wal"), Path(f"{path}-shm"), path.with_suffix(".lock")]


def disk_bytes(path: Path) -> int:
    """Return the size of all files of a run, bytes."""
    total = 0
    for part in _parts(path):
        with suppress(OSError):
            total += part.stat().st_size
    return total


def delete_run(path: Path) -> None:
    """Remove a run that `is_own_run`, with all its files, as far as the system permits."""
    for part in _parts(path):
        with suppress(OSError):
            part.unlink()
