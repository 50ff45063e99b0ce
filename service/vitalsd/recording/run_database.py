"""
Open the database of a run, and bound what SQLite does with it.

A run may come from another user or machine. It is read from a copy in memory, or, if this process writes it, from the
file opened read-only. The size of the file bounds how many instructions SQLite executes and how much content it
returns: a page tree may be a graph in which 10 pages hold 10^13 rows, and a value may be an endless chain of pages.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from vitalsd.recording.run_files import (
    APPLICATION_ID,
    HEADER_BYTES,
    MAGIC,
    ForeignRunError,
    check_own_run,
    disk_bytes,
    is_being_written,
    is_own_writer,
)
from vitalsd.recording.run_image import UnreadableRunError, read_image
from vitalsd.recording.sqlite import sqlite3

__all__ = ["SCHEMA", "SCHEMA_VERSION", "Tables", "readable", "writable"]

SCHEMA_VERSION = 2
"""Version of `SCHEMA` and of `vitalsd.recording.scalars.SCALARS`, in ``user_version`` of the database."""
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE thread (id INTEGER PRIMARY KEY, tid INTEGER, birth INTEGER, name TEXT);
CREATE TABLE child (id INTEGER PRIMARY KEY, segment INTEGER, pid INTEGER, birth INTEGER, name TEXT, found_ns INTEGER);
CREATE TABLE segment (id INTEGER PRIMARY KEY, threads BLOB, cpu_ns BLOB, waits BLOB, constants TEXT);
CREATE TABLE frame (id INTEGER PRIMARY KEY, segment INTEGER, numbers BLOB, moved INTEGER, code TEXT, children BLOB, \
gauges BLOB);
CREATE TABLE mark (wall_ns INTEGER, monotonic_ns INTEGER, label TEXT);
CREATE TABLE event (wall_ns INTEGER, monotonic_ns INTEGER, kind TEXT, detail TEXT, \
duration_ns INTEGER, heartbeat TEXT, cause TEXT, ongoing INTEGER);
"""
"""
Blobs are arrays as the machine has them: thread ids u32; CPU times u64; waits in steps of `WAIT_STEP_NS`, u64, NULL if
the source does not count them. The numbers of a frame are its scalars, i64; the indexes of the threads that moved, u32,
as many as `moved`, or none if that is NULL because every thread did; how much CPU time each of them used; and, if
`code` has two letters, for how many steps each of them waited. The letters are the kinds of these numbers: H is u16,
I u32, q i64. The children of a frame are i64, `CHILD_NUMBERS` for each: first its place among those of the segment, in
the order of their ids. The gauges of a frame are doubles, one for each name in the constants of the segment, NaN for
one that has no value. A hang has a row for each of its reports; the last one counts.
"""

COLUMNS: dict[str, list[str]] = {
    line.split()[2]: [column.split()[0] for column in line.partition("(")[2].rpartition(")")[0].split(", ")]
    for line in SCHEMA.strip().splitlines()
}
"""Columns of each table of `SCHEMA`."""

PROGRAMS = ("VIRTUAL", "CHECK", "DEFAULT", "GENERATED", "COLLATE")
"""Words of a table's declaration that make SQLite run code."""

MAX_SQL = 10_000
"""Limit of a statement, characters; applies to the statements of the schema too."""
STEPS = 1000
"""Instructions of SQLite's virtual machine between two checks of how many are left."""
FREE_STEPS = 200_000
"""Instructions that SQLite may execute for a run of any size."""
STEP_BYTES = 2
"""Bytes of the run for each further instruction. To read all tables of a real run takes one for 4 bytes at most."""
ROW_BYTES = 16
"""Bytes that each row counts for in the limit of the content: in a real run it takes at least that much."""
FREE_BYTES = 1 << 16
"""Content that may come out of a run of any size, bytes."""


class Tables:
    """
    Read the tables of one run.

    Args:
        db: the connection.
        size_bytes: size of the database. All calls together return at most that much content and `FREE_BYTES`, each row
            counted with `ROW_BYTES` more.
    """

    def __init__(self, db: sqlite3.Connection, size_bytes: int) -> None:
        self._db = db
        self.size_bytes = size_bytes
        self._left = FREE_BYTES + size_bytes

    def rows(self, sql: str, *values: Any) -> Iterator[Any]:
        """
        Yield the rows that a statement finds.

        Raises:
            ValueError: it finds more than the file has bytes.
        """
        for row in self._db.execute(sql, values):
            self._left -= ROW_BYTES + sum(len(value) for value in row if isinstance(value, (bytes, str)))
            if self._left < 0:
                raise ValueError(f"its tables hold more than its {self.size_bytes} bytes")
            yield row

    def row(self, sql: str, *values: Any) -> Any:
        """Return the first row that a statement finds; ``None``: it finds none. Raise as `rows` does."""
        return next(self.rows(sql, *values), None)


