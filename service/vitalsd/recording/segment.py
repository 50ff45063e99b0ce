"""
Store up to 64 snapshots with one set of threads: the first whole, of the others the CPU time since the one before.

A thread that did not run takes no memory, and names and ids are stored once.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress, islice
from operator import add, is_not, sub
from sys import getsizeof
from typing import Any

from vitalsd.snapshot import Snapshot

__all__ = ["NO_DELTAS", "CpuDeltas", "Segment"]

SEGMENT_LENGTH = 64
"""Limit of the snapshots in a segment."""
SEGMENT_BYTES = 1280
"""Memory of a segment and its first snapshot, without that for each thread, bytes."""

CpuDeltas = tuple["array[int] | None", "array[int]"]
"""CPU time used since the snapshot before, ns: (``None``, one per thread) or (indexes of threads, one each)."""

NO_DELTAS: CpuDeltas = (array("I"), array("I"))
"""Deltas of a snapshot before which no thread ran."""


class Segment:
    """
    Store up to `SEGMENT_LENGTH` snapshots of one program with one set of threads.

    `scalars` holds `SCALARS` integers per snapshot, one snapshot after another.
    """

    SCALARS = (
        "monotonic_ns",
        "boottime_ns",
        "wall_ns",
        "uptime_ns",
        "skew_ns",
        "cpu_ns",
        "exited_low_ns",
        "exited_high_ns",
        "rss_bytes",
        "vm_bytes",
    )
    """Integers that are stored for each snapshot, in this order; the order is part of the format on disk."""

    @classmethod
    def snapshot_fields(cls, scalars: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a `Snapshot` that are in `SCALARS`."""
        fields: dict[str, Any] = dict(zip(cls.SCALARS, scalars, strict=True))
        fields["exited_cpu_ns"] = fields.pop("exited_low_ns"), fields.pop("exited_high_ns")
        return fields

    __slots__ = ("base_cpu_ns", "deltas", "first", "last_cpu_ns", "scalars", "size_bytes")

    def __init__(self, first: Snapshot) -> None:
        self.first = first
        self.base_cpu_ns = array("Q", first.thread_cpu_ns)
        self.last_cpu_ns: Sequence[int] = self.base_cpu_ns
        self.scalars = array("q")
        self.deltas: list[CpuDeltas] = []
        self.size_bytes = SEGMENT_BYTES + 16 * len(self.base_cpu_ns)

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
        )

    def append(self, snapshot: Snapshot) -> None:
        """Add a snapshot that it `accepts`."""
        deltas = _cpu_deltas(self.last_cpu_ns, snapshot.thread_cpu_ns) if self.deltas else NO_DELTAS
        self.add(
            (
                snapshot.monotonic_ns,
                snapshot.boottime_ns,
                snapshot.wall_ns,
                snapshot.uptime_ns,
                snapshot.skew_ns,
                snapshot.cpu_ns,
                *snapshot.exited_cpu_ns,
                snapshot.rss_bytes,
                snapshot.vm_bytes,
            ),
            deltas,
        )
        self.last_cpu_ns = snapshot.thread_cpu_ns

    def add(self, scalars: Sequence[int], deltas: CpuDeltas) -> None:
        """Add a snapshot as it was stored."""
        self.scalars.extend(scalars)
        self.deltas.append(deltas)
        self.size_bytes += 8 * len(scalars) + 8
        if deltas is not NO_DELTAS:
            self.size_bytes += 56 + getsizeof(deltas[0]) + getsizeof(deltas[1])

    def scalars_at(self, position: int) -> "array[int]":
        """Return the scalars of one snapshot, in the order of `SCALARS`."""
        width = len(self.SCALARS)
        return self.scalars[position * width : (position + 1) * width]

    def column(self, name: str) -> "array[int]":
        """Return one scalar of all snapshots."""
        return self.scalars[self.SCALARS.index(name) :: len(self.SCALARS)]

    def iter_cpu_ns(self) -> Iterator[list[int]]:
        """Yield the CPU time of each thread, ns, snapshot by snapshot; the list is valid until the next one."""
        cpu_ns = list(self.base_cpu_ns)
        for indexes, used_ns in self.deltas:
            if indexes is None:
                cpu_ns = list(map(add, cpu_ns, used_ns))
            else:
                for i, ns in zip(indexes, used_ns, strict=True):
                    cpu_ns[i] += ns
            yield cpu_ns

    def thread_cpu_ns(self, position: int) -> list[int]:
        """Return the CPU time of each thread at one snapshot, ns."""
        return next(islice(self.iter_cpu_ns(), position, None))

    def snapshot(self, position: int) -> Snapshot:
        """Return one snapshot as it was, but for the figures of threads, state and warnings, which are not recorded."""
        fields, cpu_ns = self.snapshot_fields(self.scalars_at(position)), self.thread_cpu_ns(position)
        return replace(self.first, **fields, thread_cpu_ns=cpu_ns, thread_figures=None, state=None, warnings=())


def _cpu_deltas(before: Sequence[int], after: Sequence[int]) -> CpuDeltas:
    """Return what each thread used between two snapshots."""
    # See `Snapshot.thread_cpu_ns`: most counters need no arithmetic.
    changed = [i for i in compress(range(len(after)), map(is_not, after, before)) if after[i] != before[i]]
    if not changed:
        return NO_DELTAS
    if len(changed) > len(after) // 2:
        return None, _compact(list(map(sub, after, before)))
    return array("I", changed), _compact([after[i] - before[i] for i in changed])


def _compact(used_ns: list[int]) -> "array[int]":
    """Return CPU times as integers of four bytes each if all fit (less than 4.3 s), or else of eight."""
    try:
        return array("I", used_ns)
    except OverflowError:
        return array("q", used_ns)
