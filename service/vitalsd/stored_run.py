"""
One run on disk: the format, and reading it back.

A SQLite file; its last seconds may still be in its `vitalsd.tail`, and `vitalsd.run_parts` has what else belongs to
it. A run that is not being written any more and did not say how it ended has crashed.
"""

import json
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from vitalsd.contract.application import Application
from vitalsd.contract.host import Host
from vitalsd.record import Event, EventKind, Mark, Moves, Record, Segment
from vitalsd.recording.sqlite import sqlite3
from vitalsd.run_parts import disk_bytes, is_being_written, is_of, tail_link
from vitalsd.snapshot import Identity, Snapshot
from vitalsd.tail import Row, read_tail
from vitalsd.wire import iso

__all__ = [
    "APPLICATION_ID",
    "SCHEMA",
    "SCHEMA_VERSION",
    "UNKNOWN_END",
    "Run",
    "State",
    "UnreadableRun",
    "describe",
    "insert_rows",
    "not_on_disk",
    "opened",
    "read_run",
]

APPLICATION_ID = 0x76697461  # "vita", in the header of the file for file(1)
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE thread (id INTEGER PRIMARY KEY, tid INTEGER, birth INTEGER, name TEXT);
CREATE TABLE segment (id INTEGER PRIMARY KEY, threads BLOB, cpu_ns BLOB, constants TEXT);
CREATE TABLE frame (id INTEGER PRIMARY KEY, segment INTEGER, numbers BLOB, moved INTEGER, code TEXT);
CREATE TABLE mark (wall_ns INTEGER, monotonic_ns INTEGER, label TEXT);
CREATE TABLE event (wall_ns INTEGER, monotonic_ns INTEGER, kind TEXT, detail TEXT);
"""
"""
Blobs are arrays as the machine has them: thread ids u32; CPU times u64. The numbers of a frame are its scalars, i64;
the indexes of the threads that moved, u32, as many as `moved`, or none if that is NULL because every thread did;
and how much each of them moved, u32 or i64 as `code` says, I or q.
"""

COLUMNS: dict[str, list[str]] = {
    line.split()[2]: [column.split()[0] for column in line.partition("(")[2].rpartition(")")[0].split(", ")]
    for line in SCHEMA.strip().splitlines()
}
"""By table of `SCHEMA`."""
SCALARS_BYTES = 8 * len(Segment.SCALARS)
CONSTANTS = ("cpu_grain_ns", "thread_grain_ns", "thread_lag_ns", "source", "image")
"""Of a segment, as JSON."""

PROGRAMS = ("VIRTUAL", "CHECK", "DEFAULT", "GENERATED", "COLLATE")
"""Words of a table's declaration that make SQLite run code."""

State = Literal["running", "clean", "crashed"]


class UnreadableRun(Exception):
    """The file is not a run of ours, or is damaged; ``str(error)`` says which."""


class _Stuck(UnreadableRun):
    """It cannot be opened where it is: the disk is full or read-only, and SQLite needs files of its own beside it."""


UNKNOWN_END = "the sidecar ended before the process or with it; how the process ended is not known"


class Run(NamedTuple):
    """A run found on disk; see `read_run` for what is in it."""

    id: str
    path: Path
    identity: Identity
    state: State
    ended: str | None
    """How it ended, in words; ``None`` while it runs or if nobody could say."""
    first_wall_ns: int | None
    last_wall_ns: int | None
    snapshots: int
    reported: bool
    """Has gone into a bug report already."""
    size_bytes: int
    application: Application = Application()
    """What the client said it is."""
    host: Host = Host()
    """The machine it was recorded on."""

    def to_json(self) -> dict[str, Any]:
        """Return it as ``GET /runs`` and ``vitalsd runs --json`` list it."""
        return {
            "id": self.id,
            "state": self.state,
            "ended": self.ended,
            "reported": self.reported,
            "app": self.application.app,
            "app_version": self.application.app_version,
            "platform": self.identity.platform,
            "host": self.host._asdict(),
            "pid": self.identity.pid,
            "name": self.identity.name,
            "program": self.identity.program,
            "started_at": iso(self.identity.started_unix_ns),
            "recorded_from": None if self.first_wall_ns is None else iso(self.first_wall_ns),
            "recorded_to": None if self.last_wall_ns is None else iso(self.last_wall_ns),
            "snapshots": self.snapshots,
            "size_bytes": self.size_bytes,
        }


def read_run(path: Path) -> tuple[Run, Record]:
    """
    A run and its record, exact to the last snapshot that was written. The file itself is not touched.

    Raises:
        UnreadableRun: it is not a run of ours, or damaged.
        OSError: it cannot be read.
    """
    with _copied(path) as db:
        return _described(db, path), _record(db)


