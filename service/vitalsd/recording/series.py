"""
Keep the last minutes of one process in memory, bounded in time and in bytes.

This is a time series in segments of up to 64 snapshots with one set of threads: the first snapshot whole, of the others
only what the threads did since the one before (`vitalsd.recording.segment`). The oldest snapshots are evicted by
segment. A change of the set of threads, or of the program, begins a new segment.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from vitalsd.contract.limits import LABEL_CHARACTERS
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.segment import Segment
from vitalsd.snapshot import Identity, Measurement, Snapshot, ThreadRoster, measure

__all__ = ["MAX_EVENTS", "MAX_MARKS", "Event", "EventKind", "Mark", "Record"]

MAX_MARKS = 1000
"""Limit of the marks that are kept; beyond it the oldest is dropped."""
MAX_EVENTS = 1000
"""Limit of the events that are kept; beyond it the oldest is dropped."""
MAX_WINDOWS = 8
"""Limit of the measurements that are kept for callers with the same window: their answers may take megabytes."""

ROSTER_BYTES = 24
"""Memory of a roster for each of its threads, bytes."""
THREAD_BYTES = 120
"""Memory of the ids and the name of a thread that the roster before did not have, bytes."""

EventKind = Literal[
    "missed",
    "suspended",
    "clock_set",
    "stopped",
    "continued",
    "executed",
    "inconsistent",
    "child_reaped",
    "exited",
    "failed",
    "hang",
]


class Mark(NamedTuple):
    """Hold a label that a client put on the recorder's clock."""

    wall_ns: int
    monotonic_ns: int
    label: str


class Event(NamedTuple):
    """
    Hold the reason, in words, why the record differs from evenly spaced snapshots, or a hang.

    A hang has the time at which it began, and the last four values.
    """

    wall_ns: int
    monotonic_ns: int
    kind: EventKind
    detail: str
    duration_ns: int | None = None
    heartbeat: str | None = None
    cause: HangCause | None = None
    ongoing: bool = False

    @property
    def end_ns(self) -> int:
        """Monotonic time of its end, ns."""
        return self.monotonic_ns + (self.duration_ns or 0)

    def replaces(self, other: "Event") -> bool:
        """Return whether this is a later report of the same hang."""
        return self.heartbeat is not None and self[1:3] == other[1:3] and self.heartbeat == other.heartbeat


