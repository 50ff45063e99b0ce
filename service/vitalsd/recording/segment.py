"""
Store up to 64 snapshots with one set of threads: the first whole, of the others what the threads did since.

A thread that neither ran nor waited takes no memory, and names and ids are stored once.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress, islice
from math import isnan
from operator import add, is_not, sub
from sys import getsizeof
from typing import NamedTuple

from vitalsd.recording.scalars import SCALARS, scalars_of, snapshot_fields
from vitalsd.snapshot import Child, Snapshot

__all__ = ["CHILD_NUMBERS", "NO_DELTAS", "WAIT_STEP_NS", "ChildIdentity", "Segment", "ThreadDeltas"]

SEGMENT_LENGTH = 64
"""Limit of the snapshots in a segment."""
SEGMENT_BYTES = 1280
"""Memory of a segment and its first snapshot, without that for each thread, bytes."""
CHILD_BYTES = 400
"""Memory of the identity of a child, bytes."""
GAUGE_BYTES = 80
"""Memory of the name of a gauge, bytes."""
NAN = float("nan")
"""Stands for the value of a gauge that has none."""
WAIT_STEP_NS = 16_000
"""
Resolution of the waits of threads, ns: 0.0016 % of a second. A wait of up to a second takes two bytes, and so a quarter
of an hour of 1000 threads that all run and wait less than 8 MiB.
"""
CHILD_NUMBERS = 4
"""Integers that are stored of a child in each snapshot: index in `Segment.children`, CPU ns, RSS bytes, threads."""


class ThreadDeltas(NamedTuple):
    """What threads did since the snapshot before."""

    indexes: "array[int] | None"
    """The threads that ran or were charged with a wait, ascending; ``None``: all."""
    used_ns: "array[int]"
    """CPU time of each of them, ns."""
    waits: "array[int] | None"
    """
    Wait of each of them, in steps of `WAIT_STEP_NS`; ``None``: none was charged with a wait, or the source does not
    count them.
    """


NO_DELTAS = ThreadDeltas(array("I"), array("I"), None)
"""Deltas of a snapshot before which no thread ran or waited."""


class ChildIdentity(NamedTuple):
    """What does not change of a descendant of the target, see `vitalsd.snapshot.Child`."""

    pid: int
    start_key: int
    name: str
    found_cpu_ns: int


class Segment:
    """
    Store up to `SEGMENT_LENGTH` snapshots of one program with one set of threads.

    `scalars` holds the integers of `SCALARS` for each snapshot, one snapshot after another.

    Args:
        first: its first snapshot, which is then added as any other.
        gauge_names: the gauges that its snapshots may have; ``None``: those of `first`.
    """

    __slots__ = (
        "_child_indexes",
        "base_cpu_ns",
        "base_waits",
        "child_numbers",
        "children",
        "deltas",
        "first",
        "gauge_names",
        "gauge_values",
        "scalars",
        "size_bytes",
    )

    def __init__(self, first: Snapshot, gauge_names: tuple[str, ...] | None = None) -> None:
        self.base_cpu_ns = array("Q", first.thread_cpu_ns)
        self.base_waits = (
            None if first.thread_wait_ns is None else array("Q", [ns // WAIT_STEP_NS for ns in first.thread_wait_ns])
        )
        """Waits of each thread at the first snapshot, in steps; ``None``: the source does not count them."""
        self.first = replace(
            first,
            thread_cpu_ns=self.base_cpu_ns,
            thread_wait_ns=None,
            figures=None,
            thread_figures=None,
            machine=None,
            tree=None,
            gauges=(),
        )
        self.scalars = array("q")
        self.deltas: list[ThreadDeltas] = []
        self.children: list[ChildIdentity] = []
        """The descendants that any of the snapshots has; it only grows."""
        self.child_numbers: dict[int, array[int]] = {}
        """`CHILD_NUMBERS` integers per child, by position of the snapshot; a snapshot without a tree has none."""
        self._child_indexes: dict[ChildIdentity, int] = {}
        self.gauge_names = tuple(name for name, _ in first.gauges) if gauge_names is None else gauge_names
        self.gauge_values: dict[int, array[float]] = {}
        """
        Values of `gauge_names` by position of the snapshot, NaN for one that has none; a snapshot without gauges has no
        entry.
        """
        counters = 1 if self.base_waits is None else 2
        self.size_bytes = SEGMENT_BYTES + 8 * counters * len(self.base_cpu_ns) + GAUGE_BYTES * len(self.gauge_names)

    def __len__(self) -> int:
        """Return the number of snapshots."""
        return len(self.deltas)

    def accepts(self, snapshot: Snapshot) -> bool:
        """Return whether `snapshot` fits: room left, same threads, same names, same program."""
        first = self.first
        return (
            len(self) < SEGMENT_LENGTH
            and snapshot.roster == first.roster
            and snapshot.image == first.image
            and snapshot.reading == first.reading
            and snapshot.source == first.source
            and snapshot.cpu_count == first.cpu_count
            and (snapshot.thread_wait_ns is None) == (self.base_waits is None)
            and all(name in self.gauge_names for name, _ in snapshot.gauges)
        )

    def append(self, snapshot: Snapshot, before: Snapshot | None) -> None:
        """Add a snapshot that it `accepts`, taken after `before`, which is not needed for the first one."""
        deltas = NO_DELTAS if before is None or not self.deltas else _thread_deltas(before, snapshot)
        numbers = None if snapshot.tree is None else self._numbers(snapshot.tree.children)
        values = dict(snapshot.gauges)
        gauges = array("d", [values.get(name, NAN) for name in self.gauge_names]) if values else None
        self.add(scalars_of(snapshot), deltas, numbers, gauges)

    def add(
        self,
        scalars: Sequence[int],
        deltas: ThreadDeltas,
        child_numbers: "array[int] | None" = None,
        gauges: "array[float] | None" = None,
    ) -> None:
        """Add a snapshot as it was stored."""
        self.scalars.extend(scalars)
        if gauges:
            self.gauge_values[len(self)] = gauges
            self.size_bytes += 100 + getsizeof(gauges)
        if child_numbers:
            self.child_numbers[len(self)] = child_numbers
            self.size_bytes += 100 + getsizeof(child_numbers)
        self.size_bytes += 8 * len(scalars) + 8
        if deltas is not NO_DELTAS:
            self.size_bytes += getsizeof(deltas) + sum(getsizeof(each) for each in deltas if each is not None)
        self.deltas.append(deltas)  # the last step: from now on readers on other threads see the snapshot

    def add_child(self, child: ChildIdentity) -> int:
        """Add a descendant; return its index in `children`."""
        index = self._child_indexes[child] = len(self.children)
        self.children.append(child)
        self.size_bytes += CHILD_BYTES
        return index

    def scalars_at(self, position: int) -> "array[int]":
        """Return the scalars of one snapshot, in the order of `SCALARS`."""
        width = len(SCALARS)
        return self.scalars[position * width : (position + 1) * width]

    def column(self, name: str) -> "array[int]":
        """Return one scalar of all snapshots."""
        return self.scalars[SCALARS.index(name) :: len(SCALARS)]

    def iter_cpu_ns(self) -> Iterator[list[int]]:
        """Yield the CPU time of each thread, ns, snapshot by snapshot; the list is valid until the next one."""
        return _accumulated(self.base_cpu_ns, ((each.indexes, each.used_ns) for each in self.deltas))

    def thread_cpu_ns(self, position: int) -> list[int]:
        """Return the CPU time of each thread at one snapshot, ns."""
        return next(islice(self.iter_cpu_ns(), position, None))

    def thread_waits(self, position: int) -> list[int] | None:
        """Return the waits of each thread at one snapshot, in steps; ``None``: the source does not count them."""
        if self.base_waits is None:
            return None
        return next(islice(_accumulated(self.base_waits, ((d.indexes, d.waits) for d in self.deltas)), position, None))

    def children_at(self, position: int) -> tuple[Child, ...]:
        """Return the descendants at one snapshot, in the order of the source."""
        numbers = self.child_numbers.get(position, array("q"))
        rows = (numbers[i : i + CHILD_NUMBERS] for i in range(0, len(numbers), CHILD_NUMBERS))
        found = []
        for index, cpu_ns, rss_bytes, thread_count in rows:
            child = self.children[index]
            found.append(
                Child(child.pid, child.start_key, child.name, cpu_ns, child.found_cpu_ns, rss_bytes, thread_count)
            )
        return tuple(found)

    def gauges_at(self, position: int) -> tuple[tuple[str, float], ...]:
        """Return the gauges at one snapshot, by ascending name."""
        values = self.gauge_values.get(position)
        if values is None:
            return ()
        return tuple(sorted(each for each in zip(self.gauge_names, values, strict=True) if not isnan(each[1])))

    def snapshot(self, position: int) -> Snapshot:
        """Return one snapshot as it was, but for what is not recorded: state, warnings, and most figures."""
        waits = self.thread_waits(position)
        return replace(
            self.first,
            **snapshot_fields(self.scalars_at(position), self.children_at(position)),
            thread_cpu_ns=self.thread_cpu_ns(position),
            thread_wait_ns=None if waits is None else [steps * WAIT_STEP_NS for steps in waits],
            gauges=self.gauges_at(position),
            state=None,
            warnings=(),
        )

    def _numbers(self, children: Sequence[Child]) -> "array[int]":
        numbers = array("q")
        for child in children:
            identity = ChildIdentity(child.pid, child.start_key, child.name, child.found_cpu_ns)
            index = self._child_indexes.get(identity)
            if index is None:
                index = self.add_child(identity)
            numbers.extend((index, child.cpu_ns, child.rss_bytes, child.thread_count))
        return numbers


def _accumulated(
    base: Sequence[int], deltas: Iterator[tuple["array[int] | None", "array[int] | None"]]
) -> Iterator[list[int]]:
    """Yield the sums of `base` and the deltas so far; the list is valid until the next one."""
    sums = list(base)
    for indexes, grown in deltas:
        if grown is not None:
            if indexes is None:
                sums = list(map(add, sums, grown))
            else:
                for i, ns in zip(indexes, grown, strict=True):
                    sums[i] += ns
        yield sums


def _thread_deltas(before: Snapshot, after: Snapshot) -> ThreadDeltas:
    """Return what each thread did between two snapshots with the same threads."""
    changed = _changed(before.thread_cpu_ns, after.thread_cpu_ns)
    old, new = before.thread_wait_ns, after.thread_wait_ns
    waited = () if old is None or new is None else _changed(old, new)
    if waited:
        changed = sorted({*changed, *waited})
    if not changed:
        return NO_DELTAS
    indexes = None if len(changed) > len(after.roster) // 2 else array("I", changed)
    used_ns = _compact("Iq", _grown(before.thread_cpu_ns, after.thread_cpu_ns, indexes))
    if not waited or old is None or new is None:
        return ThreadDeltas(indexes, used_ns, None)
    chosen = range(len(new)) if indexes is None else indexes
    steps = [new[i] // WAIT_STEP_NS - old[i] // WAIT_STEP_NS for i in chosen]
    return ThreadDeltas(indexes, used_ns, _compact("HIq", steps))


def _changed(before: Sequence[int], after: Sequence[int]) -> Sequence[int]:
    """Return the indexes at which two columns differ."""
    # See `Snapshot.thread_cpu_ns`: most counters need no arithmetic.
    return [i for i in compress(range(len(after)), map(is_not, after, before)) if after[i] != before[i]]


def _grown(before: Sequence[int], after: Sequence[int], indexes: "array[int] | None") -> list[int]:
    """Return what counters grew by; `indexes` as in `ThreadDeltas`."""
    return list(map(sub, after, before)) if indexes is None else [after[i] - before[i] for i in indexes]


def _compact(kinds: str, numbers: list[int]) -> "array[int]":
    """Return an array of the first of `kinds`, from narrow to wide, that all numbers fit; the last one fits any."""
    for kind in kinds[:-1]:
        with suppress(OverflowError):
            return array(kind, numbers)
    return array(kinds[-1], numbers)
