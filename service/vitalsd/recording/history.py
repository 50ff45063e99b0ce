"""
Make a table over time of a record, downsampled on request: the process, its busiest threads, marks and events.

Columnar: one list per quantity, all of one length, ``null`` where a thread did not exist or its CPU time is unknown.
A row covers the time since the row before it; the first row of a record has no such time and is left out.
"""

import csv
import io
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from vitalsd.contract.encoding import DECIMALS, target_json
from vitalsd.contract.json_pieces import LockRelease, to_json
from vitalsd.contract.limits import HISTORY_CELLS, HISTORY_ROWS
from vitalsd.contract.shapes import Count, Doc, Lazy, UnixMs
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.segment import Segment
from vitalsd.recording.series import Event, EventKind, Mark, Record
from vitalsd.snapshot import allowance_ns, idle_allowance_ns
from vitalsd.text import iso, printable

__all__ = ["History", "HistoryJson", "ThreadHistory", "history"]

FORMULA = ("=", "+", "-", "@")
"""Characters with which a formula begins. A tab and CR, which some spreadsheets skip, are escaped in any case."""

ThreadKey = tuple[int, int]
"""Thread id and birth of a thread, which together distinguish it from a later one with the same id."""


class ThreadColumnJson(TypedDict):
    """One thread over time."""

    tid: Count
    name: str
    cpu_percent: Annotated[list[float | None], Doc("One per row; null while it did not live.")]


class PastMarkJson(TypedDict):
    """A label on the time axis."""

    time_ms: UnixMs
    label: str


class EventJson(TypedDict):
    """Something the recorder noticed."""

    time_ms: UnixMs
    kind: Annotated[
        EventKind,
        Doc(
            "stopped: by a signal, a debugger or a freezer. clock_set: the wall clock. inconsistent: the CPU"
            " counters contradicted each other, and the threads have no figure there. hang: no beat of a heartbeat"
            " came for longer than its limit; it has the time of the last beat."
        ),
    ]
    detail: str
    duration_ms: NotRequired[Annotated[Count, Doc("Length of a hang, ms; so far, if it is ongoing.")]]
    heartbeat: NotRequired[Annotated[str, Doc("Name of the heartbeat that was silent.")]]
    cause: NotRequired[
        Annotated[
            HangCause,
            Doc(
                "starved: runnable without a CPU. blocked: asleep, where `detail` states. idle: asleep in its event"
                " loop. unknown: two causes fit, or none."
            ),
        ]
    ]
    ongoing: NotRequired[Annotated[bool, Doc("Whether the hang lasts.")]]


class HistoryJson(TypedDict):
    """A table over time, one list per quantity, all equally long. A row covers the time since the row before."""

    schema: Literal[1]
    platform: Annotated[str, Lazy("vitalsd.contract.metrics:Platform")]
    target: Annotated[dict[str, Any], Lazy("vitalsd.contract.metrics:Target")]
    interval_ms: Annotated[Count, Doc("Intended time between two snapshots, ms.")]
    time_ms: Annotated[list[int], Doc("End of each row, Unix time, ms.")]
    elapsed_ms: Annotated[list[float], Doc("Measured length of each row, ms.")]
    cpu_percent: Annotated[list[float], Doc("Of the process; 100 = one core busy.")]
    rss_kb: Annotated[list[int], Doc("Resident memory at the end of the row, KiB.")]
    vm_size_kb: Annotated[list[int], Doc("Virtual memory at the end of the row, KiB.")]
    thread_count: list[int]
    threads: Annotated[list[ThreadColumnJson], Doc("The `top` busiest, busiest first.")]
    marks: list[PastMarkJson]
    events: list[EventJson]
    truncated: NotRequired[Annotated[Literal[True], Doc("Threads that were asked for are left out.")]]


