"""
Charge each row of a table with the waits for a CPU that belong to it.

The kernel adds a wait to its counter when the wait ends, so one snapshot may be charged with seconds in which no
snapshot saw any. A thread cannot wait while it runs: what does not fit into the time in which it did not run belongs to
the snapshots before, back to the last one in which the thread ran or was charged with another wait.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from vitalsd.contract.json_pieces import LockRelease
from vitalsd.recording.frames import Frames, ThreadKey, restarts, thread_keys
from vitalsd.recording.segment import WAIT_STEP_NS, Segment, ThreadDeltas

__all__ = ["RowWaits", "spread_waits"]


class RowWaits(NamedTuple):
    """Waits in each row of a table, ns."""

    threads: Mapping[ThreadKey, Sequence[int]]
    """
    Those of the threads that were asked for, in steps of `WAIT_STEP_NS`, and so up to a step too long; empty if no
    thread has any on record.
    """
    process_ns: Sequence[int | None] | None
    """Those of the process; ``None``: they are not recorded."""


class _Step(NamedTuple):
    """One snapshot of the table, and the time since the one before."""

    row: int
    elapsed_ns: int
    segment: Segment
    deltas: ThreadDeltas | None
    """``None``: the counters restarted, and no difference is known."""

    def of(self, index: int) -> tuple[int, int]:
        """Return the CPU time and the wait of one thread, ns."""
        if self.deltas is None:
            return 0, 0
        indexes, used_ns, waits = self.deltas
        at = index
        if indexes is not None:
            at = bisect_left(indexes, index)
            if at == len(indexes) or indexes[at] != index:
                return 0, 0
        return used_ns[at], 0 if waits is None else WAIT_STEP_NS * waits[at]


def spread_waits(frames: Frames, bounds: Sequence[int], keys: Iterable[ThreadKey], release: LockRelease) -> RowWaits:
    """
    Return the waits of the rows that the snapshots `bounds` end; the first of `bounds` begins the first row.

    What belongs to snapshots before the table is left out.

    Args:
        frames: the snapshots.
        bounds: numbers of snapshots, ascending.
        keys: the threads to show.
        release: called between pieces of work.
    """
    rows = max(0, len(bounds) - 1)
    if not rows:
        return RowWaits({}, None)
    process = _process(frames, bounds)
    if all(segment.base_waits is None for segment, _ in frames.segments):
        return RowWaits({}, process)
    steps = _steps(frames, bounds, release)
    moved = _moved(steps, release)
    threads = {key: [0] * rows for key in keys}
    indexes: list[tuple[int, list[int]]] = []
    shown: Segment | None = None
    for step in steps:
        release()
        if step.segment is not shown:
            shown = step.segment
            indexes = [(i, threads[key]) for i, key in enumerate(thread_keys(shown)) if key in threads]
        if step.deltas is not None and step.deltas.waits is not None:
            for i, column in indexes:
                column[step.row] += step.of(i)[1]
    for key, corrections in moved.items():
        for number, ns in corrections.items():
            row = steps[number].row
            if key in threads:
                threads[key][row] += ns
            if process is not None and (known := process[row]) is not None:
                process[row] = known + ns
    return RowWaits(threads, None if process is None else [None if ns is None else max(0, ns) for ns in process])


def _process(frames: Frames, bounds: Sequence[int]) -> list[int | None] | None:
    """Return what the counter of the process grew by in each row."""
    waits = frames.column("wait_ns")
    ends = [waits[number] for number in bounds]
    if max(ends) < 0:
        return None
    return [None if before < 0 or after < 0 else max(0, after - before) for before, after in pairwise(ends)]


def _steps(frames: Frames, bounds: Sequence[int], release: LockRelease) -> list[_Step]:
    """Return the snapshots of the table, without the first one."""
    times = frames.column("monotonic_ns")
    found: list[_Step] = []
    number = 0
    before: tuple[Segment, int] | None = None
    for segment, count in frames.segments:
        release()
        for position in range(count):
            if bounds[0] < number <= bounds[-1]:
                row = bisect_right(bounds, number - 1) - 1
                deltas: ThreadDeltas | None = segment.deltas[position]
                if position == 0:
                    assert before is not None
                    deltas = _across(*before, segment)
                found.append(_Step(row, times[number] - times[number - 1], segment, deltas))
            number += 1
        before = segment, count - 1
    return found


def _across(before: Segment, last: int, segment: Segment) -> ThreadDeltas | None:
    """Return what threads did between the last snapshot of a segment and the first of the next; of one born, all."""
    if restarts(before, segment) or segment.base_waits is None:
        return None
    waits = before.thread_waits(last)
    if waits is None:
        return None
    known = dict(zip(thread_keys(before), zip(before.thread_cpu_ns(last), waits, strict=True), strict=True))
    used_ns, waited = [], []
    for key, cpu_ns, steps in zip(thread_keys(segment), segment.base_cpu_ns, segment.base_waits, strict=True):
        old_cpu_ns, old_steps = known.get(key, (0, 0))
        used_ns.append(max(0, cpu_ns - old_cpu_ns))
        waited.append(max(0, steps - old_steps))
    return ThreadDeltas(None, array("Q", used_ns), array("Q", waited))


def _moved(steps: Sequence[_Step], release: LockRelease) -> dict[ThreadKey, dict[int, int]]:
    """Return for each thread what is added to a step, ns, negative where it is taken away."""
    moved: dict[ThreadKey, dict[int, int]] = {}
    places: dict[int, dict[ThreadKey, int]] = {}
    for number, step in enumerate(steps):
        release()
        for index in _charged_too_much(step):
            key = step.segment.first.roster.tids[index], step.segment.first.roster.births[index]
            used_ns, waited_ns = step.of(index)
            excess_ns = waited_ns - max(0, step.elapsed_ns - used_ns)
            corrections = moved.setdefault(key, {})
            corrections[number] = -excess_ns
            for earlier in range(number - 1, -1, -1):
                at = steps[earlier]
                if at.deltas is None:
                    break
                if id(at.segment) not in places:
                    places[id(at.segment)] = {each: i for i, each in enumerate(thread_keys(at.segment))}
                place = places[id(at.segment)].get(key)
                if place is None:
                    break
                used_ns, waited_ns = at.of(place)
                has_ns = waited_ns + corrections.get(earlier, 0)
                taken_ns = min(excess_ns, max(0, at.elapsed_ns - used_ns - has_ns))
                corrections[earlier] = corrections.get(earlier, 0) + taken_ns
                excess_ns -= taken_ns
                if excess_ns == 0 or used_ns or waited_ns:
                    break
    return moved


def _charged_too_much(step: _Step) -> Iterable[int]:
    """Yield the threads that are charged with more than the time in which they did not run, by a step at least."""
    if step.deltas is None:
        return
    indexes, used_ns, waits = step.deltas
    if not waits or WAIT_STEP_NS * max(waits) <= step.elapsed_ns - max(used_ns):
        return
    for i, (used, steps) in enumerate(zip(used_ns, waits, strict=True)):
        if steps > 0 and WAIT_STEP_NS * (steps - 1) + used >= step.elapsed_ns:
            yield i if indexes is None else indexes[i]
