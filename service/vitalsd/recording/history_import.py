"""Rebuild a record from the JSON of a `vitalsd.recording.history` in a report, which has rounded numbers."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any, get_args

from vitalsd.contract.encoding import DECIMALS
from vitalsd.contract.limits import HISTORY_CELLS, HISTORY_GAUGES, HISTORY_ROWS, LABEL_CHARACTERS
from vitalsd.contract.signals_page import NAME
from vitalsd.recording.figures_import import LARGEST, FiguresImport, numbers, whole
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.scalars import snapshot_fields
from vitalsd.recording.series import MAX_EVENTS, MAX_MARKS, Event, EventKind, Mark, Record
from vitalsd.snapshot import Identity, Snapshot, ThreadRoster

__all__ = ["check_json", "parse_json", "read_history"]

CLOCK_STEPS = 8
"""Rows on each side that are searched for a mark: the wall clock may have been set back so often over one moment."""
LAG_NS = 20_000_000
"""Lag of a CPU counter that is assumed, ns: the table does not state it, and it is more on no platform."""
MS_NS = 1_000_000
"""Nanoseconds in a millisecond, the unit of times in the JSON."""
MAX_VALUES = HISTORY_CELLS + 40 * HISTORY_ROWS + 500_000
"""Limit of the commas in the JSON of a history: between numbers, threads, marks and events, and in names and labels."""
MAX_CONTAINERS = 300_000
"""Limit of the opening brackets in the JSON of a history: of threads, marks and events, and in labels."""
MAX_DETAIL = 16_384
"""Limit of the detail of an event, characters; the rest is cut."""
MAX_MS = LARGEST // MS_NS
"""Largest number that is in milliseconds or a thread id."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""Zero of Unix time."""


def check_json(body: bytes) -> None:
    """
    Raise `ValueError` unless `body` has at most as many values as a history.

    A parsed value takes up to 250 bytes of memory, a hundred times its size in the text.
    """
    if body.count(b",") > MAX_VALUES or body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"it has more values than a history, which has at most {HISTORY_CELLS} numbers")


def parse_json(body: bytes) -> Any:
    """
    Parse a member of a report.

    Raises:
        ValueError: it is not JSON, or has more values than a history.
        RecursionError: it is nested too deeply.
    """
    check_json(body)
    return json.loads(body)


def read_history(body: bytes | Mapping[str, Any]) -> Record:
    """
    Return the record from which `History.to_json` was made, as far as the JSON has it.

    It has times to the millisecond, percentages to three decimals, and only the threads that were shown.

    Raises:
        ValueError: it is not such JSON.
    """
    try:
        table = parse_json(body) if isinstance(body, bytes) else body
        interval_ns = whole(table["interval_ms"], MAX_MS) * MS_NS
        record = Record(_identity(table), interval_ns=interval_ns, retention_ns=2**62, max_bytes=2**62)
        clocks: list[tuple[int, int]] = []
        for snapshot in _snapshots(table, record.identity.started_unix_ns):
            record.append(snapshot)
            clocks.append((snapshot.wall_ns, snapshot.monotonic_ns))
        for mark, times in _timed(table["marks"][-MAX_MARKS:], clocks):
            record.marks.append(Mark(*times, str(mark["label"])[:LABEL_CHARACTERS]))
        for event, times in _timed(table["events"][-MAX_EVENTS:], clocks):
            if event["kind"] not in get_args(EventKind):
                raise ValueError(f"an event {event['kind']!r:.80}")
            noted = Event(*times, event["kind"], str(event["detail"])[:MAX_DETAIL])
            record.events.append(_hang(noted, event) if noted.kind == "hang" else noted)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a history of vitalsd: {type(error).__name__}: {error}") from None
    return record


def _hang(noted: Event, event: Mapping[str, Any]) -> Event:
    """Return a hang with all its values. Raise `ValueError` or `KeyError`."""
    if event["cause"] not in get_args(HangCause) or not NAME.fullmatch(event["heartbeat"]):
        raise ValueError(f"a hang {event!r:.80}")
    return noted._replace(
        duration_ns=whole(event["duration_ms"]) * MS_NS,
        heartbeat=event["heartbeat"],
        cause=event["cause"],
        ongoing=bool(event["ongoing"]),
    )


