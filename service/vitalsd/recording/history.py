"""
Make a table over time of a record, downsampled on request: process, busiest threads, gauges, marks and events.

A row covers the time since the row before it; the first snapshot of a record ends no row.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

from vitalsd.contract.json_pieces import LockRelease
from vitalsd.contract.limits import HISTORY_CELLS, HISTORY_GAUGES, HISTORY_ROWS
from vitalsd.recording.frames import Frames, ThreadKey, restarts, thread_keys
from vitalsd.recording.history_table import History, ThreadHistory
from vitalsd.recording.readings import Readings
from vitalsd.recording.segment import Segment
from vitalsd.recording.series import Record
from vitalsd.recording.waits import RowWaits, spread_waits
from vitalsd.snapshot import allowance_ns, idle_allowance_ns

__all__ = ["history"]


def history(record: Record, *, since_ns: int = 0, top: int = 10, step_ns: int = 0) -> History:
    """
    Return the rows of `record` that end after monotonic `since_ns`.

    Args:
        record: the record.
        since_ns: monotonic time, ns; 0: all rows.
        top: number of threads to show, those with the most CPU time in the rows, and of children; fewer if they fill
            `HISTORY_CELLS`.
        step_ns: least duration of a row, to downsample; 0 shows every snapshot, up to `HISTORY_ROWS`.
    """
    frames = Frames(record.segments())
    times = frames.column("monotonic_ns")
    bounds = _bounds(times, since_ns, step_ns)
    if len(bounds) > HISTORY_ROWS + 1:
        bounds = _bounds(times, since_ns, (times[bounds[-1]] - times[bounds[0]]) // HISTORY_ROWS + 1)
    release = LockRelease()
    readings = Readings(frames, bounds, release)
    waiting = any(segment.base_waits is not None for segment, _ in frames.segments)
    columns = HISTORY_CELLS // max(1, len(bounds))
    gauges, is_cut = readings.gauges(min(HISTORY_GAUGES, columns // 2))
    fitting = (columns - len(gauges)) // (1 + waiting + 2 * readings.has_children())
    totals = _totals(frames, bounds, release)
    busiest = sorted(totals, key=lambda key: (-totals[key], key))[: min(top, fitting)]
    children, child_count = readings.children(min(top, fitting))
    waits = spread_waits(frames, bounds, busiest, release)
    ends = bounds[1:]
    wall, rss, vm = map(frames.column, ("wall_ns", "rss_bytes", "vm_bytes"))
    # A client may set a mark just before the first snapshot.
    noted_ns = times[bounds[0]] - record.interval_ns if bounds else 0
    return History(
        record=record,
        monotonic_ns=[times[end] for end in ends],
        wall_ns=[wall[end] for end in ends],
        elapsed_ns=[max(1, ns) for ns in _deltas(times, bounds)],
        cpu_ns=_deltas(frames.column("cpu_ns"), bounds),
        rss_bytes=[rss[end] for end in ends],
        vm_bytes=[vm[end] for end in ends],
        thread_count=[len(frames.place(end)[0].first.roster) for end in ends],
        wait_ns=waits.process_ns,
        process=readings.process(),
        machine=readings.machine(),
        application=readings.application(),
        threads=_threads(frames, bounds, busiest, totals, waits, release),
        children=children,
        gauges=gauges,
        truncated=fitting < min(top, max(len(totals), child_count)) or is_cut,
        marks=[mark for mark in list(record.marks) if mark.monotonic_ns >= noted_ns],
        # A hang is noted when it is over its limit, with the time at which it began.
        events=sorted(
            (event for event in list(record.events) if event.end_ns >= noted_ns), key=lambda event: event.monotonic_ns
        ),
    )


def _deltas(counter: Sequence[int], bounds: Sequence[int]) -> list[int]:
    return [max(0, counter[end] - counter[start]) for start, end in pairwise(bounds)]


def _bounds(times: Sequence[int], since_ns: int, step_ns: int) -> list[int]:
    """Return the numbers of the snapshots that bound the rows, at least `step_ns` apart but for the last one."""
    every = range(max(0, bisect_left(times, since_ns) - 1), len(times))
    if step_ns == 0:
        return list(every)
    found = list(every[:1])
    for number in every[1:]:
        if times[number] - times[found[-1]] >= step_ns:
            found.append(number)
    if found and found[-1] != every[-1]:
        found.append(every[-1])
    return found


def _threads(
    frames: Frames,
    bounds: Sequence[int],
    keys: Sequence[ThreadKey],
    totals: dict[ThreadKey, int],
    waits: RowWaits,
    release: LockRelease,
) -> list[ThreadHistory]:
    """Return the columns of `keys`; no wait is known where the CPU time is not, and both have at most the row."""
    columns = _columns(frames, bounds, keys, release)
    elapsed = _deltas(frames.column("monotonic_ns"), bounds)
    names = {
        key: name
        for segment, _ in _shown(frames, bounds)
        for key, name in zip(thread_keys(segment), segment.first.roster.names, strict=True)
    }
    found = []
    for key in keys:
        waited: list[int | None] | None = None
        if key in waits.threads:
            waited = [
                None if cpu_ns is None else min(ns, max(0, elapsed_ns - cpu_ns))
                for cpu_ns, ns, elapsed_ns in zip(columns[key], waits.threads[key], elapsed, strict=True)
            ]
        found.append(ThreadHistory(key[0], names[key], totals[key], columns[key], waited))
    return found


def _shown(frames: Frames, bounds: Sequence[int]) -> list[tuple[Segment, list[tuple[int, int]]]]:
    """Return the segments that bound rows, each with row number and position of the snapshots that do."""
    found: list[tuple[Segment, list[tuple[int, int]]]] = []
    for row, number in enumerate(bounds):
        segment, position = frames.place(number)
        if not found or found[-1][0] is not segment:
            found.append((segment, []))
        found[-1][1].append((row, position))
    return found


def _walk(
    frames: Frames, bounds: Sequence[int], release: LockRelease
) -> Iterator[tuple[int, Segment, list[int], bool]]:
    """
    Yield row number, segment, CPU time of its threads, and whether any of them ran since the row before.

    The list is valid until the next one.
    """
    for segment, places in _shown(frames, bounds):
        rows = {position: row for row, position in places}
        ran = True  # between two segments threads were born or ended, or ran
        for position, cpu_ns in enumerate(segment.iter_cpu_ns()):
            release()
            ran = ran or any(segment.deltas[position].used_ns)
            row = rows.get(position)
            if row is not None:
                yield row, segment, cpu_ns, ran
                ran = False


def _totals(frames: Frames, bounds: Sequence[int], release: LockRelease) -> dict[ThreadKey, int]:
    """Return the CPU time that each thread used between the first and the last snapshot, as far as it is known, ns."""
    totals: dict[ThreadKey, int] = {}
    reached: dict[ThreadKey, int] = {}
    segment: Segment | None = None
    cpu_ns: list[int] = []
    counter = frames.column("cpu_ns")
    process_ns = settled_ns = counter[bounds[0]] if bounds else 0

    def settle() -> None:
        nonlocal settled_ns
        if segment is not None:
            most_ns = process_ns - settled_ns + allowance_ns(segment.first.skew_ns, segment.first)
            for key, ns in zip(thread_keys(segment), cpu_ns, strict=True):
                used_ns = ns - reached.get(key, 0)
                totals[key] = totals.get(key, 0) + (used_ns if 0 <= used_ns <= most_ns else 0)
                reached[key] = ns
            settled_ns = process_ns

    for number, row_segment, row_cpu_ns, _ in _walk(frames, bounds, release):
        if row_segment is not segment:
            settle()
            if number == 0 or restarts(segment, row_segment):
                reached |= zip(thread_keys(row_segment), row_cpu_ns, strict=True)
        segment, cpu_ns, process_ns = row_segment, list(row_cpu_ns), counter[bounds[number]]
    settle()
    return totals


def _columns(
    frames: Frames, bounds: Sequence[int], keys: Sequence[ThreadKey], release: LockRelease
) -> dict[ThreadKey, list[int | None]]:
    """
    Return the CPU time that each of `keys` used in each row, ns; a thread born in a row with its whole life.

    ``None`` where the thread did not live and where its CPU time is unknown: in a row in which the process executed
    another program, and where the sum contradicts the clock of the process, see `vitalsd.snapshot.measure`.
    """
    columns: dict[ThreadKey, list[int | None]] = {key: [None] * (len(bounds) - 1) for key in keys}
    reached: dict[ThreadKey, int] = {}
    counter, skew = frames.column("cpu_ns"), frames.column("skew_ns")
    segment: Segment | None = None
    indexes: dict[ThreadKey, int] = {}
    for number, row_segment, cpu_ns, ran in _walk(frames, bounds, release):
        known = not restarts(segment, row_segment)
        if row_segment is not segment:
            segment = row_segment
            indexes = {key: i for i, key in enumerate(thread_keys(segment)) if key in columns}
        if number > 0 and known:
            before, now = bounds[number - 1], bounds[number]
            process_ns = max(0, counter[now] - counter[before])
            known = ran or process_ns <= idle_allowance_ns(skew[before], segment.first)
            most_ns = process_ns + allowance_ns(max(skew[before], skew[now]), segment.first)
        for key, i in indexes.items():
            if number > 0 and known and 0 <= (used_ns := cpu_ns[i] - reached.get(key, 0)) <= most_ns:
                columns[key][number - 1] = used_ns
            reached[key] = cpu_ns[i]
    return columns
