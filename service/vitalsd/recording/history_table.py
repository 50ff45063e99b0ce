"""
Write a history as JSON or CSV.

Columnar: one list per quantity, all of one length, ``null`` where there is no figure.
"""

import csv
import io
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vitalsd.contract.encoding import DECIMALS, target_json
from vitalsd.contract.json_pieces import LockRelease, to_json
from vitalsd.recording.history_columns import APPLICATION, MACHINE, EventJson, HistoryJson, Values
from vitalsd.recording.readings import ChildHistory
from vitalsd.recording.series import Event, Mark, Record
from vitalsd.text import iso, printable

__all__ = ["History", "ThreadHistory"]

FORMULA = ("=", "+", "-", "@")
"""Characters with which a formula begins. A tab and CR, which some spreadsheets skip, are escaped in any case."""
MACHINE_COLUMNS = ("scope", MACHINE[0].name, "other_percent", *(column.name for column in MACHINE[1:]))
"""Members of ``machine``, in order."""


@dataclass(frozen=True, slots=True)
class ThreadHistory:
    """Hold the CPU time of one thread in each row, ns; ``None`` where it did not live or its CPU time is unknown."""

    tid: int
    name: str
    total_ns: int
    cpu_ns: Sequence[int | None]
    wait_ns: Sequence[int | None] | None
    """The waits in each row; ``None``: they are not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    wait_ns: Sequence[int | None] | None
    """Waits of the process; ``None``: they are not recorded."""
    process: Mapping[str, Values]
    """Columns of the process that are read once a second, by name, as the JSON has them."""
    machine: Mapping[str, Any] | None
    """Columns of the machine, and ``scope``; ``None``: not recorded."""
    application: Mapping[str, Values] | None
    """Columns of the application; ``None``: not recorded."""
    threads: Sequence[ThreadHistory]
    children: Sequence[ChildHistory]
    gauges: Mapping[str, Sequence[float | None]]
    """The last value of each gauge in each row, by name; ``None`` where it had none."""
    truncated: bool
    """Whether threads or children that were requested are left out because of `HISTORY_CELLS`, or gauges."""
    marks: Sequence[Mark]
    events: Sequence[Event]

    def to_json(self) -> bytes:
        """Return columnar JSON: percentages of one core, sizes in KiB, times in Unix ms."""
        identity = self.record.identity
        body: dict[str, Any] = {
            "schema": 2,
            "platform": identity.platform,
            "target": target_json(identity),
            "interval_ms": self.record.interval_ns // 1_000_000,
            "time_ms": [ns // 1_000_000 for ns in self.wall_ns],
            **self._process_columns(),
            "machine": self.machine,
            "application": self.application,
            "threads": list(self._threads()),
            "children": [
                {"pid": child.pid, "name": child.name, "cpu_percent": child.cpu_percent, "rss_kb": child.rss_kb}
                for child in self.children
            ],
            "gauges": [{"name": name, "value": values} for name, values in self.gauges.items()],
            "marks": [{"time_ms": mark.wall_ns // 1_000_000, "label": mark.label} for mark in self.marks],
            "events": [_event_json(event) for event in self.events],
        }
        if self.truncated:
            body["truncated"] = True
        return to_json(cast(HistoryJson, body))

    def to_csv(self) -> bytes:
        """
        Return CSV: one line per row, UTF-8; marks and events in the last columns.

        All columns of the process, the machine and the application are there, those without a figure empty.
        """
        marks = _by_row(self.monotonic_ns, [(mark.monotonic_ns, f"mark: {mark.label}") for mark in self.marks])
        events = _by_row(self.monotonic_ns, [(event.monotonic_ns, _event_text(event)) for event in self.events])
        columns: dict[str, Sequence[Any] | None] = {
            "time": [iso(wall_ns) for wall_ns in self.wall_ns],
            **self._process_columns(),
            **self._flat("machine", self.machine, MACHINE_COLUMNS),
            **self._flat("application", self.application, [column.name for column in APPLICATION]),
        }
        named = [
            *columns.items(),
            *(
                (_cell(f"{thread['tid']} {thread['name']} {column}"), thread[column])
                for thread in self._threads()
                for column in ("cpu_percent", "wait_percent")
                if thread[column] is not None
            ),
            *(
                (_cell(f"child {child.pid} {child.name} {column}"), getattr(child, column))
                for child in self.children
                for column in ("cpu_percent", "rss_kb")
            ),
            *((f"gauge {name}", values) for name, values in self.gauges.items()),
            ("marks", marks),
            ("events", events),
        ]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([name for name, _ in named])
        empty = [None] * len(self.wall_ns)
        writer.writerows(zip(*(empty if cells is None else cells for _, cells in named), strict=True))
        return out.getvalue().encode()

    def _process_columns(self) -> dict[str, Values]:
        """Return the columns of the process, in order, but for the time."""
        return {
            "elapsed_ms": [round(ns / 1e6, DECIMALS) for ns in self.elapsed_ns],
            "cpu_percent": self._percents(self.cpu_ns),
            "rss_kb": [size // 1024 for size in self.rss_bytes],
            "vm_size_kb": [size // 1024 for size in self.vm_bytes],
            "thread_count": list(self.thread_count),
            "wait_percent": self._percents(self.wait_ns),
            **self.process,
        }

    def _flat(self, prefix: str, group: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
        """Return the columns of an object by the names that CSV has; a text is in each row."""
        found = {f"{prefix}_{name}": None if group is None else group[name] for name in names}
        return {name: [cells] * len(self.wall_ns) if isinstance(cells, str) else cells for name, cells in found.items()}

    def _threads(self) -> Iterator[dict[str, Any]]:
        """Yield the columns of each thread."""
        release = LockRelease()
        for thread in self.threads:
            yield {
                "tid": thread.tid,
                "name": thread.name,
                "cpu_percent": self._percents(thread.cpu_ns),
                "wait_percent": self._percents(thread.wait_ns),
            }
            release()

    def _percents(self, ns_of_rows: Sequence[int | None] | None) -> Values:
        """Return a column of times as percentages of its rows; ``None`` without any."""
        if ns_of_rows is None:
            return None
        return [
            None if ns is None else round(100 * ns / elapsed_ns, DECIMALS)
            for ns, elapsed_ns in zip(ns_of_rows, self.elapsed_ns, strict=True)
        ]


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