def _timed(
    notes: Sequence[dict[str, Any]], clocks: Sequence[tuple[int, int]]
) -> Iterator[tuple[dict[str, Any], tuple[int, int]]]:
    """Yield each of `notes`, which are in order, with its wall and monotonic time by the `clocks` of the snapshots."""
    rows = _Rows(clocks)
    at = 0
    for note in notes:
        wall_ns = int(note["time_ms"]) * 1_000_000
        if not -(2**63) <= wall_ns < 2**63:
            raise ValueError(f"a time of {note['time_ms']!r:.80} ms")
        if not clocks:
            yield note, (wall_ns, wall_ns)
            continue
        at = rows.end_of(wall_ns, at)
        known_ns, monotonic_ns = clocks[at]
        earliest_ns = clocks[max(0, at - 1)][1]
        yield note, (wall_ns, min(monotonic_ns, max(earliest_ns, monotonic_ns + wall_ns - known_ns)))


class _Rows:
    """
    Find the row of a table by wall clock, which may have been set meanwhile: its times need not ascend.

    Args:
        clocks: wall and monotonic time of the snapshot at the end of each row, ns.
    """

    def __init__(self, clocks: Sequence[tuple[int, int]]) -> None:
        self._clocks = clocks
        self._order = sorted(range(len(clocks)), key=lambda i: clocks[i][0])
        self._walls = [clocks[i][0] for i in self._order]

    def end_of(self, wall_ns: int, since: int) -> int:
        """Return the snapshot, from `since` on, that ended the row of that time, or else the nearest one."""
        at = bisect_left(self._walls, wall_ns)
        near = [i for i in self._order[max(0, at - CLOCK_STEPS) : at + CLOCK_STEPS] if i >= since]
        for i in sorted(near):
            elapsed_ns = self._clocks[i][1] - self._clocks[max(0, i - 1)][1]
            if self._clocks[i][0] - elapsed_ns - MS_NS < wall_ns <= self._clocks[i][0]:
                return i
        return min(near, key=lambda i: abs(self._clocks[i][0] - wall_ns), default=len(self._clocks) - 1)


def _identity(table: Mapping[str, Any]) -> Identity:
    target = table["target"]
    _, start_key, boot_id = str(target["start_id"]).split("-", 2)
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", boot_id):
        raise ValueError(f"a start_id {target['start_id']!r:.80}")
    return Identity(
        platform=str(table["platform"]),
        pid=whole(target["pid"], MAX_MS),
        name=str(target["name"]),
        boot_id=boot_id,
        start_key=whole(start_key),
        started_unix_ns=(datetime.fromisoformat(target["started_at"]) - EPOCH) // timedelta(microseconds=1) * 1000,
    )


