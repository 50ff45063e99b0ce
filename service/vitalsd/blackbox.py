"""
The flight recorder on disk, while it is being written; `vitalsd.runs` has the format and reads it back.

A snapshot goes to the `vitalsd.tail` of the run, and every few seconds a thread writes what is there to
disk: in WAL mode a commit is a ``write`` without ``fsync``. So a killed process loses nothing, and only a
power failure may lose the last seconds. What has no place in the tail, such as the first snapshot of a
segment, or where there is no shared memory each, is a committed row at once; a kill may come before that, and
take one snapshot, or what waited for a slow disk.
"""

import fcntl
import json
import logging
import os
import sqlite3
import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path

from vitalsd.record import NOBODY, Event, Mark, Segment
from vitalsd.runs import (
    APPLICATION_ID,
    RUN_BYTES,
    SCHEMA,
    SCHEMA_VERSION,
    RunDirectory,
    delete_run,
    insert_rows,
    tail_link,
)
from vitalsd.snapshot import Identity
from vitalsd.tail import Row, Tail
from vitalsd.worker import Worker

__all__ = ["BlackBox"]

log = logging.getLogger("vitalsd.blackbox")

MAX_PENDING = 64
"""Snapshots, marks and events that wait for a slow disk; beyond that they are dropped and counted."""
MAX_WAIT_S = 0.05
OPEN_WAIT_S = 1.0
FOLD_NS = 5_000_000_000
"""Between two times that the tail is written to disk. The longer the cheaper, for the thread that does it wakes up."""
RETRY_NS = 2_000_000_000
"""After a failure to open the file."""


