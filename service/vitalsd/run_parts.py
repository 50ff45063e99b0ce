"""
What belongs to one run on disk: its database with SQLite's own two files, its lock, and the link to its tail.

All are named after the identity of the run, never after input. While it is being written the ``.lock`` is held with
flock(2); the kernel lets go of it when the writer dies, however it dies.
"""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from vitalsd.tail import remove_tail

__all__ = ["delete_run", "disk_bytes", "is_being_written", "is_of", "new_run", "tail_link"]

MAX_FILES = 1000


def new_run(directory: Path, stem: str) -> tuple[Path, int]:
    """An empty file whose name begins with `stem`, and a descriptor that holds its lock."""
    for number in range(MAX_FILES):
        path = directory / f"{stem}-{number}.sqlite" if number else directory / f"{stem}.sqlite"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock_fd = os.open(path.with_suffix(".lock"), flags, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(os.open(path, flags | os.O_EXCL, 0o600))
        except (BlockingIOError, FileExistsError):
            os.close(lock_fd)
        except OSError:
            os.close(lock_fd)
            raise
        else:
            return path, lock_fd
    raise OSError(f"{directory} has a thousand runs of this process")


def is_of(path: Path, start_id: str) -> bool:
    """Whether it is of the process with that `Identity.start_id`; with ``-`` and a pid added, recorded by that one."""
    return f"{path.stem}-".startswith(f"{start_id}-")


def tail_link(path: Path) -> Path:
    """Where the `Tail` of the run `path` is linked."""
    return path.with_suffix(".tail")


def is_being_written(path: Path) -> bool:
    """Whether a living process holds the lock of this run, or may for all that can be seen."""
    try:
        fd = os.open(path.with_suffix(".lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ELOOP)  # without a descriptor left nobody can tell
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # It is held, or the file system cannot say.
        return True
    finally:
        os.close(fd)
    return False


def _parts(path: Path) -> list[Path]:
    """The database first: while its lock is there, nobody takes the name."""
    return [path, Path(f"{path}-wal"), Path(f"{path}-shm"), tail_link(path), path.with_suffix(".lock")]


def disk_bytes(path: Path) -> int:
    """What all of it takes, bytes."""
    total = 0
    for part in _parts(path):
        with suppress(OSError):
            total += part.stat().st_size
    return total


def delete_run(path: Path) -> None:
    """Remove a run and what belongs to it, as far as that can be done."""
    remove_tail(tail_link(path))
    for part in _parts(path):
        with suppress(OSError):
            part.unlink()