def _snapshots(table: Mapping[str, Any], started_unix_ns: int) -> Iterator[Snapshot]:
    """Yield the snapshots at the ends of the rows, and one at the start of the first; counters begin at 0."""
    times, elapsed = table["time_ms"], table["elapsed_ms"]
    if len(times) > HISTORY_ROWS + 1:
        raise ValueError(f"{len(times)} rows; a history has at most {HISTORY_ROWS}")
    threads = sorted(table["threads"], key=lambda thread: whole(thread["tid"], MAX_MS))
    columns = [thread["cpu_percent"] for thread in threads]
    _check(table, threads, len(times))
    waits = [numbers(thread.get("wait_percent"), len(times)) for thread in threads]
    waiting = any(thread.get("wait_percent") is not None for thread in threads)
    clock = list(accumulate((round(ms * 1e6) for ms in elapsed), initial=0))
    figures = FiguresImport(table, clock)
    cpu_ns, thread_cpu_ns, thread_wait_ns = 0, [0] * len(threads), [0] * len(threads)
    grain_ns = 1 + round(max(elapsed, default=0) * 1e6 / 100 / 10**DECIMALS)
    alive: list[int] = []
    roster: ThreadRoster | None = None
    reading = 0
    lives = _lives(columns, len(times))
    for row in [-1, *range(len(times))] if times else []:
        shown = max(0, row)
        elapsed_ns = round(elapsed[shown] * 1e6)
        now_alive = lives[shown]
        reading += row >= 0 and any(columns[i][row] is None for i in now_alive)
        if now_alive != alive or roster is None:
            alive = now_alive
            roster = _roster(threads, alive)
        if row >= 0:
            cpu_ns += round(table["cpu_percent"][row] * elapsed_ns / 100)
            for i in alive:
                used_ns = round((columns[i][row] or 0) * elapsed_ns / 100)
                waited_ns = round((waits[i][row] or 0) * elapsed_ns / 100)
                thread_cpu_ns[i] += used_ns
                thread_wait_ns[i] += min(waited_ns, max(0, elapsed_ns - used_ns))  # else the rest would be spread
        wall_ns = times[shown] * 1_000_000 - (elapsed_ns if row < 0 else 0)
        scalars = figures.scalars(
            row + 1,
            monotonic_ns=clock[row + 1],
            boottime_ns=clock[row + 1],  # not by the wall clock: a step of it is no sleep, and events record sleeps
            wall_ns=wall_ns,
            uptime_ns=max(0, wall_ns - started_unix_ns),
            skew_ns=0,
            cpu_ns=cpu_ns,
            exited_low_ns=0,  # not all threads that ended are known: their CPU time stays unattributed
            exited_high_ns=0,
            rss_bytes=table["rss_kb"][shown] * 1024,
            vm_bytes=table["vm_size_kb"][shown] * 1024,
        )
        yield Snapshot(
            **snapshot_fields(scalars, figures.next_children(row + 1)),
            gauges=figures.gauges(row),
            cpu_grain_ns=grain_ns,
            image=None,
            reading=reading,
            roster=roster,
            thread_cpu_ns=[thread_cpu_ns[i] for i in alive],
            thread_wait_ns=[thread_wait_ns[i] for i in alive] if waiting else None,
            thread_grain_ns=grain_ns,
            thread_lag_ns=LAG_NS,
            source="report",
        )


def _roster(threads: Sequence[Mapping[str, Any]], alive: Sequence[int]) -> ThreadRoster:
    return ThreadRoster(
        tids=tuple(whole(threads[i]["tid"], MAX_MS) for i in alive),
        births=tuple(alive),  # a tid may have been reused: each use is a thread of the table
        names=tuple(str(threads[i]["name"]) for i in alive),
    )


def _check(table: Mapping[str, Any], threads: Sequence[Mapping[str, Any]], rows: int) -> None:
    """Raise `ValueError` if the table has more numbers than a history, or a column has another length or content."""
    children = table.get("children", [])
    gauges = len(table.get("gauges", []))
    columns = len(threads) + sum(thread.get("wait_percent") is not None for thread in threads) + 2 * len(children)
    if gauges > HISTORY_GAUGES or (columns + gauges) * rows > HISTORY_CELLS:
        raise ValueError(
            f"{len(threads)} threads, {len(children)} children and {gauges} gauges in {rows} rows; a history has at"
            f" most {HISTORY_GAUGES} gauges, and {HISTORY_CELLS} numbers of all"
        )
    named = [table[name] for name in ("time_ms", "elapsed_ms", "cpu_percent", "rss_kb", "vm_size_kb")]
    for column in (*named, *(thread["cpu_percent"] for thread in threads)):
        if len(column) != rows:
            raise ValueError("its columns differ in length")
        if any(isinstance(value, str | list | dict) for value in column):
            raise ValueError("a column has what is no number")


def _lives(columns: Sequence[Sequence[float | None]], rows: int) -> list[list[int]]:
    """
    Return for each row the columns of the threads that lived at its end.

    In a row without any CPU time the process executed another program: it gets the threads of the next row.
    """
    lives = [[i for i, column in enumerate(columns) if column[row] is not None] for row in range(rows)]
    for row in range(rows - 2, -1, -1):
        lives[row] = lives[row] or lives[row + 1]
    for row in range(1, rows):
        lives[row] = lives[row] or lives[row - 1]
    return lives
