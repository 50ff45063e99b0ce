"""Make files of runs as a hostile program may: pages that SQLite follows without end, and files that it would apply."""

import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

PAGE = 4096
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def root_of(path: Path, table: str) -> int:
    """Move the log into the file, and return the number of the root page of a table, from 1."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        db.execute("PRAGMA journal_mode = WAL")
    Path(f"{path}-wal").unlink(missing_ok=True)
    return int(page)


def varint(number: int) -> bytes:
    """Return a number in the variable-length form of SQLite."""
    digits = [number & 127]
    while number := number >> 7:
        digits.insert(0, 128 | number & 127)
    return bytes(digits)


def page_of(kind: int, cells: list[bytes], rightmost: int | None = None) -> bytes:
    """Return a page of a table: leaf (13) or interior (5); fileformat2.html of SQLite, section 1.6."""
    page, end = bytearray(PAGE), PAGE
    begin = 8 if rightmost is None else 12
    for number, cell in enumerate(cells):
        end -= len(cell)
        page[end : end + len(cell)] = cell
        struct.pack_into(">H", page, begin + 2 * number, end)
    struct.pack_into(">BHHHB", page, 0, kind, 0, len(cells), end, 0)
    if rightmost is not None:
        struct.pack_into(">I", page, 8, rightmost)
    return bytes(page)


def replace_root(path: Path, root: int, new: list[bytes], root_page: bytes) -> None:
    """Append pages, and give the table another root."""
    content = bytearray(path.read_bytes())
    content += b"".join(new)
    content[(root - 1) * PAGE : root * PAGE] = root_page
    struct.pack_into(">I", content, 28, len(content) // PAGE)
    path.write_bytes(content)


def make_endless(path: Path, table: str, *, levels: int = 5, children: int = 400) -> None:
    """Make each page of the tree of `table` the child of `children` places: `children` ** `levels` leaves."""
    root = root_of(path, table)
    content = path.read_bytes()
    first = len(content) // PAGE + 1
    pages = [content[(root - 1) * PAGE : root * PAGE]]
    for level in range(levels):
        child = first + level
        cells = [struct.pack(">I", child) + varint(key) for key in range(1, children + 1)]
        pages.append(page_of(5, cells, child))
    replace_root(path, root, pages[:-1], pages[-1])


def make_swollen(path: Path, *, values: int = 1000) -> None:
    """Give the run `values` marks of 1 MiB each, in 4 MiB: all are one page that is its own successor."""
    root = root_of(path, "mark")
    os.truncate(path, 4 << 20)  # SQLite refuses a value that is longer than the file.
    leaf = path.stat().st_size // PAGE + 1
    local, payload = 489, 489 + (PAGE - 4) * 256  # what stays in the page, fileformat2.html of SQLite, section 1.6
    record = bytes((6, 1, 1)) + varint(13 + 2 * (payload - 8)) + bytes((1, 1))
    cells = [
        varint(payload) + varint(key) + record.ljust(local, b"A") + struct.pack(">I", leaf + 1) for key in range(1, 8)
    ]
    parents = [struct.pack(">I", leaf) + varint(key) for key in range(1, values // 7)]
    endless = struct.pack(">I", leaf + 1) + b"A" * (PAGE - 4)
    replace_root(path, root, [page_of(13, cells), endless], page_of(5, parents, leaf))


def plant_journal(path: Path, victim: str) -> Path:
    """Put a rollback journal beside a run that names `victim` as its super-journal: SQLite would delete that."""
    size, name = path.stat().st_size, victim.encode()
    head = JOURNAL_MAGIC + struct.pack(">5I", 0, 1, size // PAGE, 512, PAGE)
    tail = struct.pack(">I", 0x40000000 // PAGE + 1) + name + struct.pack(">2I", len(name), sum(name)) + JOURNAL_MAGIC
    journal = Path(f"{path}-journal")
    journal.write_bytes(head.ljust(512, b"\0") + tail)
    return journal


def state_of(directory: Path) -> dict[str, tuple[object, ...]]:
    """Return every file below a directory: mode, times, and content of a regular one."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = os.lstat(path)
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and status.st_size < 1 << 26 else None
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found
