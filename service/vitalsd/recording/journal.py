"""
The end of a run until it is written to disk: in memory that belongs to no process.

A write to a file on tmpfs(5) is a copy of memory. No disk can make it wait, so the sampler does it itself, for
less than it costs to wake a thread for it, and what was written stays when the process is killed. Only the end of
the machine, or of the container whose ``/dev/shm`` it is, takes with it what was not on disk by then.

The file begins with a magic number, the mount namespace of its writer, and the path of the link: so what is left over
can be distinguished from files of other programs, and from the tail of a run in a container that shares the memory. The
writer holds it with flock(2).

A record is its head, the numbers of a frame as `vitalsd.recording.run_reader` has them, and its id once more. A writer
that is killed as it appends leaves a record without that, which does not count.
"""

import errno
import fcntl
import os
import re
import stat
import tempfile
import threading
import time
from array import array
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["MAX_BYTES", "SHARED_MEMORY", "Row", "Tail", "read_tail", "remove_tail", "sweep_tails"]

SHARED_MEMORY = Path("/dev/shm")
"""Linux, shm_overview(7). macOS has no such directory."""
PREFIX = "vitalsd-"
NAME = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}", re.ASCII)
"""As `tempfile.mkstemp` makes it."""
MAGIC = 0x6C696174_61746976
"""Of a tail: ``vitatail`` on a little-endian machine."""
MARK_BYTES = 3 * 8
"""Size of the numbers before the path of the link: magic number, mount namespace, length of the path."""
MAX_PATH_BYTES = 4096
ORPHAN_S = 3600.0
"""The sidecar removes a tail this old if its run is gone and no process holds it."""
MAX_BYTES = 1 << 20
"""Of one run. The 64 snapshots of a segment take a quarter of it when 1000 threads run all the time."""
HEAD_BYTES = 5 * 8
"""Size of the numbers, id, segment, moved (-1 for ``None``) and code, 64 bits each, as the machine has them."""
END_BYTES = 8


class Row(NamedTuple):
    """One snapshot as the table ``frame`` of a run has it."""

    id: int
    """From 1, ascending."""
    segment: int
    numbers: bytes | bytearray
    moved: int | None
    code: str