class BlackBox:
    """
    Writes one run. Never raises to the sampler: what goes wrong is in `error`, and the log says it once.

    The file is there when the constructor returns, unless the disk takes longer than a second.

    Args:
        directory: where the file goes.
        identity: the process being recorded.
        interval_ns: intended distance of two snapshots.
        retention_ns: how far back the file reaches.
        max_bytes: of this run; the oldest segments go when it is passed.
    """

    def __init__(
        self,
        directory: RunDirectory,
        identity: Identity,
        *,
        interval_ns: int,
        retention_ns: int,
        max_bytes: int = RUN_BYTES,
    ) -> None:
        self.error: str | None = None
        self.dropped = 0
        self.run_id: str | None = None
        self._directory = directory
        self._identity = identity
        self._interval_ns = interval_ns
        self._retention_ns = retention_ns
        self._max_bytes = max_bytes
        self._db: sqlite3.Connection | None = None
        self._lock_fd = -1
        self._path: Path
        self._tail: Tail | None = None
        self._segment: Segment | None = None
        """The one that is on disk, for the rows to come."""
        self._segment_id = 0
        self._thread_ids: dict[tuple[int, int, str], int] = {}
        self._retry_ns = 0
        self._number = 0
        """Of the last snapshot, from 1; in the file it is the id of its row."""
        self._on_disk = 0
        """The number of the last one that is on disk."""
        self._fold_after = max(1, FOLD_NS // max(1, interval_ns))
        self._folding = False
        self._given = self._taken = 0
        """Snapshots that went to the writer, and those it is through with."""
        self._caught_up: Future[None] | None = None
        self._gap = False
        """A snapshot was dropped since the last one that was given to the writer."""
        self._busy_since_ns: int | None = None
        """With what the writer was busy at the snapshot before."""
        self._worker = Worker("vitalsd-blackbox")
        wait((self._worker.submit(partial(self._guard, lambda db: None)),), OPEN_WAIT_S)

    def append(self, segment: Segment, position: int) -> None:
        """
        Write the snapshot that `segment` has at `position`.

        Returns at once, unless the one before is still on its way to the disk: then it waits for it up to half
        an interval. So a killed process loses one snapshot at most, and a slow disk delays but never stops the
        sampler. One that hangs is waited for no more once that is clear.
        """
        self._number += 1
        waits = self._given != self._taken
        stuck = (waits or self._folding) and self._stuck()
        if waits and not stuck:
            if self._caught_up is None or self._caught_up.done():
                self._caught_up = self._worker.submit(lambda: None)
            wait((self._caught_up,), min(MAX_WAIT_S, self._interval_ns / 2e9))
        if self._given != self._taken or self._gap or not self._keep(segment, position):
            # Of what was dropped, what each thread burnt is missing: then a segment begins.
            self._gap = not self._post(partial(self._take, self._number, segment, position, self._gap))
            self._given += not self._gap

    def mark(self, mark: Mark) -> None:
        """Write a mark, and what came before it; returns at once."""
        row = (mark.wall_ns, mark.monotonic_ns, mark.label)
        self._post(partial(self._note, "INSERT INTO mark VALUES (?,?,?)", row))

    def event(self, event: Event) -> None:
        """Write an event, and what came before it; returns at once."""
        row = (event.wall_ns, event.monotonic_ns, event.kind, event.detail)
        self._post(partial(self._note, "INSERT INTO event VALUES (?,?,?,?)", row))

    async def hangs(self) -> bool:
        """Whether the disk does not answer."""
        return await self._worker.hangs()

    def forget(self) -> None:
        """In a forked child: let go of the lock, which else would say that a run whose writer died goes on."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def close(self, ended: str, *, crashed: bool = False, timeout_s: float = 1.0) -> None:
        """
        Finish the file.

        Args:
            ended: how the run ended, in words.
            crashed: the target died, and as far as anybody can say not of its own will.
        """
        self._worker.submit(lambda: self._close(ended, crashed))
        self._worker.stop(0 if self._worker.overdue else timeout_s)

    def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all that was given so far is on disk, or cannot be."""
        self._worker.submit(self._fold).result(timeout_s)

    def _keep(self, segment: Segment, position: int) -> bool:
        """Put a snapshot into the tail; False if it must go to the disk."""
        tail = self._tail
        if tail is None or segment is not self._segment:
            return False
        if tail.size_bytes and self._on_disk == self._number - 1 and not tail.clear():
            self._tail = None  # until a segment begins
            tail.close()
            return False
        if not tail.append(_row(self._number, self._segment_id, segment, position)):
            return False
        if not self._folding and self._number - self._on_disk >= self._fold_after:
            self._folding = True
            self._worker.post(self._fold)
        return True

    def _post(self, call: Callable[[], None]) -> bool:
        if self._worker.pending >= MAX_PENDING:
            self.dropped += 1
            return False
        self._worker.post(call)
        return True

    def _stuck(self) -> bool:
        """Whether the writer has been at the same write for too long: seen twice, or the whole process was stopped."""
        before_ns, self._busy_since_ns = self._busy_since_ns, self._worker.busy_since_ns
        if not self._worker.overdue or before_ns != self._busy_since_ns:
            return False
        self._off("the disk does not answer")
        return True

    def _off(self, why: object) -> None:
        reason = f"the black box is off: {why}"
        if self.error is None:
            log.warning("%s (%s)", reason, self._directory.path)
        self.error = reason

    # On the writer's thread

    def _take(self, number: int, segment: Segment, position: int, anew: bool) -> None:
        begins = anew or segment is not self._segment
        if not self._guard(self._write, number, segment, position, begins):
            self.dropped += 1
            self._segment = None
            self._thread_ids.clear()  # what was added in this transaction is not in the file
        elif begins:
            self._guard(self._trim)
        self._taken += 1

    def _note(self, statement: str, row: tuple[object, ...]) -> None:
        self.dropped += not self._guard(lambda db: db.execute(statement, row))
        self._fold()

    def _fold(self) -> None:
        """Write to disk what is in the tail. What cannot be written stays there."""
        if self._tail is not None:
            self._guard(self._write_tail)
        self._folding = False

    def _guard(self, write: Callable[..., object], *what: object) -> bool:
        """Call `write` with the database, which is opened if need be, and `what`; False if that failed."""
        try:
            if self._db is None:
                if time.monotonic_ns() < self._retry_ns:
                    return False
                self._db = self._open_database()
            write(self._db, *what)
            self.error = None
        except (OSError, sqlite3.Error) as error:
            self._off(error)
            self._retry_ns = time.monotonic_ns() + RETRY_NS
            if self._db is not None:
                with suppress(sqlite3.Error):
                    self._db.rollback()
            return False
        return True

    def _open_database(self) -> sqlite3.Connection:
        directory = self._directory
        directory.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(directory.path)
        if status.st_uid != os.geteuid() or not directory.path.is_dir() or directory.path.is_symlink():
            raise OSError(f"{directory.path} is not a directory of this user")
        os.chmod(directory.path, 0o700)
        directory.settle()
        directory.make_room(self._max_bytes)
        stem = f"{self._identity.start_id}-{os.getpid()}"
        for number in range(1000):
            run_id = f"{stem}-{number}" if number else stem
            path = directory.path / f"{run_id}.sqlite"
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock_fd = os.open(path.with_suffix(".lock"), flags, 0o600)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.close(os.open(path, flags | os.O_EXCL, 0o600))
            except (BlockingIOError, FileExistsError):
                os.close(lock_fd)
                continue
            except OSError:
                os.close(lock_fd)
                raise
            break
        else:
            raise OSError(f"{directory.path} has a thousand runs of this process")
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = lock_fd
        try:
            db = self._create(path)
        except (OSError, sqlite3.Error):
            delete_run(path)
            raise
        self.run_id = run_id
        self._thread_ids.clear()
        self._path = path
        return db

    def _create(self, path: Path) -> sqlite3.Connection:
        identity = self._identity
        # A statement is a transaction of its own: no BEGIN and COMMIT to prepare and step for a row by itself.
        db = sqlite3.connect(path, timeout=1, check_same_thread=False, isolation_level=None)
        try:
            # First: else each statement here, before there is a WAL, waits for the disk three times.
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA wal_autocheckpoint = 256")
            db.execute("PRAGMA journal_size_limit = 1048576")
            db.executescript("BEGIN;" + SCHEMA)
            meta = {
                "identity": json.dumps(
                    {
                        "platform": identity.platform,
                        "pid": identity.pid,
                        "name": identity.name,
                        "boot_id": identity.boot_id,
                        "start_key": identity.start_key,
                        "started_unix_ns": identity.started_unix_ns,
                    }
                ),
                "interval_ns": str(self._interval_ns),
                "retention_ns": str(self._retention_ns),
                "writer_pid": str(os.getpid()),
            }
            db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            db.commit()
            db.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            db.close()
            raise
        return db

    def _write(self, db: sqlite3.Connection, number: int, segment: Segment, position: int, begins: bool) -> None:
        if begins and self._tail is None:
            with suppress(OSError):
                self._tail = Tail(tail_link(self._path), self._directory.memory)
        if begins or self._tail is not None:
            db.execute("BEGIN")
            self._insert_tail(db)
        if begins:
            self._segment_id = self._write_segment(db, segment, position)
        insert_rows(db, (_row(number, self._segment_id, segment, position, first=begins),))
        db.commit()
        self._on_disk = number
        self._segment = segment

    def _write_tail(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN")
        last = self._insert_tail(db)
        db.commit()
        self._on_disk = last

    def _insert_tail(self, db: sqlite3.Connection) -> int:
        """The number of the last row that is now in the file."""
        tail = self._tail
        rows = [row for row in tail.rows() if row.id > self._on_disk] if tail is not None else ()
        insert_rows(db, rows)
        return rows[-1].id if rows else self._on_disk

    def _write_segment(self, db: sqlite3.Connection, segment: Segment, position: int) -> int:
        head = segment.head
        ids = array("I")
        for key in zip(head.tids, head.births, head.names, strict=True):
            thread_id = self._thread_ids.get(key)
            if thread_id is None:
                thread_id = db.execute("INSERT INTO thread (tid, birth, name) VALUES (?,?,?)", key).lastrowid
                assert thread_id is not None
                self._thread_ids[key] = thread_id
            ids.append(thread_id)
        constants = {
            "cpu_grain_ns": head.cpu_grain_ns,
            "thread_grain_ns": head.thread_grain_ns,
            "thread_lag_ns": head.thread_lag_ns,
            "source": head.source,
            "image": repr(head.image),
        }
        cpu_ns = array("Q", segment.thread_cpu_ns(position)).tobytes()
        cursor = db.execute(
            "INSERT INTO segment (threads, cpu_ns, constants) VALUES (?,?,?)",
            (ids.tobytes(), cpu_ns, json.dumps(constants)),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _trim(self, db: sqlite3.Connection) -> None:
        """Drop what is older than the retention, and the oldest eighth when the file is full."""
        (size,) = db.execute(
            "SELECT (page_count - freelist_count) * page_size"
            " FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
        ).fetchone()
        first, last = db.execute("SELECT min(id), max(id) FROM segment").fetchone()
        keep = first
        if size > self._max_bytes * 7 // 8:
            keep = first + (last - first) // 8 + 1
        if self._interval_ns:
            frames = max(2, self._retention_ns // self._interval_ns)
            row = db.execute("SELECT segment FROM frame ORDER BY id DESC LIMIT 1 OFFSET ?", (frames,)).fetchone()
            keep = max(keep, row[0]) if row else keep
        keep = min(keep, last)
        if keep > first:
            db.execute("BEGIN")
            db.execute("DELETE FROM frame WHERE segment < ?", (keep,))
            db.execute("DELETE FROM segment WHERE id < ?", (keep,))
            self._forget_threads(db)
            db.commit()

    def _forget_threads(self, db: sqlite3.Connection) -> None:
        used: set[int] = set()
        for (threads,) in db.execute("SELECT threads FROM segment"):
            used.update(array("I", threads))
        gone = [(thread_id,) for thread_id in self._thread_ids.values() if thread_id not in used]
        db.executemany("DELETE FROM thread WHERE id = ?", gone)
        self._thread_ids = {key: thread_id for key, thread_id in self._thread_ids.items() if thread_id in used}

    def _close(self, ended: str, crashed: bool) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                meta = [("ended", ended)] + ([("crashed", "1")] if crashed else [])
                self._db.execute("BEGIN")
                self._insert_tail(self._db)
                self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)
                self._db.commit()
                if self._tail is not None:
                    self._tail.remove()
            self._db.close()
            self._db = None
        if self._tail is not None:
            self._tail.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _row(number: int, segment_id: int, segment: Segment, position: int, *, first: bool = False) -> Row:
    """The snapshot that `segment` has at `position`; as the first of a segment, nobody has moved."""
    indexes, burnt = NOBODY if first else segment.moves[position]
    numbers = bytearray(segment.row(position))  # for which sqlite3 looks for no adapter, as it does for bytes
    if indexes is not None:
        numbers += indexes
    numbers += burnt
    return Row(number, segment_id, numbers, None if indexes is None else len(indexes), burnt.typecode)
