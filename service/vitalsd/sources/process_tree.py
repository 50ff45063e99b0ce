"""
Add up the CPU time of a process and its descendants over readings, on every platform.

A source reads a row of each process and passes all rows of one reading to `ProcessLedger.read`. The kernel books the
CPU time of a child to its parent when the parent waits for it: the child's own time, and the time of the children that
it waited for. While a child lived, the readings before have counted part of that; the ledger counts only the rest.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vitalsd.snapshot import Child, ProcessTree

__all__ = ["CHILDREN", "Key", "Member", "ProcessLedger"]

CHILDREN = 256
"""Most processes that a source reads for one tree, the target included."""

Key = tuple[int, int]
"""Pid and start of a process in the kernel's own unit, which identify one run."""


class Member(NamedTuple):
    """
    One process in one reading.

    A source reads a parent before its children, and passes a zombie until its parent has waited for it: then the growth
    of the parent's `reaped_ns` is what the last row of the child shows.
    """

    key: Key
    parent: int
    """Pid of its parent."""
    name: str
    cpu_ns: int
    reaped_ns: int
    """CPU time of the children that it waited for, and of theirs."""
    rss_bytes: int
    thread_count: int
    """0: a zombie, which is neither listed nor counted."""
    is_young: bool
    """Whether it started after the reading before."""


class ProcessLedger:
    """Hold the counters of one process tree, which begin at 0. Not thread-safe."""

    def __init__(self) -> None:
        self._rows: dict[Key, Member] = {}
        self._found_ns: dict[Key, int] = {}
        """CPU time of each member when it was found, ns; 0 if it was young then."""
        self._unspent_ns: dict[Key, int] = {}
        """CPU time of children that vanished before their parent's row showed it, by parent, ns."""
        self._cpu_ns = self._reaped_ns = self._gaps = 0

    @property
    def members(self) -> Mapping[Key, Member]:
        """The rows of the last reading."""
        return self._rows

    def read(self, rows: Sequence[Member], *, missed: bool) -> ProcessTree:
        """
        Add one reading.

        Args:
            rows: the target first, then its descendants.
            missed: whether a descendant could not be read, or there are more than `CHILDREN` processes.

        Returns:
            The tree with the counters as of this reading.
        """
        before, now = self._rows, {row.key: row for row in rows}
        target = rows[0].key
        if before:
            vanished_ns, earlier_ns = _vanished(before, now), self._unspent_ns
            self._unspent_ns = {}
            for key, row in now.items():
                booked_ns = _booked(before.get(key), row)
                seen_ns = vanished_ns.get(key, 0)
                known_ns = seen_ns + earlier_ns.get(key, 0)
                self._cpu_ns += _grown(before.get(key), row) + max(0, booked_ns - known_ns)
                if key == target:
                    self._reaped_ns += max(0, booked_ns - known_ns)
                # The rest may be booked in the next reading: the row of the parent was read before the child vanished.
                if (unspent_ns := min(seen_ns, known_ns - booked_ns)) > 0:
                    self._unspent_ns[key] = unspent_ns
                missed = missed or (booked_ns > 0 and key not in vanished_ns and key not in earlier_ns)
        self._gaps += missed
        self._found_ns = {
            key: self._found_ns.get(key, 0 if before and row.is_young else row.cpu_ns) for key, row in now.items()
        }
        self._rows = now
        living = [row for row in rows if row.thread_count]
        return ProcessTree(
            cpu_ns=self._cpu_ns,
            reaped_ns=self._reaped_ns,
            rss_bytes=sum(row.rss_bytes for row in living),
            process_count=len(living),
            gaps=self._gaps,
            children=tuple(self._child(row) for row in sorted(living) if row.key != target),
        )

    def _child(self, row: Member) -> Child:
        return Child(
            pid=row.key[0],
            start_key=row.key[1],
            name=row.name,
            cpu_ns=row.cpu_ns,
            found_cpu_ns=self._found_ns[row.key],
            rss_bytes=row.rss_bytes,
            thread_count=row.thread_count,
        )


def _grown(before: Member | None, row: Member) -> int:
    """Return the own CPU time of a member since the reading before, ns; 0 for one that was found late."""
    if before is None:
        return row.cpu_ns if row.is_young else 0
    return max(0, row.cpu_ns - before.cpu_ns)


def _booked(before: Member | None, row: Member) -> int:
    """Return the CPU time of children that was booked to a member since the reading before, ns."""
    if before is None:
        return row.reaped_ns if row.is_young else 0
    return max(0, row.reaped_ns - before.reaped_ns)


def _vanished(before: Mapping[Key, Member], now: Mapping[Key, Member]) -> dict[Key, int]:
    """Return what the readings counted of the members that vanished, ns, by the nearest ancestor that did not."""
    keys = {key[0]: key for key in before}
    vanished_ns = defaultdict[Key, int](int)
    for gone in before.keys() - now.keys():
        ancestor, passed = keys.get(before[gone].parent), {gone}
        while ancestor is not None and ancestor not in now and ancestor not in passed:
            passed.add(ancestor)
            ancestor = keys.get(before[ancestor].parent)
        if ancestor is not None and ancestor in now:
            vanished_ns[ancestor] += before[gone].cpu_ns + before[gone].reaped_ns
    return vanished_ns