@dataclass(frozen=True, slots=True)
class ThreadHistory:
    """Hold the CPU time of one thread in each row, ns; ``None`` where it did not live or its CPU time is unknown."""

    tid: int
    name: str
    total_ns: int
    cpu_ns: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class History:
    """Hold rows by ascending time, as columns. Times in ns, sizes in bytes, CPU in ns per row."""

    record: Record
    monotonic_ns: Sequence[int]
    wall_ns: Sequence[int]
    elapsed_ns: Sequence[int]
    cpu_ns: Sequence[int]
    rss_bytes: Sequence[int]
    vm_bytes: Sequence[int]
    thread_count: Sequence[int]
    threads: Sequence[ThreadHistory]
    truncated: bool
    """Whether threads that were requested are left out, because of `HISTORY_CELLS`."""
    marks: Sequence[Mark]
    events: Sequence[Event]

    def to_json(self) -> bytes:
        """Return columnar JSON: percentages of one core, sizes in KiB, times in Unix ms."""
        identity = self.record.identity
        body: HistoryJson = {
            "schema": 1,
            "platform": identity.platform,
            "target": target_json(identity),
            "interval_ms": self.record.interval_ns // 1_000_000,
            "time_ms": [ns // 1_000_000 for ns in self.wall_ns],
            "elapsed_ms": [round(ns / 1e6, DECIMALS) for ns in self.elapsed_ns],
            "cpu_percent": self._process_percents(),
            "rss_kb": [size // 1024 for size in self.rss_bytes],
            "vm_size_kb": [size // 1024 for size in self.vm_bytes],
            "thread_count": list(self.thread_count),
            "threads": [
                {"tid": thread.tid, "name": thread.name, "cpu_percent": percents}
                for thread, percents in zip(self.threads, self._threads(), strict=True)
            ],
            "marks": [{"time_ms": mark.wall_ns // 1_000_000, "label": mark.label} for mark in self.marks],
            "events": [_event_json(event) for event in self.events],
        }
        if self.truncated:
            body["truncated"] = True
        return to_json(body)

    def to_csv(self) -> bytes:
        """Return CSV: one line per row, one column per thread, UTF-8; marks and events in the last columns."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [_cell(f"{thread.tid} {thread.name} cpu_percent") for thread in self.threads]
        writer.writerow(
            ["time", "elapsed_ms", "cpu_percent", "rss_kb", "vm_size_kb", "thread_count", *names, "marks", "events"]
        )
        cpu = self._process_percents()
        threads = list(self._threads())
        marks = _by_row(self.monotonic_ns, [(mark.monotonic_ns, f"mark: {mark.label}") for mark in self.marks])
        events = _by_row(self.monotonic_ns, [(event.monotonic_ns, _event_text(event)) for event in self.events])
        for i, wall_ns in enumerate(self.wall_ns):
            writer.writerow(
                [
                    iso(wall_ns),
                    round(self.elapsed_ns[i] / 1e6, DECIMALS),
                    cpu[i],
                    self.rss_bytes[i] // 1024,
                    self.vm_bytes[i] // 1024,
                    self.thread_count[i],
                    *(thread[i] for thread in threads),
                    marks[i],
                    events[i],
                ]
            )
        return out.getvalue().encode()

    def _threads(self) -> Iterator[list[float | None]]:
        """Yield the percentages of each thread."""
        release = LockRelease()
        for thread in self.threads:
            yield self._percents(thread.cpu_ns)
            release()

    def _process_percents(self) -> list[float]:
        return [
            round(100 * ns / elapsed_ns, DECIMALS) for ns, elapsed_ns in zip(self.cpu_ns, self.elapsed_ns, strict=True)
        ]

    def _percents(self, cpu_ns: Sequence[int | None]) -> list[float | None]:
        return [
            None if ns is None else round(100 * ns / elapsed_ns, DECIMALS)
            for ns, elapsed_ns in zip(cpu_ns, self.elapsed_ns, strict=True)
        ]


def _by_row(rows: Sequence[int], notes: Sequence[tuple[int, str]]) -> list[str]:
    """Return the notes that fall to each row: the first one that ends after them, or the last of all."""
    cells: list[list[str]] = [[] for _ in rows]
    for at_ns, text in notes if rows else ():
        cells[min(bisect_left(rows, at_ns), len(rows) - 1)].append(_cell(text))
    return ["; ".join(cell) for cell in cells]


def _cell(text: str) -> str:
    """
    Return `text` for a cell of CSV, so that no spreadsheet executes a part of it as a formula.

    ``;`` and the tab are escaped: in locales in which they separate cells, quotes in the middle of a line do not
    protect them.
    """
    shown = printable(text).replace(";", "\\x3b")
    return f"'{shown}" if shown.startswith(FORMULA) else shown


@dataclass(frozen=True, slots=True)
class _Row:
    """Point to the snapshot at the end of a row."""

    segment: Segment
    position: int
    scalars: Sequence[int]

    def __getitem__(self, name: str) -> int:
        return self.scalars[Segment.SCALARS.index(name)]


def history(record: Record, *, since_ns: int = 0, top: int = 10, step_ns: int = 0) -> History:
    """
    Return the rows of `record` that end after monotonic `since_ns`.

    Args:
        record: the record.
        since_ns: monotonic time, ns; 0: all rows.
        top: number of threads to show, those with the most CPU time in the rows; fewer if they fill `HISTORY_CELLS`.
        step_ns: least duration of a row, to downsample; 0 shows every snapshot, up to `HISTORY_ROWS`.
    """
    rows = _rows(record.segments(), since_ns, step_ns)
    if len(rows) > HISTORY_ROWS + 1:
        step_ns = (rows[-1]["monotonic_ns"] - rows[0]["monotonic_ns"]) // HISTORY_ROWS + 1
        rows = _rows(record.segments(), since_ns, step_ns)
    release = LockRelease()
    totals = _totals(rows, release)
    fitting = HISTORY_CELLS // max(1, len(rows))
    busiest = sorted(totals, key=lambda key: (-totals[key], key))[: min(top, fitting)]
    columns = _columns(rows, busiest, release)
    segments = dict.fromkeys(row.segment for row in rows) if busiest else ()
    names = {key: name for segment in segments for key, name in _names(segment).items()}
    ends, starts = rows[1:], rows[:-1]
    # A client may set a mark just before the first snapshot.
    noted_ns = rows[0]["monotonic_ns"] - record.interval_ns if rows else 0
    return History(
        record=record,
        monotonic_ns=[row["monotonic_ns"] for row in ends],
        wall_ns=[row["wall_ns"] for row in ends],
        elapsed_ns=[max(1, ns) for ns in _deltas(starts, ends, "monotonic_ns")],
        cpu_ns=_deltas(starts, ends, "cpu_ns"),
        rss_bytes=[row["rss_bytes"] for row in ends],
        vm_bytes=[row["vm_bytes"] for row in ends],
        thread_count=[len(row.segment.first.roster) for row in ends],
        threads=[ThreadHistory(key[0], names[key], totals[key], columns[key]) for key in busiest],
        truncated=fitting < min(top, len(totals)),
        marks=[mark for mark in list(record.marks) if mark.monotonic_ns >= noted_ns],
        # A hang is noted when it is over its limit, with the time at which it began.
        events=sorted(
            (event for event in list(record.events) if event.end_ns >= noted_ns), key=lambda event: event.monotonic_ns
        ),
    )


def _deltas(starts: Sequence[_Row], ends: Sequence[_Row], name: str) -> list[int]:
    return [max(0, end[name] - start[name]) for start, end in zip(starts, ends, strict=True)]


def _rows(segments: Sequence[Segment], since_ns: int, step_ns: int) -> list[_Row]:
    """Return the snapshots that bound the rows, at least `step_ns` apart but for the last one."""
    every = [
        _Row(segment, position, segment.scalars_at(position))
        for segment in segments
        for position in range(len(segment))
    ]
    first = next((i for i, row in enumerate(every) if row["monotonic_ns"] >= since_ns), len(every))
    every = every[max(0, first - 1) :]
    rows = every[:1]
    for row in every[1:]:
        if row["monotonic_ns"] - rows[-1]["monotonic_ns"] >= step_ns:
            rows.append(row)
    if every and rows[-1] is not every[-1]:
        rows.append(every[-1])
    return rows


def _keys(segment: Segment) -> list[ThreadKey]:
    return list(zip(segment.first.roster.tids, segment.first.roster.births, strict=True))


def _names(segment: Segment) -> dict[ThreadKey, str]:
    return dict(zip(_keys(segment), segment.first.roster.names, strict=True))


def _walk(rows: Sequence[_Row], release: LockRelease) -> Iterator[tuple[int, Segment, list[int], bool]]:
    """
    Yield row number, segment, CPU time of its threads, and whether any of them ran since the row before.

    The list is valid until the next one.
    """
    at = {(id(row.segment), row.position): number for number, row in enumerate(rows)}
    ran = False
    for segment in dict.fromkeys(row.segment for row in rows):
        ran = True  # between two segments threads were born or ended, or ran
        for position, cpu_ns in enumerate(segment.iter_cpu_ns()):
            release()
            ran = ran or len(segment.deltas[position][1]) > 0
            number = at.get((id(segment), position))
            if number is not None:
                yield number, segment, cpu_ns, ran
                ran = False


def _restarts(before: Segment | None, segment: Segment) -> bool:
    """Return whether the counters restarted: the process executed another program, or the source was restarted."""
    if before is None:
        return False
    old, new = before.first, segment.first
    return old.reading != new.reading or (None not in (old.image, new.image) and old.image != new.image)


def _totals(rows: Sequence[_Row], release: LockRelease) -> dict[ThreadKey, int]:
    """Return the CPU time that each thread used between the first and the last snapshot, as far as it is known, ns."""
    totals: dict[ThreadKey, int] = {}
    reached: dict[ThreadKey, int] = {}
    segment: Segment | None = None
    cpu_ns: list[int] = []
    process_ns = settled_ns = rows[0]["cpu_ns"] if rows else 0

    def settle() -> None:
        nonlocal settled_ns
        if segment is not None:
            most_ns = process_ns - settled_ns + allowance_ns(segment.first.skew_ns, segment.first)
            for key, ns in zip(_keys(segment), cpu_ns, strict=True):
                used_ns = ns - reached.get(key, 0)
                totals[key] = totals.get(key, 0) + (used_ns if 0 <= used_ns <= most_ns else 0)
                reached[key] = ns
            settled_ns = process_ns

    for number, row_segment, row_cpu_ns, _ in _walk(rows, release):
        if row_segment is not segment:
            settle()
            if number == 0 or _restarts(segment, row_segment):
                reached |= zip(_keys(row_segment), row_cpu_ns, strict=True)
        segment, cpu_ns, process_ns = row_segment, list(row_cpu_ns), rows[number]["cpu_ns"]
    settle()
    return totals


def _columns(
    rows: Sequence[_Row], keys: Sequence[ThreadKey], release: LockRelease
) -> dict[ThreadKey, list[int | None]]:
    """
    Return the CPU time that each of `keys` used in each row, ns; a thread born in a row with its whole life.

    ``None`` where the thread did not live and where its CPU time is unknown: in a row in which the process executed
    another program, and where the sum contradicts the clock of the process, see `vitalsd.snapshot.measure`.
    """
    columns: dict[ThreadKey, list[int | None]] = {key: [None] * (len(rows) - 1) for key in keys}
    reached: dict[ThreadKey, int] = {}
    segment: Segment | None = None
    indexes: dict[ThreadKey, int] = {}
    for number, row_segment, cpu_ns, ran in _walk(rows, release):
        known = not _restarts(segment, row_segment)
        if row_segment is not segment:
            segment = row_segment
            indexes = {key: i for i, key in enumerate(_keys(segment)) if key in columns}
        if number > 0 and known:
            before, now = rows[number - 1], rows[number]
            process_ns = max(0, now["cpu_ns"] - before["cpu_ns"])
            known = ran or process_ns <= idle_allowance_ns(before["skew_ns"], segment.first)
            most_ns = process_ns + allowance_ns(max(before["skew_ns"], now["skew_ns"]), segment.first)
        for key, i in indexes.items():
            if number > 0 and known and 0 <= (used_ns := cpu_ns[i] - reached.get(key, 0)) <= most_ns:
                columns[key][number - 1] = used_ns
            reached[key] = cpu_ns[i]
    return columns


def _event_json(event: Event) -> EventJson:
    body: EventJson = {"time_ms": event.wall_ns // 1_000_000, "kind": event.kind, "detail": event.detail}
    if event.heartbeat is not None and event.cause is not None:
        body["duration_ms"] = (event.duration_ns or 0) // 1_000_000
        body["heartbeat"] = event.heartbeat
        body["cause"] = event.cause
        body["ongoing"] = event.ongoing
    return body


def _event_text(event: Event) -> str:
    if event.heartbeat is None:
        return f"{event.kind}: {event.detail}"
    return f"hang: {event.heartbeat} silent for {(event.duration_ns or 0) / 1e9:.1f} s: {event.cause}, {event.detail}"
