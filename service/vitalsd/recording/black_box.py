"""
Give snapshots, marks and events to the thread that writes the black box, and count what is dropped.

`vitalsd.recording.black_box_writer` has what runs on that thread. A snapshot is given to it at once and is on disk
within milliseconds: a sidecar that is killed loses the snapshot under way, or those that wait for a slow disk. A power
failure also loses what the kernel had not yet written to the disk.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from threading import Lock

from vitalsd.contract.application import Application
from vitalsd.recording.black_box_writer import BlackBoxWriter
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.segment import Segment
from vitalsd.recording.series import Event, Mark
from vitalsd.snapshot import Identity
from vitalsd.worker_thread import Worker

__all__ = ["BlackBox"]

log = logging.getLogger("vitalsd.recording.black_box")

RUN_BYTES = 16 << 20
"""Size of the file of one run at which its oldest segments are deleted, bytes."""
MAX_PENDING = 64
"""Snapshots, marks and events that may wait for a slow disk; more are dropped and counted."""
MAX_WAIT_S = 0.05
"""The sampler waits at most this long for the write of the snapshot before, s, and at most half an interval."""
OPEN_WAIT_S = 1.0
"""The constructor waits at most this long for the file, s: the disk may hang."""
HANGS = "the black box is off: the disk does not answer"
"""The error while a write does not return."""


class BlackBox:
    """
    Record one run on disk. No method raises to the sampler: `error` has what failed, and the log has it once.

    The file is there when the constructor returns, unless the disk takes longer than a second. `append`, `write_event`,
    `identify`, `end` and `close` are called by one thread, the sampler's; the other methods by any.

    Args:
        directory: where the file goes.
        identity: the process being recorded.
        interval_ns: intended distance of two snapshots.
        retention_ns: how far back the file reaches.
        max_bytes: limit of the file; beyond it the oldest segments are deleted.
        application: the application that the client named.

    Raises:
        NoThreadError: the system gives no more threads.
    """

    def __init__(
        self,
        directory: RunDirectory,
        identity: Identity,
        *,
        interval_ns: int,
        retention_ns: int,
        max_bytes: int = RUN_BYTES,
        application: Application = Application(),
    ) -> None:
        self._directory = directory
        self._interval_ns = interval_ns
        self._writer = BlackBoxWriter(
            directory,
            identity,
            interval_ns=interval_ns,
            retention_ns=retention_ns,
            max_bytes=max_bytes,
            application=application,
        )
        self._refused = 0
        """Snapshots, marks and events for which there was no room in the queue."""
        self._counting = Lock()
        """Held while `_refused` changes: the sampler and the threads that set marks do that."""
        self._submitted = 0
        """Snapshots that were given to the writer. Only the sampler uses this and the attributes below."""
        self._caught_up: Future[None] | None = None
        """Done when the writer has done all calls before it."""
        self._gap = False
        """Whether a snapshot was dropped since the last one that was given to the writer."""
        self._busy_since_ns: int | None = None
        """Start of the call that kept the writer busy at the snapshot before, monotonic time, ns."""
        self._hung_since_ns: int | None = None
        """Start of the call that does not return, monotonic time, ns; ``None``: there is none."""
        self.worker = Worker("vitalsd-blackbox")
        """The thread that writes."""
        wait((self.worker.submit(self._writer.open),), OPEN_WAIT_S)

    @property
    def run_id(self) -> str | None:
        """Id of the run; ``None``: no file could be made yet."""
        return self._writer.run_id

    @property
    def error(self) -> str | None:
        """Why the black box is off; ``None``: it is not."""
        if self._hung_since_ns is not None and self._hung_since_ns == self.worker.busy_since_ns:
            return HANGS
        return self._writer.error

    @property
    def dropped(self) -> int:
        """Snapshots, marks and events that did not get to disk."""
        return self._refused + self._writer.dropped

    @property
    def is_lagging(self) -> bool:
        """Whether the disk is slow."""
        return self.worker.pending >= 2

    def append(self, segment: Segment, position: int) -> None:
        """
        Write the snapshot that `segment` has at `position`.

        Return at once, unless the snapshot before is not yet on disk: then wait for it, for `MAX_WAIT_S` and half an
        interval at most. So a killed process loses one snapshot at most, and a slow disk delays the sampler but never
        stops it. There is no wait for a disk that is known to hang.
        """
        if self._submitted != self._writer.finished and not self._hangs_again():
            if self._caught_up is None or self._caught_up.done():
                self._caught_up = self.worker.submit(lambda: None)
            wait((self._caught_up,), min(MAX_WAIT_S, self._interval_ns / 2e9))
        # What each thread used during a dropped snapshot is missing from the next one: a segment begins there.
        self._gap = not self._post(partial(self._writer.write_snapshot, segment, position, self._gap))
        self._submitted += not self._gap

    def write_mark(self, mark: Mark) -> "Future[None] | None":
        """
        Write a mark; returns at once.

        Returns:
            What is done when it is written; ``None`` if it was dropped.
        """
        return None if self._is_full() else self.worker.submit(partial(self._writer.write_mark, mark))

    def write_event(self, event: Event) -> None:
        """Write an event; returns at once."""
        self._post(partial(self._writer.write_event, event))

    def identify(self, identity: Identity) -> None:
        """Write the process's new identity, after exec for example; returns at once."""
        self._writer.identity = identity
        self._post(self._writer.write_identity)

    def end(self, ended: str, *, crashed: bool) -> None:
        """
        Write how the run ended, though marks may follow; returns at once.

        Args:
            ended: how it ended, in words.
            crashed: the target died and, as far as is known, did not exit by itself.
        """
        self._post(partial(self._writer.end, ended, crashed))

    def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all that was given so far is on disk, or cannot be."""
        self.worker.submit(self._writer.write_identity).result(timeout_s)

    def close(self, ended: str, *, crashed: bool = False, timeout_s: float = 1.0) -> None:
        """Write how the run ended, see `end`, and finish the file."""
        self.worker.submit(partial(self._writer.close, ended, crashed))
        self.worker.stop(0 if self.worker.overdue else timeout_s)

    def close_in_child(self) -> None:
        """Release the lock in a forked child: held, it would mark the run as being written after its writer died."""
        self._writer.close_in_child()

    def _post(self, call: Callable[[], None]) -> bool:
        """Give `call` to the writer; without backpressure: False, and counted, if too much waits for it already."""
        if self._is_full():
            return False
        self.worker.post(call)
        return True

    def _is_full(self) -> bool:
        full = self.worker.pending >= MAX_PENDING
        if full:
            with self._counting:
                self._refused += 1
        return full

    def _hangs_again(self) -> bool:
        """
        Return whether the writer has been at one write for too long.

        It must have been at the same write at the snapshot before: otherwise the whole process may have been stopped.
        """
        before_ns, self._busy_since_ns = self._busy_since_ns, self.worker.busy_since_ns
        if not self.worker.overdue or before_ns != self._busy_since_ns:
            return False
        if self.error is None:
            log.warning("%s (%s)", HANGS, self._directory.path)
        self._hung_since_ns = self._busy_since_ns
        return True
