"""
Read one target and give the snapshots to its recorder, on the sampler's thread.

A snapshot for the recorder also serves callers, but ends no window: its names of threads may be 2 s old.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace

from vitalsd.recording.recorder import Recorder, RecorderConfig
from vitalsd.sampling.signals_reader import SignalsReader
from vitalsd.snapshot import Identity, Part, Snapshot, contradiction
from vitalsd.sources.base import Source, SourceError, TargetGoneError
from vitalsd.worker_thread import Worker

__all__ = ["SNAPSHOT_REUSE_NS", "TargetReader"]

SNAPSHOT_REUSE_NS = 10_000_000
"""A snapshot up to this old serves another caller and the recorder too, ns: 10 ms."""


class TargetReader:
    """
    Open, read and close one target, on the thread of `worker`.

    Args:
        open_source: opens the target.
        recording: how to record it; ``None``: it is not recorded.
        worker: calls the recorder at each interval.
    """

    def __init__(self, open_source: Callable[[], Source], recording: RecorderConfig | None, worker: Worker) -> None:
        self._open_source = open_source
        self._recording = recording
        self._worker = worker
        self._source: Source | None = None
        self._last: Snapshot | None = None
        self._has_current_names = False
        """Whether the names in the last snapshot were read with it; the recorder does not need that."""
        self._reading = 0
        """See `Snapshot.reading`."""
        self._contradicted = False
        """Whether the last two snapshots contradicted each other."""
        self._closed = False
        self.identity: Identity | None = None
        """Identity of the target; ``None``: it has not been opened."""
        self.recorder: Recorder | None = None
        self.signals: SignalsReader | None = None
        """What looks at the heartbeats and gauges of the target; ``None``: it is not recorded, or has no page."""
        self.snapshots_taken = 0

    @property
    def records(self) -> bool:
        """Whether the target is recorded once it is opened."""
        return self._recording is not None and self._recording.interval_s > 0

    def open(self) -> Identity:
        """Open the target, and start to record it, unless that has been done. Raise `SourceError`."""
        if self._source is None:
            self._source = self._open_source()
        identity = self._source.identity()
        if self._recording is not None and self.records and self.recorder is None:
            self.recorder = Recorder(identity, self._recording)
            if self._recording.page is not None:
                is_inside = identity.pid == os.getpid()
                self.signals = SignalsReader(
                    self._recording.page, self._source, self.recorder, self._worker, is_inside=is_inside
                )
            self._worker.every(self.recorder.interval_ns, self._record)
        self.identity = identity
        return identity

    def last_since(self, not_before_ns: int, parts: Part) -> Snapshot | None:
        """
        Return the last snapshot if it is good enough; from any thread.

        Args:
            not_before_ns: monotonic time at which it must have been taken, or later.
            parts: what it must have beside its counters.
        """
        last = self._last
        if last is not None and last.monotonic_ns >= not_before_ns and not parts & ~last.parts:
            return last
        return None

    def take(self, parts: Part, *, names: bool = True) -> Snapshot:
        """Read the target. Raise `SourceError`, after the end of the target has been recorded."""
        assert self._source is not None
        if self._closed:
            raise self.gone()
        try:
            why, last = None, self._read(parts, names)
            if self._last is not None and (why := contradiction(self._last, last)) is not None:
                self._reading += 1
                self._source.restart()
                last = self._read(parts, names)
            self._last, self._has_current_names = last, names
            self.identity = self._source.identity()
        except TargetGoneError as error:
            # A caller that gets the error may at once read in the record how the target ended, and how long it hung.
            if self.signals is not None:
                self.signals.close()
            if self.recorder is not None:
                self.recorder.failed(error)
            raise
        if self.recorder is not None:
            self.recorder.identify(self.identity)
            if why is not None and not self._contradicted:  # one event, or a kernel that miscounts fills the record
                self.recorder.contradicted(why, last)
        self._contradicted = why is not None
        return last

    def take_since(self, not_before_ns: int, parts: Part) -> Snapshot:
        """Return the last snapshot of a window, which has the current names; see `last_since`. Raise as `take`."""
        last = self.last_since(not_before_ns, parts)
        return last if last is not None and self._has_current_names else self.take(parts)

    def gone(self) -> TargetGoneError:
        """Return the error for a target that is not read any more."""
        pid = self.identity.pid if self.identity else None
        return TargetGoneError(f"target {pid} has exited, or is not measured any more")

    def close(self) -> None:
        """End the record and release the target."""
        if self.recorder is not None:
            if self.recorder.ended is None:
                # One last read: a target that has just died must not count as one that lives on.
                self._last = None
                self._record()
            if self.signals is not None:
                self.signals.close()
            self.recorder.close()
        self._closed = True
        if self._source is not None:
            self._source.close()

    def discard(self) -> None:
        """Drop target and record, once the thread has ended."""
        self._source = self._last = self.recorder = self.signals = None

    def _read(self, parts: Part, names: bool) -> Snapshot:
        assert self._source is not None
        snapshot = self._source.snapshot(parts=parts, names=names)
        self.snapshots_taken += 1
        return replace(snapshot, reading=self._reading) if self._reading else snapshot

    def _record(self) -> bool:
        """Record a snapshot; False if there will be no other."""
        assert self.recorder is not None
        if self._closed:  # the thread has released the target but not yet ended
            return False
        try:
            parts = self.recorder.next_parts(time.monotonic_ns())
            last = self.last_since(time.monotonic_ns() - SNAPSHOT_REUSE_NS + 1, parts)
            snapshot = last if last is not None else self.take(parts, names=False)
        except SourceError as error:
            continues = self.recorder.failed(error)
            if self.signals is not None:
                self.signals.look() if continues else self.signals.close()
            return continues
        gauges: tuple[tuple[str, float], ...] = ()
        before = self.recorder.record.last
        try:
            if self.signals is not None:
                if before is not None and None not in (before.image, snapshot.image) and before.image != snapshot.image:
                    self.signals.executed()
                gauges = self.signals.look()
        finally:  # whatever fails there, the snapshot is recorded
            self.recorder.observe(replace(snapshot, gauges=gauges) if gauges else snapshot)
        return True