@contextmanager
def readable(path: Path) -> Iterator[Tables]:
    """
    Yield the tables of a run as of one moment; neither the file nor those beside it are written.

    Raises:
        UnreadableRunError: vitalsd did not write it, it is damaged, or the caller finds a value that is.
        OSError: it cannot be read.
    """
    with _explained(path.name):
        if is_own_writer(path) and is_being_written(path):
            check_own_run(path)
            # Opened read-only, SQLite applies no journal and moves no log.
            with closing(sqlite3.connect(f"{_uri(path)}?mode=ro", uri=True, timeout=1)) as db:
                size = disk_bytes(path)
                _restrict(db, size)
                _check_tables(db, path.name)
                db.execute("BEGIN")  # one state for all statements, whatever the recorder writes meanwhile
                yield Tables(db, size)
        else:
            image = read_image(path)
            size = len(image)
            _check_header(image, path.name)
            with _in_memory(image) as db:
                _restrict(db, size)
                _check_tables(db, path.name)
                yield Tables(db, size)


@contextmanager
def writable(path: Path) -> Iterator[sqlite3.Connection]:
    """
    Yield the database of a run that vitalsd wrote, for writing; then move the content of its log to the file.

    Raises:
        UnreadableRunError: vitalsd did not write it, or it is damaged, or cannot be written now.
        OSError: it cannot be read.
    """
    with _explained(path.name):
        check_own_run(path)
        with readable(path):  # checks also what SQLite would move from a log to the file
            pass
        with closing(sqlite3.connect(f"{_uri(path)}?mode=rw", uri=True, timeout=1)) as db:
            _restrict(db, disk_bytes(path))
            _check_tables(db, path.name)
            yield db


def _uri(path: Path) -> str:
    return path.absolute().as_uri()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise `UnreadableRunError` in place of the errors that a database or its content causes."""
    try:
        yield
    except ForeignRunError as error:
        raise UnreadableRunError(str(error)) from None
    except sqlite3.OperationalError as error:
        if str(error) == "interrupted":
            raise UnreadableRunError(f"{name} is damaged: it has more rows than fit into a file of its size") from None
        raise UnreadableRunError(f"{name} cannot be opened: {error!s:.200}") from None
    except (sqlite3.Error, KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise UnreadableRunError(f"{name} is damaged: {error!s:.200}") from None


@contextmanager
def _in_memory(image: bytearray) -> Iterator[sqlite3.Connection]:
    """Yield a database with the content `image`, which is emptied."""
    with closing(sqlite3.connect(":memory:")) as db:
        if hasattr(db, "deserialize"):
            db.deserialize(image)
            image.clear()
            yield db
            return
    # SQLite before 3.36 has sqlite3_deserialize() only if it was built with it.
    with tempfile.TemporaryDirectory(prefix="vitalsd-") as scratch:
        copy = Path(scratch) / "run.sqlite"
        copy.write_bytes(image)
        image.clear()
        with closing(sqlite3.connect(f"{_uri(copy)}?mode=ro&immutable=1", uri=True)) as db:
            yield db


def _restrict(db: sqlite3.Connection, size_bytes: int) -> None:
    """Bound what a connection to a database of `size_bytes` may execute, and how long a value may be."""
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(MAX_SQL, size_bytes))
    db.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL)
    looks = (FREE_STEPS + size_bytes // STEP_BYTES) // STEPS
    # Not a function in Python: an exception of a signal handler in it, such as KeyboardInterrupt, would be lost.
    db.set_progress_handler(partial(next, repeat(0, looks), 1), STEPS)
    db.execute("PRAGMA temp_store = MEMORY")


def _check_header(image: bytearray, name: str) -> None:
    """Raise `UnreadableRunError` unless the header is that of a run, in the format that this version reads."""
    if len(image) < HEADER_BYTES or not image.startswith(MAGIC):
        raise UnreadableRunError(f"{name} is not a black box of vitalsd: it is no SQLite database")
    if int.from_bytes(image[68:72], "big") != APPLICATION_ID:
        raise UnreadableRunError(f"{name} is not a black box of vitalsd")
    if image[56:60] != b"\0\0\0\1":
        raise UnreadableRunError(f"{name} has texts that are not UTF-8, as another program writes them")
    if (version := int.from_bytes(image[60:64], "big")) != SCHEMA_VERSION:
        raise UnreadableRunError(f"{name} has format {version}; this vitalsd reads {SCHEMA_VERSION}")


def _check_tables(db: sqlite3.Connection, name: str) -> None:
    """
    Raise `UnreadableRunError` unless the tables are those of `SCHEMA` with their columns, and nothing else.

    A view or a trigger is a program, and it may never end. The text of the statements is not compared: another version
    of vitalsd may write it in another form.
    """
    kinds = {
        (kind, table): sql for kind, table, sql in db.execute("SELECT type, name, sql FROM sqlite_master LIMIT 99")
    }
    if {table for _, table in kinds} != set(COLUMNS) or {kind for kind, _ in kinds} != {"table"}:
        raise UnreadableRunError(f"{name} has other tables than a run of vitalsd")
    for table, columns in COLUMNS.items():
        if any(word in str(kinds["table", table]).upper() for word in PROGRAMS):
            raise UnreadableRunError(f"{name} has a table that computes")
        declared = [(column, hidden) for _, column, _, _, _, _, hidden in db.execute(f"PRAGMA table_xinfo({table})")]
        if declared != [(column, 0) for column in columns]:
            raise UnreadableRunError(f"{name} has other columns in {table} than a run of vitalsd")