class Tail:
    """
    A file in shared memory, and a symbolic link beside the run that leads to it.

    One thread appends and clears, another may read `rows` meanwhile. Neither raises: where there is no room, or
    the file has been removed, they say so.

    Args:
        link: where the link goes; one that is there belonged to a run that is no more, and is replaced.
        memory: a directory on tmpfs.

    Raises:
        OSError: there is no such memory, no room in it, or something else in place of the link.
    """

    def __init__(self, link: Path, memory: Path) -> None:
        if not _is_tmpfs(memory):
            raise NotADirectoryError(f"{memory} is not shared memory")
        if link.is_symlink():
            remove_tail(link)
        self._fd, self._path = tempfile.mkstemp(prefix=PREFIX, dir=memory)
        self._link = link
        self._lock = threading.Lock()
        try:
            with suppress(OSError):  # Without locks there, it is never taken for a leftover.
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mark = _mark(link)
            if os.write(self._fd, mark) != len(mark):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
            os.symlink(self._path, link)
        except OSError:
            os.close(self._fd)
            os.unlink(self._path)
            raise
        self._begin = len(mark)
        self.size_bytes = 0

    def append(self, row: Row) -> bool:
        """Add a row; False if there is no room for it."""
        row_id, segment, numbers, moved, code = row
        head = array("q", (len(numbers), row_id, segment, -1 if moved is None else moved, ord(code)))
        size = HEAD_BYTES + len(numbers) + END_BYTES
        with self._lock, suppress(OSError):
            begin = self.size_bytes
            if begin + size <= MAX_BYTES:
                if os.pwritev(self._fd, (head, numbers, head[1:2]), self._begin + begin) == size:
                    self.size_bytes = begin + size
                    return True
                os.ftruncate(self._fd, self._begin + begin)
        return False

    def rows(self) -> list[Row]:
        """What was appended since it was cleared; nothing once it is closed."""
        with self._lock:
            return _rows(os.pread(self._fd, self.size_bytes, self._begin)) if self._fd >= 0 else []

    def clear(self) -> bool:
        """Begin anew, for all of it is on disk; False if nobody else can find the file any more."""
        with self._lock, suppress(OSError):
            os.ftruncate(self._fd, self._begin)
            self.size_bytes = 0
            return os.fstat(self._fd).st_nlink > 0
        return False

    def close(self) -> None:
        """Let go of the file; it stays where it is."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def remove(self) -> None:
        """Close it, and remove the file and the link."""
        self.close()
        for path in (self._path, self._link):
            with suppress(OSError):
                os.unlink(path)


def read_tail(link: Path) -> list[Row]:
    """
    The rows behind `link`, also while they are being appended.

    Raises:
        OSError: there is no link, or nothing behind it, or no tail of the same user.
    """
    fd, begin, _ = _opened(Path(os.readlink(link)), os.lstat(link).st_uid)
    try:
        before, content = b"", os.pread(fd, MAX_BYTES, begin)
        while content != before:  # What is read while it is being written may be half of each.
            before, content = content, os.pread(fd, MAX_BYTES, begin)
    finally:
        os.close(fd)
    return _rows(content)


def remove_tail(link: Path) -> None:
    """Remove the link and the tail behind it; a file there that is none stays."""
    with suppress(OSError):
        target = Path(os.readlink(link))
        os.close(_opened(target, os.geteuid())[0])
        target.unlink()
    with suppress(OSError):
        if link.is_symlink():
            link.unlink()


def sweep_tails(memory: Path) -> None:
    """
    Remove the tails of this user in `memory` if their run was removed and their writer is dead.

    A tail of another mount namespace stays: its run may be there, in a container.
    """
    with suppress(OSError):
        for name in os.listdir(memory):
            path = memory / name
            if NAME.fullmatch(name):
                with suppress(OSError):
                    _sweep(path)


def _sweep(path: Path) -> None:
    fd, _, mark = _opened(path, os.geteuid())
    try:
        if time.time() - os.fstat(fd).st_mtime < ORPHAN_S:
            return
        link = Path(os.fsdecode(mark[MARK_BYTES:]))
        if mark != _mark(link) or not _namespace() or os.path.lexists(link):
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(fd)


def _opened(path: Path, uid: int) -> tuple[int, int, bytes]:
    """
    Open a tail of the user `uid` for reading.

    Returns:
        The descriptor, where the rows begin, and what is before them.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != uid or status.st_nlink > 1:
            raise PermissionError(errno.EPERM, "it is not a tail of this user", str(path))
        mark = os.pread(fd, MARK_BYTES + MAX_PATH_BYTES, 0)
        magic, _, length = array("q", mark[:MARK_BYTES].ljust(MARK_BYTES, b"\0"))
        if magic != MAGIC or not 0 <= length <= len(mark) - MARK_BYTES:
            raise PermissionError(errno.EPERM, "it is not a tail of vitalsd", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd, MARK_BYTES + length, mark[: MARK_BYTES + length]


def _mark(link: Path) -> bytes:
    """What a tail begins with."""
    path = os.fsencode(os.path.abspath(link))
    return array("q", (MAGIC, _namespace(), len(path))).tobytes() + path


def _namespace() -> int:
    """The mount namespace of this process (namespaces(7)); 0 if it cannot be read."""
    try:
        return os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return 0


def _is_tmpfs(directory: Path) -> bool:
    """Whether `directory` is where a tmpfs is mounted (proc_pid_mountinfo(5)); any other could be on a disk."""
    kinds = {}
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            mount, _, kind = line.partition(" - ")
            kinds[mount.split()[4]] = kind.split()[0]
    return kinds.get(str(directory)) == "tmpfs"


def _rows(content: bytes) -> list[Row]:
    rows: list[Row] = []
    at, last = 0, 0
    while at + HEAD_BYTES + END_BYTES <= len(content):
        size, row_id, segment, moved, code = array("q", content[at : at + HEAD_BYTES])
        begin = at + HEAD_BYTES
        end = begin + size
        if size < 0 or row_id <= last or content[end : end + END_BYTES] != array("q", (row_id,)).tobytes():
            break
        rows.append(Row(row_id, segment, content[begin:end], None if moved == -1 else moved, chr(code & 0x7F)))
        at, last = end + END_BYTES, row_id
    return rows
