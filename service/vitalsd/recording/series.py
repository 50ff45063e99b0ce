"""
Keep the last minutes of one process in memory, bounded in time and in bytes.

Snapshots are kept in segments of up to 64 with one set of threads: the first of a segment whole, of
the others only what each thread used since (`vitalsd.recording.segment`). Dropping the oldest is
dropping a segment. Whatever changes the set of threads, or the program, begins a new segment.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from vitalsd.contract.limits import LABEL_CHARACTERS
from vitalsd.recording.segment import Segment
from vitalsd.snapshot import Identity, Measurement, Snapshot, measure

__all__ = ["MAX_EVENTS", "MAX_MARKS", "Event", "EventKind", "Mark", "Record"]

MAX_MARKS = 1000
MAX_EVENTS = 1000
MAX_WINDOWS = 8
"""Measurements that are kept for callers with the same window. They hold answers of megabytes."""

EventKind = Literal[
    "missed",
    "suspended",
    "clock_set",
    "stopped",
    "continued",
    "executed",
    "inconsistent",
    "exited",
    "failed",
]


class Mark(NamedTuple):
    """A label that a client put on the recorder's clock."""

    wall_ns: int
    monotonic_ns: int
    label: str


class Event(NamedTuple):
    """Why the record differs from an even row of snapshots, in words."""

    wall_ns: int
    monotonic_ns: int
    kind: EventKind
    detail: str


class Record:
    """
    Keep the last minutes of one process. One thread writes, any thread reads.

    Args:
        identity: the recorded process.
        interval_ns: the intended distance of two snapshots; 0 if there is none.
        retention_ns: how far back it reaches, give or take a segment.
        max_bytes: a bound of its memory; many threads shorten how far back it reaches.
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
        """Memory taken by the snapshots, bytes, as accounted against `max_bytes`."""
        return self._size_bytes

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._segments))

    def append(self, snapshot: Snapshot) -> Segment:
        """
        Add a snapshot, taken after all others; the oldest segments go when a bound is passed.

        Returns:
            The segment it went to, where it is the last one.
        """
        with self._lock:
            segment = self._segments[-1] if self._segments else None
            if segment is None or not segment.accepts(snapshot):
                roster, shared = snapshot.roster, False
                if segment is not None:
                    shared = roster.has_same_threads(segment.first.roster)
                    roster = roster.sharing(segment.first.roster)
                segment = Segment(replace(snapshot, roster=roster, extras=None))
                if not shared:
                    segment.size_bytes += 3 * 8 * len(roster) + 2 * 32 * len(roster)
                self._segments.append(segment)
                self._size_bytes += segment.size_bytes
            before = segment.size_bytes
            segment.append(snapshot)
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
        """Add a whole segment as it was stored; none of the bounds applies to a record read back."""
        with self._lock:
            self._segments.append(segment)
            self._size_bytes += segment.size_bytes
            self._last = segment.snapshot(len(segment) - 1)

    def add_mark(self, label: str) -> Mark:
        """
        Put a label on the clock, now. The oldest of more than `MAX_MARKS` goes.

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

        It begins at the latest snapshot at or before the asked start (up to 1 % after it is still good)
        and ends at the last one. A record too young gives what it has and says so in `warnings`. All
        callers with the same window share one measurement until the next snapshot.
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
