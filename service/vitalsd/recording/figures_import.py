"""Rebuild the figures of snapshots from the columns of a history in a report, which has rounded numbers."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from vitalsd.contract.signals_page import NAME
from vitalsd.recording.history_columns import APPLICATION, MACHINE, PROCESS, Column
from vitalsd.recording.scalars import SCALARS, UNKNOWN
from vitalsd.snapshot import Child

__all__ = ["FiguresImport", "numbers", "whole"]

LARGEST = 2**63 - 1
"""Largest number that a record holds: that of a signed integer of 64 bits."""


def whole(value: Any, most: int = LARGEST) -> int:
    """Return `value` as an integer from 0 to `most`. Raise `ValueError`."""
    number = int(value)
    if not 0 <= number <= most:
        raise ValueError("a number that is negative or too large")
    return number


def numbers(found: Any, rows: int) -> Sequence[float | None]:
    """Return a column of numbers, of which any may be missing; ``None`` is one without any. Raise `ValueError`."""
    cells = _cells(found, rows)
    for cell in cells:
        if cell is not None and (type(cell) not in (int, float) or not isfinite(cell) or cell < 0):
            raise ValueError(f"a column has {cell!r:.80}, which is no number from 0")
    return cells


def _cells(found: Any, rows: int) -> Sequence[Any]:
    if found is None:
        return [None] * rows
    if not isinstance(found, list) or len(found) != rows:
        raise ValueError("its columns differ in length")
    return found


def _gauge(found: Any, rows: int) -> tuple[str, Sequence[float | None]]:
    """Return name and values of a gauge. Raise `ValueError`, `KeyError` or `TypeError`."""
    name, cells = found["name"], _cells(found["value"], rows)
    if not NAME.fullmatch(name):
        raise ValueError(f"a gauge {name!r:.80}")
    for cell in cells:
        if cell is not None and (type(cell) not in (int, float) or not isfinite(cell)):
            raise ValueError(f"a gauge has {cell!r:.80}, which is no finite number")
    return name, cells


def _group(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = table.get(name)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} is no object")
    return found or {}


class FiguresImport:
    """
    Rebuild what snapshots have beside their threads. Counters begin at 0 with the first snapshot, which ends no row.

    Args:
        table: the history; one of schema 1 has no such columns.
        times_ns: time of each snapshot, ns.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: it is not as vitalsd writes it.
    """

    def __init__(self, table: Mapping[str, Any], times_ns: Sequence[int]) -> None:
        self._times_ns = times_ns
        self._rows = len(times_ns) - 1
        machine, application = _group(table, "machine"), _group(table, "application")
        self._scalars = {column.scalar: self._figures(column, table) for column in PROCESS}
        begin = self._first_reading(MACHINE, machine)
        self._scalars |= {column.scalar: self._figures(column, machine, begin) for column in MACHINE}
        read = [any(column[at] >= 0 for column in list(self._scalars.values())[len(PROCESS) :]) for at in self._places]
        scope = ("host", "container").index(machine.get("scope", "host"))
        self._scalars["machine_in_container"] = [scope if known else UNKNOWN for known in read]
        self._first_tree = self._first_reading(APPLICATION, application)
        self._scalars["tree_reaped_ns"] = [UNKNOWN] * len(times_ns)
        children = Column("children_percent", "tree_reaped_ns" if application else "reaped_ns", "percent")
        self._scalars[children.scalar] = self._figures(children, table, self._first_tree if application else 0)
        self._scalars |= {column.scalar: self._figures(column, application, self._first_tree) for column in APPLICATION}
        self._complete_trees()
        self._scalars["wait_ns"] = self._waits(table)
        self._gauges = [_gauge(each, self._rows) for each in table.get("gauges", [])]
        if len({name for name, _ in self._gauges}) < len(self._gauges):
            raise ValueError("two gauges have one name")
        self._children = self._read_children(table.get("children", []))
        self._child_ns = [0] * len(self._children)

    def scalars(self, place: int, **counters: int) -> list[int]:
        """Return the scalars of one snapshot, with `counters` for those that each snapshot has."""
        row = {name: column[place] for name, column in self._scalars.items()} | counters
        return [row.get(name, UNKNOWN) for name in SCALARS]

    def next_children(self, place: int) -> tuple[Child, ...]:
        """Return the descendants at one snapshot; call it for each snapshot in turn."""
        trees = self._scalars["tree_cpu_ns"]
        if place <= self._first_tree or trees[place] < 0:
            return ()
        before = next((at for at in range(place - 1, -1, -1) if trees[at] >= 0), place)
        elapsed_ns = self._times_ns[place] - self._times_ns[before]
        found = []
        for i, (pid, name, percents, sizes) in enumerate(self._children):
            percent = percents[place - 1]
            if percent is not None:
                self._child_ns[i] += round(percent * elapsed_ns / 100)
                size = whole(sizes[place - 1] or 0, LARGEST // 1024) * 1024
                # The table has one entry for each process: its place is as good as its start.
                found.append(Child(pid, i, name, self._child_ns[i], 0, size, 0))
        return tuple(found)

    def gauges(self, row: int) -> tuple[tuple[str, float], ...]:
        """Return the gauges at the end of a row; the first snapshot, at -1, has none."""
        if row < 0:
            return ()
        found = ((name, values[row]) for name, values in self._gauges)
        return tuple(sorted((name, float(value)) for name, value in found if value is not None))

    @property
    def _places(self) -> range:
        return range(self._rows + 1)

    def _first_reading(self, columns: Sequence[Column], group: Mapping[str, Any]) -> int:
        """Return the place of the first reading of a group: the end of the first row with figures if none is a rate."""
        cells = [(column.kind == "percent", _cells(group.get(column.name), self._rows)) for column in columns]
        for row in range(self._rows):
            known = [is_rate for is_rate, values in cells if values[row] is not None]
            if known:
                return 0 if any(known) else row + 1
        return 0

    def _figures(self, column: Column, group: Mapping[str, Any], begin: int = 0) -> list[int]:
        """Return a scalar of each snapshot; a counter is 0 at `begin`, and unknown before."""
        found = group.get(column.name)
        if column.names:
            cells = _cells(found, self._rows)
            return [UNKNOWN, *(UNKNOWN if cell is None else column.names.index(cell) for cell in cells)]
        if column.kind == "steady":
            cells = _cells(found, self._rows)
            if any(cell not in (None, True, False) for cell in cells):
                raise ValueError(f"{column.name} has what is not true or false")
            return self._sums([None if cell is None else int(not cell) for cell in cells], begin)
        cells = numbers(found, self._rows)
        if column.kind == "growth":
            return self._sums([None if cell is None else whole(cell) for cell in cells], begin)
        if column.kind == "percent":
            return self._sums(self._shares(cells, begin), begin)
        return [
            UNKNOWN,
            *(UNKNOWN if cell is None else whole(round(cell * column.unit)) for cell in cells),
        ]

    def _shares(self, cells: Sequence[float | None], begin: int) -> list[int | None]:
        """Return percentages of the time since the last row that has one, as times, ns."""
        found: list[int | None] = []
        since_ns = self._times_ns[begin]
        for percent, at_ns in zip(cells, self._times_ns[1:], strict=True):
            found.append(None if percent is None else round(percent * (at_ns - since_ns) / 100))
            since_ns = since_ns if percent is None else at_ns
        return found

    def _sums(self, growth: Sequence[int | None], begin: int) -> list[int]:
        """Return a counter that grows so in each row; it is unknown at all snapshots if there is no growth."""
        if all(each is None for each in growth):
            return [UNKNOWN] * (self._rows + 1)
        found, total = [UNKNOWN] * (self._rows + 1), 0
        found[begin] = 0
        for place, each in enumerate(growth[begin:], begin + 1):
            total += each or 0
            found[place] = UNKNOWN if each is None else total
        return found

    def _complete_trees(self) -> None:
        """Make all figures of the tree known at each reading of it."""
        names = [name for name in SCALARS if name.startswith("tree_")]
        columns = [self._scalars[name] for name in names]
        reached = [0] * len(columns)
        for place in self._places[self._first_tree :]:
            row = [column[place] for column in columns]
            read = any(value >= 0 for value in row)
            for at, column in enumerate(columns):
                reached[at] = row[at] if row[at] >= 0 else reached[at]
                column[place] = reached[at] if read else UNKNOWN

    def _waits(self, table: Mapping[str, Any]) -> list[int]:
        """Return the waits of the process at each snapshot."""
        return self._figures(Column("wait_percent", "wait_ns", "percent"), table)

    def _read_children(self, found: Any) -> list[tuple[int, str, Sequence[float | None], Sequence[float | None]]]:
        return [
            (
                whole(child["pid"]),
                str(child["name"]),
                numbers(child["cpu_percent"], self._rows),
                numbers(child["rss_kb"], self._rows),
            )
            for child in found
        ]
