"""See all snapshots of a record as one table, fixed at one moment; its rows are numbered from the oldest."""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from vitalsd.recording.segment import Segment

__all__ = ["Frames", "ThreadKey", "restarts", "thread_keys"]

ThreadKey = tuple[int, int]
"""Thread id and birth of a thread, which together distinguish it from a later one with the same id."""


class Frames:
    """
    Number the snapshots of a record, and give each scalar as one column.

    Args:
        segments: the segments of the record, oldest first; snapshots that are added later are not seen.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = [(segment, len(segment)) for segment in segments if len(segment)]
        """Each segment, with the number of its snapshots."""
        self._starts: list[int] = []
        self._count = 0
        for _, count in self.segments:
            self._starts.append(self._count)
            self._count += count
        self._columns: dict[str, array[int]] = {}

    def __len__(self) -> int:
        """Return the number of snapshots."""
        return self._count

    def column(self, name: str) -> "array[int]":
        """Return one scalar of all snapshots."""
        found = self._columns.get(name)
        if found is None:
            found = self._columns[name] = array("q")
            for segment, count in self.segments:
                found.extend(segment.column(name)[:count])
        return found

    def place(self, number: int) -> tuple[Segment, int]:
        """Return the segment of a snapshot, and its position in it."""
        at = bisect_right(self._starts, number) - 1
        return self.segments[at][0], number - self._starts[at]


def thread_keys(segment: Segment) -> list[ThreadKey]:
    """Return the key of each thread of a segment."""
    return list(zip(segment.first.roster.tids, segment.first.roster.births, strict=True))


def restarts(before: Segment | None, segment: Segment) -> bool:
    """Return whether the counters restarted: the process executed another program, or the source was restarted."""
    if before is None:
        return False
    old, new = before.first, segment.first
    return old.reading != new.reading or (None not in (old.image, new.image) and old.image != new.image)
