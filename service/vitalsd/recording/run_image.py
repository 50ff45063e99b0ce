"""
Read the database of a run as bytes, file and log as one, without SQLite and without changing either.

SQLite trusts the files beside a database. It applies a rollback journal, deletes the file that the journal names,
moves the log into the database, and makes files of its own. To read a run must do none of these. So the committed
pages of the log are put in place here (fileformat2.html of SQLite, section 4).
"""

import os
import struct
import sys
from array import array
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from vitalsd.recording.run_files import HEADER_BYTES, MAGIC, open_regular

__all__ = ["MAX_RUN_BYTES", "UnreadableRunError", "read_image"]

MAX_RUN_BYTES = 32 << 20
"""Limit of the database of a run with its log applied, bytes: twice what the writer keeps."""
TRIES = 5
"""Number of attempts to read file and log without a new log having begun in between."""
LOG_HEADER = struct.Struct(">8I")
"""Header of a log: magic number, version, page size, number of the checkpoint, two salts, two checksums."""
FRAME_HEADER = struct.Struct(">6I")
"""
Header of a page in a log: page, size of the database in pages, two salts, two checksums.

The size is 0 unless a transaction ends with this page.
"""
LOG_MAGIC = 0x377F0682
"""Magic number of a log; the lowest bit is set if the words of the checksum are big-endian."""


class UnreadableRunError(Exception):
    """Report that vitalsd did not write the file, or that it is damaged; ``str(error)`` is the reason."""


def read_image(path: Path) -> bytearray:
    """
    Return the database of the run `path`, as of its last committed transaction.

    Another process may write the run meanwhile. The process that writes it must read it through SQLite instead: to
    close the file here would release the locks of SQLite (close in fcntl_locking(2)).

    Raises:
        UnreadableRunError: it has a rollback journal, or is larger than a run may be.
        OSError: it cannot be read.
    """
    log_path = Path(f"{path}-wal")
    if os.path.lexists(f"{path}-journal"):
        raise UnreadableRunError(
            f"{path.name} has a rollback journal, {path.name}-journal, which vitalsd never makes: another program has"
            " changed the run. It is not read"
        )
    for _ in range(TRIES):
        # Pages that a checkpoint writes meanwhile are in the log too, until it begins anew with other salts.
        before = _read(log_path, missing=True, most=LOG_HEADER.size)
        content = _read(path)
        log = _read(log_path, missing=True) if before else bytearray()
        if _read(log_path, missing=True, most=LOG_HEADER.size) == before == log[: LOG_HEADER.size]:
            return _with_log(path, content, log)
    raise UnreadableRunError(f"{path.name} is being written faster than it can be read; try again")


def _read(path: Path, *, missing: bool = False, most: int | None = None) -> bytearray:
    """
    Return the content of a file.

    Args:
        path: the file.
        missing: whether a file that does not exist counts as empty.
        most: number of bytes to read, from the beginning; ``None``: all.

    Raises:
        UnreadableRunError: it is larger than a run may be.
        OSError: it cannot be read.
    """
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        if missing:
            return bytearray()
        raise
    with os.fdopen(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        if most is not None:
            size = min(size, most)
        elif size > MAX_RUN_BYTES:
            raise UnreadableRunError(f"{path.name} has {size} bytes; a run has at most {MAX_RUN_BYTES}")
        content = bytearray(size)
        view, at = memoryview(content), 0
        while at < size and (count := file.readinto(view[at:])):
            at += count
        view.release()
        del content[at:]
    return content


class _Log(NamedTuple):
    """Hold the header of a log."""

    page_bytes: int
    big_endian: bool
    salts: tuple[int, int]
    checksum: tuple[int, int]


def _log(content: bytearray) -> _Log | None:
    """Return the header of a log; ``None``: SQLite would ignore the log, too."""
    if len(content) < LOG_HEADER.size:
        return None
    magic, _, page_bytes, _, salt1, salt2, *checksum = LOG_HEADER.unpack_from(content)
    if magic & ~1 != LOG_MAGIC or page_bytes not in {1 << power for power in range(9, 17)}:
        return None
    big_endian = bool(magic & 1)
    found = _checksum(_words(content[: LOG_HEADER.size - 8], big_endian), (0, 0))
    if found != tuple(checksum):
        return None
    return _Log(page_bytes, big_endian, (salt1, salt2), found)


def _with_log(path: Path, content: bytearray, log: bytearray) -> bytearray:
    """Return `content` with the committed pages of `log`, as a database that has no log."""
    head = _log(log)
    if head is not None:
        pages, size = _committed(log, head)
        if size * head.page_bytes > MAX_RUN_BYTES:
            raise UnreadableRunError(
                f"{path.name} has {size * head.page_bytes} bytes with its log; a run has at most {MAX_RUN_BYTES}"
            )
        if size:
            del content[size * head.page_bytes :]
            content.extend(bytes(size * head.page_bytes - len(content)))
            for number, at in pages.items():
                if 0 < number <= size:
                    content[(number - 1) * head.page_bytes : number * head.page_bytes] = log[at : at + head.page_bytes]
    if len(content) >= HEADER_BYTES and content.startswith(MAGIC):
        content[18:20] = b"\1\1"  # SQLite opens no database in memory with a header that demands a log
    return content


def _committed(log: bytearray, head: _Log) -> tuple[dict[int, int], int]:
    """Return where in `log` the newest content of each page is, and how many pages there are; 0: no transaction."""
    words = _words(log[LOG_HEADER.size : len(log) // 4 * 4], head.big_endian)
    frame_words, head_words = (FRAME_HEADER.size + head.page_bytes) // 4, FRAME_HEADER.size // 4
    committed: dict[int, int] = {}
    pending: dict[int, int] = {}
    size, checksum = 0, head.checksum
    for begin in range(0, len(words) - frame_words + 1, frame_words):
        at = LOG_HEADER.size + 4 * begin
        number, pages, salt1, salt2, *stated = FRAME_HEADER.unpack_from(log, at)
        if (salt1, salt2) != head.salts:
            break
        content = words[begin + head_words : begin + frame_words]
        checksum = _checksum(chain(words[begin : begin + 2], content), checksum)
        if checksum != tuple(stated):
            break
        pending[number] = at + FRAME_HEADER.size
        if pages:
            committed |= pending
            pending.clear()
            size = pages
    return committed, size


def _words(content: bytes | bytearray, big_endian: bool) -> "array[int]":
    words = array("I", bytes(content))
    if big_endian != (sys.byteorder == "big"):
        words.byteswap()
    return words


def _checksum(words: "chain[int] | array[int]", start: tuple[int, int]) -> tuple[int, int]:
    low, high = start
    each = iter(words)
    for first, second in zip(each, each, strict=True):
        low = (low + first + high) & 0xFFFFFFFF
        high = (high + second + low) & 0xFFFFFFFF
    return low, high