class Record:
    """
    Keep the last minutes of one process. One thread writes, any thread reads.

    Args:
        identity: the recorded process.
        interval_ns: the intended distance of two snapshots; 0 if there is none.
        retention_ns: how far back it reaches, to within a segment.
        max_bytes: limit of its memory; with many threads it reaches less far back.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        interval_ns: int,
        retention_ns: int = 900_000_000_000,
        max_bytes: int = 32 << 20,
    ) -> None:
        self.identity = identity
        self.interval_ns = interval_ns
        self.retention_ns = retention_ns
        self.max_bytes = max_bytes
        self.marks: deque[Mark] = deque(maxlen=MAX_MARKS)
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._segments: deque[Segment] = deque()
        self._last: Snapshot | None = None
        self._size_bytes = 0
        self._windows: dict[int, Measurement] = {}
        self._lock = threading.Lock()

    @property
    def last(self) -> Snapshot | None:
        """The latest snapshot."""
        return self._last

    @property
    def size_bytes(self) -> int:
        """Memory of the snapshots, bytes, as counted for `max_bytes`."""
        return self._size_bytes

    def __len__(self) -> int:
        """Return the number of snapshots."""
        with self._lock:
            return sum(map(len, self._segments))

    def append(self, snapshot: Snapshot) -> Segment:
        """
        Add a snapshot, taken after all others; evict the oldest segments beyond a limit.

        Returns:
            The segment that has it as its last snapshot.
        """
        with self._lock:
            segment = self._segments[-1] if self._segments else None
            if segment is None or not segment.accepts(snapshot):
                roster, known = snapshot.roster, ThreadRoster()
                if segment is not None:
                    known = segment.first.roster
                    roster = roster.sharing(known)
                segment = Segment(replace(snapshot, roster=roster))
                if not roster.has_same_threads(known):
                    new = len({*roster.tids}.difference(known.tids))
                    segment.size_bytes += ROSTER_BYTES * len(roster) + THREAD_BYTES * new
                self._segments.append(segment)
                self._size_bytes += segment.size_bytes
            before = segment.size_bytes
            segment.append(snapshot, self._last)
            self._size_bytes += segment.size_bytes - before
            self._last = snapshot
            self._trim(snapshot.monotonic_ns - self.retention_ns)
            return segment

    def _trim(self, oldest_ns: int) -> None:
        while len(self._segments) > 1 and (
            self._size_bytes > self.max_bytes or self._segments[1].scalars[0] <= oldest_ns
        ):
            self._size_bytes -= self._segments.popleft().size_bytes

    def restore(self, segment: Segment) -> None:
        """Add a whole segment as it was stored; the limits do not apply to a record that is read back."""
        with self._lock:
            self._segments.append(segment)
            self._size_bytes += segment.size_bytes
            self._last = segment.snapshot(len(segment) - 1)

    def add_mark(self, label: str) -> Mark:
        """
        Put a label on the clock, now. Beyond `MAX_MARKS` the oldest is dropped.

        Raises:
            ValueError: the label is empty, longer than `LABEL_CHARACTERS` or not printable.
        """
        if not isinstance(label, str):
            raise ValueError("a label is text")
        if not 0 < len(label) <= LABEL_CHARACTERS:
            raise ValueError(f"a label has 1 to {LABEL_CHARACTERS} characters; this has {len(label)}")
        if not label.isprintable():
            raise ValueError("a label is one line of printable characters")
        mark = Mark(time.time_ns(), time.monotonic_ns(), label)
        self.marks.append(mark)
        return mark

    def add_event(self, kind: EventKind, detail: str, *, at: Snapshot | None = None) -> Event:
        """Note what happened, now or at a snapshot."""
        wall_ns, monotonic_ns = (at.wall_ns, at.monotonic_ns) if at else (time.time_ns(), time.monotonic_ns())
        event = Event(wall_ns, monotonic_ns, kind, detail)
        self.events.append(event)
        return event

    def put_hang(self, hang: Event) -> Event | None:
        """Note a hang. Return the earlier report of it, which this one replaces; ``None``: there was none."""
        for i in range(len(self.events) - 1, -1, -1):
            before = self.events[i]
            if hang.replaces(before):
                self.events[i] = hang
                return before
        self.events.append(hang)
        return None

    def at_or_before(self, monotonic_ns: int) -> Snapshot | None:
        """Return the latest snapshot not after `monotonic_ns`; the oldest one if all are; ``None`` if empty."""
        with self._lock:
            for segment in reversed(self._segments):
                times = segment.column("monotonic_ns")
                if times[0] <= monotonic_ns:
                    position = next(i for i in range(len(times) - 1, -1, -1) if times[i] <= monotonic_ns)
                    return segment.snapshot(position)
            return self._segments[0].snapshot(0) if self._segments else None

    def window(self, window_ms: int) -> Measurement | None:
        """
        Measure the last `window_ms` milliseconds of the record; ``None`` with fewer than two snapshots.

        It begins at the latest snapshot at or before the requested start, or up to 1 % after it, and ends at the last
        snapshot. A record that is too short gives what it has, with a warning. All callers with the same window share
        one measurement until the next snapshot.
        """
        last = self._last
        if last is None:
            return None
        with self._lock:
            measurement = self._windows.get(window_ms)
        if measurement is not None and measurement.last is last:
            return measurement
        window_ns = window_ms * 1_000_000
        first = self.at_or_before(last.monotonic_ns - window_ns + window_ns // 100)
        if first is None or first.monotonic_ns >= last.monotonic_ns:
            return None
        measurement = measure(first, last)
        if measurement.elapsed_ns < window_ns * 99 // 100:
            covered = f"the record reaches back only {measurement.elapsed_ns / 1e9:.1f} s"
            measurement = replace(measurement, warnings=(*measurement.warnings, covered), encoded={})
        with self._lock:
            kept = [(ms, m) for ms, m in self._windows.items() if m.last is last]
            self._windows = dict(kept[1 - MAX_WINDOWS :])
            self._windows[window_ms] = measurement
        return measurement

    def segments(self) -> list[Segment]:
        """Return all segments, oldest first; the last one may still grow."""
        with self._lock:
            return list(self._segments)

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield all snapshots, oldest first."""
        for segment in self.segments():
            for position in range(len(segment)):
                yield segment.snapshot(position)
