"""
Write the database of one run; `vitalsd.recording.run_reader` has the format and reads it back.

In WAL mode a commit is a ``write`` without ``fsync``: committed data survives the process, and only a power failure
loses what the kernel had not yet written to the disk.
"""

import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitalsd.contract.application import Application
from vitalsd.contract.host import RecordedHost
from vitalsd.discovery.directories import EndpointError, private_directory
from vitalsd.recording.run_database import SCHEMA, SCHEMA_VERSION
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_files import APPLICATION_ID, delete_run, new_run
from vitalsd.recording.segment import NO_DELTAS, Segment, ThreadDeltas
from vitalsd.recording.series import MAX_EVENTS, MAX_MARKS, Event, Mark
from vitalsd.recording.sqlite import sqlite3
from vitalsd.snapshot import Identity

__all__ = ["RunFile"]


class RunFile:
    """
    Write a new file, and hold its lock until it is closed.

    Each method is one transaction: if it fails, it changes nothing.

    Args:
        directory: where the file goes; it is made if need be, and its oldest runs are deleted to make room.
        identity: the process being recorded.
        lives: whether that process lives.
        interval_ns: intended distance of two snapshots.
        retention_ns: how far back the file reaches.
        max_bytes: limit of the file; beyond it the oldest segments are deleted.
        application: the application that the client named.

    Raises:
        OSError, sqlite3.Error: it cannot be made; from any other method, it cannot be written.
    """

    def __init__(
        self,
        directory: RunDirectory,
        identity: Identity,
        *,
        lives: bool,
        interval_ns: int,
        retention_ns: int,
        max_bytes: int,
        application: Application = Application(),
    ) -> None:
        self._application = application
        self.identity = identity
        """The identity of the process that the file has."""
        self._interval_ns = interval_ns
        self._retention_ns = retention_ns
        self._max_bytes = max_bytes
        self._thread_ids: dict[tuple[int, int, str], int] = {}
        self._children = 0
        """Number of children of the last segment that the file has."""
        _prepare(directory.path)
        directory.recover_crashed_runs(identity.start_id if lives else None)
        directory.make_room(max_bytes)
        self.path, self._lock_fd = new_run(directory.path, f"{identity.start_id}-{os.getpid()}")
        try:
            self._db = self._create(identity)
        except (OSError, sqlite3.Error):
            delete_run(self.path)
            self.release_lock()
            raise

    def insert_segment(self, segment: Segment, position: int) -> int:
        """
        Write a segment, and its first row for the snapshot that it has at `position`.

        Returns:
            The id of the segment.
        """
        known = len(self._thread_ids)
        self._children = 0
        try:
            with self._transaction():
                segment_id = self._insert_segment_row(segment, position)
                self._insert_children(segment_id, segment)
                self._insert_frame(segment_id, segment, position, NO_DELTAS)
        except BaseException:
            for key in list(self._thread_ids)[known:]:  # the transaction failed: they are not in the file
                del self._thread_ids[key]
            raise
        return segment_id

    def insert_snapshot(self, segment_id: int, segment: Segment, position: int) -> None:
        """Write the snapshot that a segment has at `position`; the segment is in the file as `segment_id`."""
        if self._children == len(segment.children):
            self._insert_frame(segment_id, segment, position, segment.deltas[position])
            return
        known = self._children
        try:
            with self._transaction():
                self._insert_children(segment_id, segment)
                self._insert_frame(segment_id, segment, position, segment.deltas[position])
        except BaseException:
            self._children = known
            raise

    def insert_mark(self, mark: Mark) -> None:
        """Write a mark. Beyond `MAX_MARKS` the oldest are deleted, some at a time."""
        number = self._db.execute("INSERT INTO mark VALUES (?,?,?)", mark).lastrowid
        assert number is not None
        if number % MAX_MARKS == 0:
            self._db.execute("DELETE FROM mark WHERE rowid <= ?", (number - MAX_MARKS,))

    def insert_event(self, event: Event) -> None:
        """Write an event. Beyond `MAX_EVENTS` the oldest are deleted, some at a time."""
        number = self._db.execute("INSERT INTO event VALUES (?,?,?,?,?,?,?,?)", event).lastrowid
        assert number is not None
        if number % MAX_EVENTS == 0:
            self._db.execute("DELETE FROM event WHERE rowid <= ?", (number - MAX_EVENTS,))

    def set_identity(self, identity: Identity) -> None:
        """Write the current identity of the process."""
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'identity'", (json.dumps(identity._asdict()),))
        self.identity = identity

    def trim(self) -> None:
        """Delete segments beyond the retention, and the oldest eighth if the file is 7/8 full."""
        db = self._db
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
            with self._transaction():
                db.execute("DELETE FROM frame WHERE segment < ?", (keep,))
                db.execute("DELETE FROM child WHERE segment < ?", (keep,))
                db.execute("DELETE FROM segment WHERE id < ?", (keep,))
                used = self._delete_threads()
            self._thread_ids = {key: thread_id for key, thread_id in self._thread_ids.items() if thread_id in used}

    def set_end(self, ended: str, crashed: bool) -> None:
        """Write how the run ended."""
        meta = [("ended", ended)] + ([("crashed", "1")] if crashed else [])
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta)

    def close(self) -> None:
        """Close the file. Without `set_end` before it, the run counts as crashed."""
        self._db.close()
        self.release_lock()

    def release_lock(self) -> None:
        """Release only the lock, as in a forked child, which must not use the database."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
            self._db.commit()
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.rollback()
            raise

    def _create(self, identity: Identity) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=1, check_same_thread=False, isolation_level=None)
        try:
            # This comes first: without it, each statement before WAL mode waits for the disk three times.
            db.execute("PRAGMA synchronous = OFF")
            # Without it, a process that is killed here leaves a rollback journal, and a run with one is refused.
            db.execute("PRAGMA journal_mode = MEMORY")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA wal_autocheckpoint = 256")
            db.execute("PRAGMA journal_size_limit = 1048576")
            db.executescript("BEGIN;" + SCHEMA)
            meta = {
                "identity": json.dumps(identity._asdict()),
                "interval_ns": str(self._interval_ns),
                "retention_ns": str(self._retention_ns),
                "writer_pid": str(os.getpid()),
                "host": json.dumps(RecordedHost.this()._asdict()),
            }
            meta |= {key: value for key, value in self._application._asdict().items() if value is not None}
            db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            db.commit()
            db.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            db.close()
            raise
        return db

    def _insert_segment_row(self, segment: Segment, position: int) -> int:
        first = segment.first
        ids = array("I")
        for key in zip(first.roster.tids, first.roster.births, first.roster.names, strict=True):
            thread_id = self._thread_ids.get(key)
            if thread_id is None:
                thread_id = self._db.execute("INSERT INTO thread (tid, birth, name) VALUES (?,?,?)", key).lastrowid
                assert thread_id is not None
                self._thread_ids[key] = thread_id
            ids.append(thread_id)
        constants = {
            "cpu_grain_ns": first.cpu_grain_ns,
            "thread_grain_ns": first.thread_grain_ns,
            "thread_lag_ns": first.thread_lag_ns,
            "source": first.source,
            "image": repr(first.image),
            "reading": first.reading,
            "cpu_count": first.cpu_count,
            "gauges": segment.gauge_names,
        }
        cpu_ns, waits = array("Q", segment.thread_cpu_ns(position)).tobytes(), segment.thread_waits(position)
        waits_blob = None if waits is None else array("Q", waits).tobytes()
        cursor = self._db.execute(
            "INSERT INTO segment (threads, cpu_ns, waits, constants) VALUES (?,?,?,?)",
            (ids.tobytes(), cpu_ns, waits_blob, json.dumps(constants)),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _insert_children(self, segment_id: int, segment: Segment) -> None:
        """Write the children of a segment that the file does not have yet."""
        new = segment.children[self._children :]
        self._db.executemany(
            "INSERT INTO child (segment, pid, birth, name, found_ns) VALUES (?,?,?,?,?)",
            [(segment_id, *child) for child in new],
        )
        self._children += len(new)

    def _insert_frame(self, segment_id: int, segment: Segment, position: int, deltas: ThreadDeltas) -> None:
        indexes, used_ns, waits = deltas
        numbers = bytearray(segment.scalars_at(position))  # faster than bytes, for which sqlite3 searches an adapter
        if indexes is not None:
            numbers += indexes
        numbers += used_ns
        code: str = used_ns.typecode
        if waits is not None:
            numbers += waits
            code += waits.typecode
        moved = None if indexes is None else len(indexes)
        children, gauges = segment.child_numbers.get(position), segment.gauge_values.get(position)
        # One statement is a transaction of its own, and saves the execution of BEGIN and COMMIT.
        self._db.execute(
            "INSERT INTO frame (segment, numbers, moved, code, children, gauges) VALUES (?,?,?,?,?,?)",
            (segment_id, numbers, moved, code, children and children.tobytes(), gauges and gauges.tobytes()),
        )

    def _delete_threads(self) -> set[int]:
        """Delete the threads that no segment has; return the ids of the others."""
        used: set[int] = set()
        for (threads,) in self._db.execute("SELECT threads FROM segment"):
            used.update(array("I", threads))
        gone = [(thread_id,) for thread_id in self._thread_ids.values() if thread_id not in used]
        self._db.executemany("DELETE FROM thread WHERE id = ?", gone)
        return used


def _prepare(path: Path) -> None:
    """Make the directory of runs, or check it. Raise `OSError`."""
    try:
        private_directory(path)
    except EndpointError as error:
        raise OSError(f"{error}; set VITALSD_STATE_DIR to use another") from None
