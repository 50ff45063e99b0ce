"""
Add up the CPU time of a process and its descendants over readings, on every platform.

A source reads a row of each process and passes all rows of one reading to `ProcessLedger.read`. The kernel books the
CPU time of a child to its parent when the parent waits for it: the child's own time, and the time of the children that
it waited for. While a child lived, the readings before have counted part of that; the ledger counts only the rest.

The sums are lower bounds: what the kernel books to a process outside of the tree, or nowhere, is missing after the last
row of the child.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vitalsd.snapshot import Child, ProcessTree, reaped_within

__all__ = ["CHILDREN", "Key", "Member", "ProcessLedger"]

CHILDREN = 256
"""Most descendants that a source reads."""

Key = tuple[int, int]
"""Pid and start of a process in the kernel's own unit, which identify one run."""


class Member(NamedTuple):
    """
    One process in one reading.

    A source reads a parent before its children, passes a zombie until its parent has waited for it, and goes on to pass
    a descendant whose parent has ended.
    """

    key: Key
    parent: int
    """Pid of its parent; 0: it is not a member."""
    name: str
    cpu_ns: int
    reaped_ns: int
    """CPU time of the children that it waited for, and of theirs."""
    rss_bytes: int
    thread_count: int
    is_young: bool
    """Whether it started after the reading before."""
    is_living: bool = True
    """False: it has exited and is neither listed nor counted as a process."""


class _Lost(NamedTuple):
    """What is known of children that vanished: of one ancestor, in which the kernel books them."""

    counted_ns: int = 0
    """What the readings have counted of them."""
    most_ns: int = 0
    """Most that they can have used since their last row."""


class ProcessLedger:
    """
    Hold the counters of one process tree, which begin at 0. Not thread-safe.

    Args:
        cpu_count: cores of the machine; 0: unknown.
        grain_ns: most by which the growth of `Member.reaped_ns` may be too small because of its unit, ns.
    """

    def __init__(self, cpu_count: int = 0, grain_ns: int = 0) -> None:
        self._cpu_count = cpu_count
        self._grain_ns = grain_ns
        self._rows: dict[Key, Member] = {}
        self._found_ns: dict[Key, int] = {}
        """CPU time of each member when it was found, ns; 0 if it was young then."""
        self._unspent: dict[Key, _Lost] = {}
        """What was counted of vanished children and is not booked yet, by ancestor."""
        self._cpu_ns = self._reaped_ns = self._gaps = 0

    @property
    def members(self) -> Mapping[Key, Member]:
        """The rows of the last reading."""
        return self._rows

    def read(self, rows: Sequence[Member], elapsed_ns: int, *, missed: bool) -> ProcessTree:
        """
        Add one reading.

        Args:
            rows: the target first, then its descendants.
            elapsed_ns: time since the reading before; of the first one any.
            missed: whether a descendant could not be read, or there are more than `CHILDREN`.

        Returns:
            The tree with the counters as of this reading.
        """
        now = {row.key: row for row in rows}
        if self._rows:
            missed = self._count(rows[0].key, now, elapsed_ns) or missed
        self._gaps += missed
        self._found_ns = {
            key: self._found_ns.get(key, 0 if self._rows and row.is_young else row.cpu_ns) for key, row in now.items()
        }
        self._rows = now
        living = [row for row in rows if row.is_living]
        return ProcessTree(
            cpu_ns=self._cpu_ns,
            reaped_ns=self._reaped_ns,
            rss_bytes=sum(row.rss_bytes for row in living),
            process_count=len(living),
            gaps=self._gaps,
            children=tuple(self._child(row) for row in sorted(living) if row is not rows[0]),
        )

    def _count(self, target: Key, now: Mapping[Key, Member], elapsed_ns: int) -> bool:
        """Add to the counters; return whether the reading missed something."""
        before, earlier = self._rows, self._unspent
        self._unspent = {}
        lost, missed = _lost(before, now, elapsed_ns)
        for key, row in now.items():
            known = before.get(key)
            if known is None and row.is_young:  # all of it is new
                known = row._replace(cpu_ns=0, reaped_ns=0)
            elif known is None:  # it was there before and was not found
                known, missed = row, True
            booked_ns = max(0, row.reaped_ns - known.reaped_ns)
            more_ns, explained = self._settle(
                key, booked_ns, lost.get(key, _Lost()), earlier.get(key, _Lost()), elapsed_ns
            )
            self._cpu_ns += max(0, row.cpu_ns - known.cpu_ns) + more_ns
            self._reaped_ns += more_ns if key == target else 0
            missed = missed or not explained
        return missed

    def _settle(self, key: Key, booked_ns: int, lost: _Lost, earlier: _Lost, elapsed_ns: int) -> tuple[int, bool]:
        """
        Return what a member was booked beyond what is counted, ns, and whether children that vanished explain it.

        A child may be booked one reading after it vanished, because the row of its parent was read before that. What
        the unit of the booked time has cut off is booked with a later child.
        """
        more_ns = booked_ns - lost.counted_ns - earlier.counted_ns
        if more_ns > 0:
            if not reaped_within(more_ns, elapsed_ns, self._cpu_count):
                return 0, False  # a child used it before it became a member, or could not be read
            return more_ns, more_ns <= lost.most_ns + earlier.most_ns
        unspent_ns = max(min(lost.counted_ns, -more_ns), min(self._grain_ns, -more_ns))
        if unspent_ns:
            self._unspent[key] = _Lost(unspent_ns, lost.most_ns)
        return 0, earlier.counted_ns - booked_ns <= self._grain_ns  # else the end of a child was not booked

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


def _lost(before: Mapping[Key, Member], now: Mapping[Key, Member], elapsed_ns: int) -> tuple[dict[Key, _Lost], bool]:
    """Return what is known of the members that vanished, by nearest ancestor that did not; and if one has none."""
    keys = {key[0]: key for key in before}
    lost, missed = defaultdict[Key, _Lost](_Lost), False
    for gone in before.keys() - now.keys():
        row, passed = before[gone], {gone}
        ancestor = keys.get(row.parent)
        while ancestor is not None and ancestor not in now and ancestor not in passed:
            passed.add(ancestor)
            ancestor = keys.get(before[ancestor].parent)
        if ancestor is None or ancestor not in now:
            missed = True
            continue
        counted_ns, most_ns = lost[ancestor]
        # Of a zombie as well: times in ticks are rounded, so what is booked can exceed its final time a little.
        most_ns += elapsed_ns * max(1, row.thread_count)
        lost[ancestor] = _Lost(counted_ns + row.cpu_ns + row.reaped_ns, most_ns)
    return lost, missed