@contextmanager
def _copied(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the database of a run, with what is in its tail. Raises as `read_run` does."""
    with tempfile.TemporaryDirectory(prefix="vitalsd-") as scratch:
        copy = Path(scratch) / "run.sqlite"
        rows = _tail(path)  # first: what has left it when the rest is read is there
        if is_being_written(path):
            # Not by hand: to close a file takes the locks of the whole process off it, those of its writer too, and
            # the next who looks at the run then takes it for his own and deletes the log (close in fcntl_locking(2)).
            with opened(path) as live, closing(sqlite3.connect(copy)) as db:
                live.backup(db)
        else:
            state = None
            while state != (state := _state_of_files(path)):  # who lists it meanwhile moves the log into the database
                for suffix in ("", "-wal"):
                    Path(f"{copy}{suffix}").unlink(missing_ok=True)
                    with suppress(FileNotFoundError) if suffix else nullcontext():
                        shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        with opened(copy, path.name) as db:
            insert_rows(db, not_on_disk(db, rows))
            yield db


def _state_of_files(path: Path) -> list[tuple[int, int, int] | None]:
    """What changes when the database of a run or its log is written, made or deleted."""
    found: list[tuple[int, int, int] | None] = []
    for file in (path, Path(f"{path}-wal")):
        try:
            status = file.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


@contextmanager
def opened(path: Path, name: str | None = None) -> Iterator[sqlite3.Connection]:
    """
    The database of a run, for reading and writing; `name` is what an error calls it.

    Raises:
        UnreadableRun: it is not a run of ours, damaged, or so is what the caller finds in it.
    """
    name = name or path.name
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=1)) as db:
            (application_id,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if application_id != APPLICATION_ID:
                raise UnreadableRun(f"{name} is not a black box of vitalsd")
            if version != SCHEMA_VERSION:
                raise UnreadableRun(f"{name} has format {version}; this vitalsd reads {SCHEMA_VERSION}")
            _check_tables(db, name)
            yield db
    except sqlite3.OperationalError as error:
        raise _Stuck(f"{name} cannot be opened: {error}") from None
    except (sqlite3.Error, KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise UnreadableRun(f"{name} is damaged: {error}") from None


def _check_tables(db: sqlite3.Connection, name: str) -> None:
    """
    Raise `UnreadableRun` unless the tables are those of `SCHEMA` with their columns, and nothing else.

    A view or a trigger is a program, and may be one that never ends. The text of the statements is not compared: it may
    be written otherwise by another version.
    """
    kinds = {(kind, table): sql for kind, table, sql in db.execute("SELECT type, name, sql FROM sqlite_master")}
    if {table for _, table in kinds} != set(COLUMNS) or {kind for kind, _ in kinds} != {"table"}:
        raise UnreadableRun(f"{name} has other tables than a run of vitalsd")
    for table, columns in COLUMNS.items():
        if any(word in str(kinds["table", table]).upper() for word in PROGRAMS):
            raise UnreadableRun(f"{name} has a table that computes")
        found = [(column, hidden) for _, column, _, _, _, _, hidden in db.execute(f"PRAGMA table_xinfo({table})")]
        if found != [(column, 0) for column in columns]:
            raise UnreadableRun(f"{name} has other columns in {table} than a run of vitalsd")


def insert_rows(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Insert rows, as a tail has them, in the transaction of the caller; those that are there already are left out."""
    db.executemany("INSERT OR IGNORE INTO frame (id, segment, numbers, moved, code) VALUES (?,?,?,?,?)", rows)


def _tail(path: Path) -> list[Row]:
    try:
        return read_tail(tail_link(path))
    except OSError:
        return []


def not_on_disk(db: sqlite3.Connection, rows: Sequence[Row]) -> list[Row]:
    """Those of the rows of a tail that are not on disk."""
    if not rows:
        return []
    (last,) = db.execute("SELECT max(id) FROM frame").fetchone()
    known = {segment for (segment,) in db.execute("SELECT id FROM segment")}
    return [row for row in rows if row.id > (last or 0) and row.segment in known]


def _meta(db: sqlite3.Connection) -> dict[str, str]:
    return dict(_typed(row, (str, str)) for row in db.execute("SELECT key, value FROM meta"))


def _typed(row: Sequence[Any], kinds: Sequence[type]) -> Any:
    """`row`, if its values are what we write: a column of SQLite takes any kind. Raises `TypeError`."""
    if tuple(map(type, row)) != tuple(kinds):
        raise TypeError(f"{row!r:.80} where there should be {', '.join(kind.__name__ for kind in kinds)}")
    return row


def _identity(meta: dict[str, str]) -> Identity:
    identity = Identity(**json.loads(meta["identity"]))
    _typed(identity, (str, int, str, str, int, int, str))
    if not 0 <= identity.started_unix_ns < 2**63:
        raise ValueError(f"a start at {identity.started_unix_ns}")
    return identity


def describe(path: Path) -> Run:
    """What is told of a run without reading all of it. Raises `UnreadableRun`."""
    rows = _tail(path)
    try:
        with opened(path) as db:
            db.execute("BEGIN")  # or what is written meanwhile is in none of what is read
            return _described(db, path, rows)
    except _Stuck:
        with _copied(path) as db:
            return _described(db, path)


def _described(db: sqlite3.Connection, path: Path, rows: Sequence[Row] = ()) -> Run:
    meta = _meta(db)
    count, first, last = db.execute("SELECT count(*), min(id), max(id) FROM frame").fetchone()
    wall = Segment.SCALARS.index("wall_ns")
    scalars = "SELECT substr(numbers, 1, ?) FROM frame WHERE id=?"
    first_wall_ns, last_wall_ns = (
        None if frame is None else _array("q", db.execute(scalars, (SCALARS_BYTES, frame)).fetchone()[0])[wall]
        for frame in (first, last)
    )
    if lacking := not_on_disk(db, rows):
        count += len(lacking)
        last_wall_ns = _array("q", bytes(lacking[-1].numbers[:SCALARS_BYTES]))[wall]
    state: State = "clean"
    identity, ended = _identity(meta), meta.get("ended")
    if ended is None:
        state = "running" if is_being_written(path) else "crashed"
        if state == "crashed" and not is_of(path, f"{identity.start_id}-{identity.pid}"):
            ended = UNKNOWN_END
    elif "crashed" in meta:
        state = "crashed"
    return Run(
        id=path.stem,
        path=path,
        identity=identity,
        state=state,
        ended=ended,
        first_wall_ns=first_wall_ns,
        last_wall_ns=last_wall_ns,
        snapshots=count,
        reported="reported" in meta,
        size_bytes=disk_bytes(path),
        application=Application.checked(meta.get("app"), meta.get("app_version")),
        host=Host.read(json.loads(meta.get("host", "{}"))),
    )


def _record(db: sqlite3.Connection) -> Record:
    meta = _meta(db)
    record = Record(_identity(meta), interval_ns=int(meta["interval_ns"]), retention_ns=int(meta["retention_ns"]))
    threads = {
        row[0]: _typed(row[1:], (int, int, str)) for row in db.execute("SELECT id, tid, birth, name FROM thread")
    }
    frames = db.execute(
        "SELECT f.segment, f.numbers, f.moved, f.code, s.threads, s.cpu_ns, s.constants"
        " FROM frame f JOIN segment s ON s.id = f.segment ORDER BY f.id"
    )
    newest = 0
    for segment_id, rows in groupby(frames, key=lambda row: row[0]):
        if segment_id <= newest:  # A hostile file would make thousands of copies of one segment.
            raise ValueError(f"snapshots of segment {segment_id!r:.20} after those of {newest}")
        newest = segment_id
        segment: Segment | None = None
        for _, numbers, moved, code, ids, cpu_ns, constants in rows:
            values, moves = _frame(numbers, moved, code)
            if segment is None:
                keys = [threads[thread_id] for thread_id in _array("I", ids)]
                segment = Segment(_head(values, keys, _array("Q", cpu_ns), json.loads(constants)))
            _check(segment, values, moves)
            segment.add(values, moves)
        if segment is not None:
            record.restore(segment)
    for row in db.execute("SELECT * FROM mark ORDER BY rowid"):
        record.marks.append(Mark(*_typed(row, (int, int, str))))
    for row in db.execute("SELECT * FROM event ORDER BY rowid"):
        event = Event(*_typed(row, (int, int, str, str)))
        if event.kind not in get_args(EventKind):
            raise ValueError(f"an event {event.kind!r:.80}")
        record.events.append(event)
    return record


def _frame(numbers: bytes, moved: int | None, code: str) -> tuple["array[int]", Moves]:
    """The scalars and moves of one frame. Raises `ValueError` or `TypeError`."""
    named = SCALARS_BYTES + 4 * (moved or 0)
    indexes = None if moved is None else _array("I", numbers[SCALARS_BYTES:named])
    return _array("q", numbers[:SCALARS_BYTES]), (indexes, _array(code, numbers[named:]))


def _check(segment: Segment, scalars: "array[int]", moves: Moves) -> None:
    """Raises `ValueError` for what cannot be a snapshot of that segment."""
    indexes, burnt = moves
    threads = len(segment.base_cpu_ns)
    if len(scalars) != len(Segment.SCALARS) or len(burnt) != (threads if indexes is None else len(indexes)):
        raise ValueError("a snapshot of another length")
    if indexes and max(indexes) >= threads:
        raise ValueError("a snapshot of more threads than there are")


def _head(
    scalars: "array[int]", keys: list[tuple[int, int, str]], cpu_ns: "array[int]", constants: dict[str, Any]
) -> Snapshot:
    if len(cpu_ns) != len(keys):
        raise ValueError("threads without CPU time")
    _typed([constants[name] for name in CONSTANTS], (int, int, int, str, str))
    tids, births, names = zip(*keys, strict=True) if keys else ((), (), ())
    numbers = Segment.numbers(scalars)
    return Snapshot(**numbers, tids=tids, births=births, names=names, thread_cpu_ns=cpu_ns, **constants)


def _array(code: str, content: bytes) -> "array[int]":
    if code not in ("I", "Q", "q"):
        raise ValueError(f"numbers of a kind {code!r:.80}")
    return array(code, content)
