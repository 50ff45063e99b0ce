"""
Write the black box, on a thread of its own: open the file of a run, and replace it if it is deleted.

Each snapshot is one transaction. A commit is a ``write`` without ``fsync``, so it survives the process.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

from vitalsd.contract.application import Application
from vitalsd.discovery.atomic_file import is_gone
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_writer import RunFile
from vitalsd.recording.segment import Segment
from vitalsd.recording.series import Event, Mark
from vitalsd.recording.sqlite import sqlite3
from vitalsd.snapshot import Identity

__all__ = ["BlackBoxWriter"]

log = logging.getLogger("vitalsd.recording.black_box")

RETRY_NS = 2_000_000_000
"""Least time between two attempts to open the file, ns."""


class BlackBoxWriter:
    """
    Write one run. Each method but `close_in_child` runs on the thread of the black box, and raises no disk error.

    That thread sets the attributes and other threads read them; `identity` is set by the sampler.

    Args:
        directory: where the file goes.
        identity: the process being recorded.
        interval_ns: intended distance of two snapshots.
        retention_ns: how far back the file reaches.
        max_bytes: limit of the file; beyond it the oldest segments are deleted.
        application: the application that the client named.
    """

    def __init__(
        self,
        directory: RunDirectory,
        identity: Identity,
        *,
        interval_ns: int,
        retention_ns: int,
        max_bytes: int,
        application: Application,
    ) -> None:
        self.identity = identity
        """Current identity of the process. The sampler sets it; the file has it after the next write that succeeds."""
        self.error: str | None = None
        """Why nothing can be written; ``None``: the last write succeeded."""
        self.dropped = 0
        """Snapshots, marks and events that could not be written."""
        self.finished = 0
        """Snapshots that were written or dropped."""
        self.run_id: str | None = None
        self._directory = directory
        self._create = partial(
            RunFile,
            directory,
            interval_ns=interval_ns,
            retention_ns=retention_ns,
            max_bytes=max_bytes,
            application=application,
        )
        self._file: RunFile | None = None
        self._retry_ns = 0
        """Monotonic time before which the file is not opened again."""
        self._segment: Segment | None = None
        """The segment that the file has as `_segment_id`; the next snapshots are added to it."""
        self._segment_id = 0
        self._ending: tuple[str, bool] | None = None
        """Arguments of `end`, for a file that replaces a deleted one; ``None``: the run has not ended."""

    def open(self) -> None:
        """Make the file."""
        self._with_file(lambda file: None)

    def write_snapshot(self, segment: Segment, position: int, after_gap: bool) -> None:
        """
        Write the snapshot that `segment` has at `position`.

        Args:
            segment: a segment of the record in memory.
            position: the index of the snapshot in it.
            after_gap: whether the snapshot before is missing.
        """
        self._leave_deleted_file()
        begins = after_gap or segment is not self._segment
        write = self._begin_segment if begins else self._continue_segment
        if not self._with_file(write, segment, position):
            self.dropped += 1
            self._segment = None
        elif begins:
            self._with_file(RunFile.trim)
        self.finished += 1

    def write_mark(self, mark: Mark) -> None:
        """Write a mark."""
        self._write(RunFile.insert_mark, mark)

    def write_event(self, event: Event) -> None:
        """Write an event."""
        self._write(RunFile.insert_event, event)

    def write_identity(self) -> None:
        """Write `identity` unless it is in the file; a write that fails is repeated at the next call."""
        self._leave_deleted_file()
        if self._file is not None and self._file.identity != self.identity:
            self._with_file(RunFile.set_identity, self.identity)

    def end(self, ended: str, crashed: bool) -> None:
        """Write how the run ended; more may follow."""
        self._leave_deleted_file()
        self._ending = ended, crashed
        self._with_file(RunFile.set_end, ended, crashed)

    def close(self, ended: str, crashed: bool) -> None:
        """Write how the run ended, and release the file."""
        if self._file is not None:
            if self._file.identity != self.identity:
                self._with_file(RunFile.set_identity, self.identity)
            self._with_file(RunFile.set_end, ended, crashed)
            self._release()

    def close_in_child(self) -> None:
        """Release the lock of the file, in a forked child."""
        if self._file is not None:
            self._file.release_lock()

    def _write(self, write: Callable[..., object], what: Mark | Event) -> None:
        self._leave_deleted_file()
        if not self._with_file(write, what):
            self.dropped += 1
        self.write_identity()

    def _begin_segment(self, file: RunFile, segment: Segment, position: int) -> None:
        self._segment_id = file.insert_segment(segment, position)
        self._segment = segment

    def _continue_segment(self, file: RunFile, segment: Segment, position: int) -> None:
        file.insert_snapshot(self._segment_id, segment, position)

    def _with_file(self, write: Callable[..., object], *arguments: object) -> bool:
        """Open the file if need be, and call `write` with it and `arguments`; False if that failed."""
        try:
            if self._file is None:
                if time.monotonic_ns() < self._retry_ns:
                    return False
                self._file = self._create(self.identity, lives=self._ending is None)
                self.run_id = self._file.path.stem
                if self._ending is not None:
                    self._file.set_end(*self._ending)
            write(self._file, *arguments)
            self.error = None
        except (OSError, sqlite3.Error) as error:
            self._retry_ns = time.monotonic_ns() + RETRY_NS
            reason = f"the black box is off: {error}"
            if self.error is None:
                log.warning("%s (%s)", reason, self._directory.path)
            self.error = reason
            return False
        return True

    def _leave_deleted_file(self) -> None:
        """Release the file if it was deleted; the next write makes a new one."""
        if self._file is not None and is_gone(self._file.path):
            self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._segment = None
