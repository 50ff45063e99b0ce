"""
Make the columns of figures that not every snapshot has: those that are read once a second, and gauges.

A counter in a row is the difference between the last reading in the row and the last one before the row, as a rate over
the time between the two. A row without a reading has none.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from vitalsd.contract.encoding import DECIMALS
from vitalsd.contract.json_pieces import LockRelease
from vitalsd.recording.frames import Frames
from vitalsd.recording.history_columns import APPLICATION, MACHINE, PROCESS, Column, Values
from vitalsd.snapshot import reaped_within

__all__ = ["ChildHistory", "Readings"]

ChildKey = tuple[int, int]
"""Pid and start of a descendant."""

WATCHED = Column("children_percent", "tree_reaped_ns", "percent")
REAPED = Column("children_percent", "reaped_ns", "percent")


class ChildHistory(NamedTuple):
    """Hold a descendant over time; ``None`` where it was not seen."""

    pid: int
    name: str
    total_ns: int
    cpu_percent: Sequence[float | None]
    rss_kb: Sequence[int | None]


class Readings:
    """
    Make columns for the rows that the snapshots `bounds` end; the first of `bounds` begins the first row.

    Args:
        frames: the snapshots.
        bounds: numbers of snapshots, ascending.
        release: called between pieces of work.
    """

    def __init__(self, frames: Frames, bounds: Sequence[int], release: LockRelease) -> None:
        self._frames, self._bounds, self._release = frames, bounds, release
        self._times = frames.column("monotonic_ns")

    def process(self) -> dict[str, Values]:
        """Return the columns of the process, without its waits."""
        return {"children_percent": self._children_percent()} | self._columns(PROCESS)

    def machine(self) -> dict[str, Any] | None:
        """Return the columns of the machine and their ``scope``; ``None``: there is no reading in any row."""
        scopes = self._frames.column("machine_in_container")
        read = [last for _, last in self._ends("machine_in_container") if last is not None]
        if not read:
            return None
        first, *others = self._columns(MACHINE).items()
        scope = "container" if scopes[read[-1]] else "host"
        return {"scope": scope} | dict([first]) | {"other_percent": self._other_percent()} | dict(others)

    def application(self) -> dict[str, Values] | None:
        """Return the columns of the application; ``None``: there is no reading in any row."""
        found = self._columns(APPLICATION)
        return found if any(values is not None for values in found.values()) else None

    def children(self, top: int) -> tuple[list[ChildHistory], int]:
        """Return the `top` busiest descendants, and the number of all."""
        cells: dict[ChildKey, dict[int, tuple[float, int]]] = {}
        names: dict[ChildKey, str] = {}
        totals: dict[ChildKey, int] = {}
        reached: dict[ChildKey, int] = {}
        ends = self._ends("tree_cpu_ns")
        for row, (before, last) in enumerate(ends):
            self._release()
            if last is None or before is None:
                continue
            if row == 0 or not reached:
                reached |= {(child.pid, child.start_key): child.cpu_ns for child in self._children_at(before)}
            elapsed_ns = max(1, self._times[last] - self._times[before])
            for child in self._children_at(last):
                key = child.pid, child.start_key
                used_ns = max(0, child.cpu_ns - reached.get(key, child.found_cpu_ns))
                reached[key], names[key] = child.cpu_ns, child.name
                totals[key] = totals.get(key, 0) + used_ns
                percent = round(100 * used_ns / elapsed_ns, DECIMALS)
                cells.setdefault(key, {})[row] = percent, child.rss_bytes // 1024
        busiest = sorted(totals, key=lambda key: (-totals[key], key))[:top]
        return [ChildHistory(key[0], names[key], totals[key], *_filled(cells[key], len(ends))) for key in busiest], len(
            totals
        )

    def gauges(self, most: int) -> tuple[dict[str, list[float | None]], bool]:
        """
        Return the last value of each gauge in each row, by name, and whether gauges are left out.

        Args:
            most: number of gauges to return; those that have had no value for the longest are left out.
        """
        columns: dict[str, list[float | None]] = {}
        is_cut = False
        rows = list(pairwise(self._bounds))
        if not any(segment.gauge_values for segment, _ in self._frames.segments):
            return {}, False
        for row in range(len(rows) - 1, -1, -1):  # from the newest on
            self._release()
            begin, end = rows[row]
            for number in range(end, begin, -1):
                segment, position = self._frames.place(number)
                for name, value in segment.gauges_at(position):
                    if name not in columns and len(columns) >= most:
                        is_cut = True
                        continue
                    column = columns.setdefault(name, [None] * len(rows))
                    if column[row] is None:
                        column[row] = value
        return {name: columns[name] for name in sorted(columns)}, is_cut

    def has_children(self) -> bool:
        """Return whether any row has a reading of the descendants."""
        return any(last is not None for _, last in self._ends("tree_cpu_ns"))

    def _children_at(self, number: int) -> Sequence[Any]:
        segment, position = self._frames.place(number)
        return segment.children_at(position)

    def _columns(self, columns: Sequence[Column]) -> dict[str, Values]:
        return {column.name: self._values(column) for column in columns}

    def _values(self, column: Column) -> Values:
        self._release()
        figures = self._frames.column(column.scalar)
        if not figures or max(figures) < 0:
            return None
        make = self._level if column.kind in ("level", "fraction") else self._growth
        values = [make(column, figures, before, last) for before, last in self._ends(column.scalar)]
        return None if all(value is None for value in values) else values

    def _level(self, column: Column, figures: Sequence[int], before: int | None, last: int | None) -> Any:
        if last is None:
            return None
        if column.names:
            return column.names[figures[last]]
        if column.kind == "fraction":
            return round(figures[last] / column.unit, DECIMALS)
        return figures[last] // column.unit

    def _growth(self, column: Column, figures: Sequence[int], before: int | None, last: int | None) -> Any:
        if last is None or before is None or not self._same_machine(column, before, last):
            return None
        grown = max(0, figures[last] - figures[before])
        if column is MACHINE[0]:
            grown = self._at_most_all_cores(grown, before, last)
        if column.kind == "steady":
            return grown == 0
        if column.kind == "growth":
            return grown
        return self._percent(grown, before, last)

    def _percent(self, ns: int, before: int, last: int) -> float:
        return round(100 * ns / max(1, self._times[last] - self._times[before]), DECIMALS)

    def _at_most_all_cores(self, ns: int, before: int, last: int) -> int:
        """Return CPU time of the machine, which the kernel counts in ticks, as far as its cores have it."""
        cores = self._frames.place(last)[0].first.cpu_count
        return min(ns, cores * (self._times[last] - self._times[before])) if cores else ns

    def _same_machine(self, column: Column, before: int, last: int) -> bool:
        """Return whether two readings of a figure of the machine are of the same thing: the host, or the container."""
        scopes = self._frames.column("machine_in_container")
        return not column.scalar.startswith("machine_") or scopes[before] == scopes[last]

    def _other_percent(self) -> Values:
        """Return what other processes used of the machine."""
        busy, process, tree = map(self._frames.column, ("machine_busy_ns", "cpu_ns", "tree_cpu_ns"))
        found: list[float | None] = []
        for before, last in self._ends("machine_busy_ns"):
            if last is None or before is None or not self._same_machine(MACHINE[0], before, last):
                found.append(None)
                continue
            ours = process if tree[before] < 0 or tree[last] < 0 else tree
            busy_ns = self._at_most_all_cores(busy[last] - busy[before], before, last)
            used_ns = busy_ns - max(0, ours[last] - ours[before])
            found.append(self._percent(max(0, used_ns), before, last))
        return None if all(value is None for value in found) else found

    def _children_percent(self) -> Values:
        """Return what reaped children used, as far as they used it in the row."""
        watched, reaped = self._values(WATCHED), self._values(REAPED)
        if reaped is not None:
            early = self._early()
            reaped = [
                None if bisect_right(early, end) > bisect_right(early, begin) else value
                for value, (begin, end) in zip(reaped, pairwise(self._bounds), strict=True)
            ]
        rows: Mapping[int, Any] = dict(enumerate(reaped or ())) | {
            row: value for row, value in enumerate(watched or ()) if value is not None
        }
        values = [rows.get(row) for row in range(len(self._bounds) - 1)]
        return None if all(value is None for value in values) else values

    def _early(self) -> list[int]:
        """Return the readings at which more was booked than all cores can have used since the reading before."""
        figures = self._frames.column("reaped_ns")
        known = [number for number, ns in enumerate(figures) if ns >= 0]
        return [
            last
            for before, last in pairwise(known)
            if not reaped_within(
                figures[last] - figures[before],
                self._times[last] - self._times[before],
                self._frames.place(last)[0].first.cpu_count,
            )
        ]

    def _ends(self, scalar: str) -> list[tuple[int | None, int | None]]:
        """Return for each row the last reading before it, and the last one in it."""
        figures = self._frames.column(scalar)
        found: list[tuple[int | None, int | None]] = []
        begin = self._bounds[0] if self._bounds else -1
        before = next((number for number in range(begin, -1, -1) if figures[number] >= 0), None)
        for bound in self._bounds[1:]:
            last = next((number for number in range(bound, begin, -1) if figures[number] >= 0), None)
            found.append((before, last))
            before = before if last is None else last
            begin = bound
        return found


def _filled(cells: Mapping[int, tuple[float, int]], rows: int) -> tuple[list[float | None], list[int | None]]:
    found = [cells.get(row) for row in range(rows)]
    return [None if cell is None else cell[0] for cell in found], [None if cell is None else cell[1] for cell in found]
