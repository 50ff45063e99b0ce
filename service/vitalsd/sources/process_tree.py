"""
Add up the CPU time of a process and its descendants over readings, on every platform.

A source reads a row of each process and passes all rows of one reading to `ProcessLedger.read`. The kernel books the
CPU time of a child to its parent when the parent waits for it: the child's own time, and the time of the children that
it waited for. While a child lived, the readings before have counted part of that; the ledger counts only the rest.

The sums are lower bounds: what the kernel books to a process outside of the tree, or nowhere, is missing after the last
row of the child.
"""

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
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
    a descendant after its parent has ended.
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


_NOTHING = _Lost()


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
        self._children: dict[Key, Child] = {}
        """The members without the target, as of the last reading."""
        self._unspent: dict[Key, _Lost] = {}
        """What was counted of vanished children and is not booked yet, by ancestor."""
        self._cpu_ns = self._reaped_ns = self._gaps = 0

    @property
    def members(self) -> Mapping[Key, Member]:
        """The rows of the last reading."""
        return self._rows

    def heirs(self, living: Container[Key]) -> dict[Key, Key | None]:
        """
        Return the members of the last reading that have vanished, each with the ancestor in which the kernel books it.

        That is the nearest one that did not vanish; ``None``: it is outside of the tree.

        Args:
            living: the processes that there are now.
        """
        gone = [key for key in self._rows if key not in living]
        keys = {key[0]: key for key in self._rows} if gone else {}
        found: dict[Key, Key | None] = {}
        for key in gone:
            heir = keys.get(self._rows[key].parent)
            for _ in gone:  # Bounded, because rows may name each other as parents.
                if heir is None or heir in living:
                    break
                heir = keys.get(self._rows[heir].parent)
            found[key] = heir if heir is not None and heir in living else None
        return found

    def read(self, rows: Sequence[Member], elapsed_ns: int, *, missed: bool, is_settled: bool = False) -> ProcessTree:
        """
        Add one reading.

        Args:
            rows: the target first, then its descendants.
            elapsed_ns: time since the reading before; of the first one any.
            missed: whether a descendant could not be read, or there are more than `CHILDREN`.
            is_settled: whether each row is from after its process was booked the children that have vanished. False:
                some may be booked in the next reading.

        Returns:
            The tree with the counters as of this reading.
        """
        now = {row.key: row for row in rows}
        if self._rows:
            missed = self._count(rows[0].key, now, elapsed_ns, is_settled=is_settled) or missed
        self._gaps += missed
        self._children = {row.key: self._child(row) for row in rows[1:]}
        self._rows = now
        living = [row for row in rows if row.is_living]
        return ProcessTree(
            cpu_ns=self._cpu_ns,
            reaped_ns=self._reaped_ns,
            rss_bytes=sum(row.rss_bytes for row in living),
            process_count=len(living),
            gaps=self._gaps,
            children=tuple(sorted(self._children[row.key] for row in living if row is not rows[0])),
        )

    def _count(self, target: Key, now: Mapping[Key, Member], elapsed_ns: int, *, is_settled: bool) -> bool:
        """Add to the counters; return whether the reading missed something."""
        lost, missed = self._lost(now, elapsed_ns)
        earlier, self._unspent = self._unspent, {}
        for key, row in now.items():
            known = self._rows.get(key)
            if known is None and row.is_young:  # all of it is new
                known = row._replace(cpu_ns=0, reaped_ns=0)
            elif known is None:  # it was there before and was not found
                known, missed = row, True
            self._cpu_ns += max(0, row.cpu_ns - known.cpu_ns)
            booked_ns = max(0, row.reaped_ns - known.reaped_ns)
            if not booked_ns and key not in lost and key not in earlier:
                continue
            fresh, late = lost.get(key, _NOTHING), earlier.get(key, _NOTHING)
            more_ns = booked_ns - fresh.counted_ns - late.counted_ns
            if more_ns <= 0:
                missed = self._keep_unbooked(key, -more_ns, _NOTHING if is_settled else fresh) or missed
            elif not reaped_within(more_ns - late.most_ns, elapsed_ns, self._cpu_count):
                more_ns, missed = 0, True  # a child used it before it became a member, or could not be read
            else:
                missed = more_ns > fresh.most_ns + late.most_ns or missed
            self._cpu_ns += max(0, more_ns)
            self._reaped_ns += max(0, more_ns) if key == target else 0
        return missed

    def _keep_unbooked(self, key: Key, unspent_ns: int, fresh: _Lost) -> bool:
        """
        Keep what was counted of vanished children and is not booked; return whether the end of one is never booked.

        What the unit of the booked time has cut off is booked with a later child.

        Args:
            key: the ancestor in which the kernel books them.
            unspent_ns: what is not booked.
            fresh: those that may be booked in the next reading, because the row of the ancestor was read before that.
        """
        kept_ns = min(unspent_ns, max(fresh.counted_ns, self._grain_ns))
        if kept_ns:
            self._unspent[key] = _Lost(kept_ns, fresh.most_ns)
        return unspent_ns - fresh.counted_ns > self._grain_ns

    def _lost(self, now: Mapping[Key, Member], elapsed_ns: int) -> tuple[dict[Key, _Lost], bool]:
        """Return what is known of the members that vanished, by heir; and whether one has none."""
        lost, missed = defaultdict[Key, _Lost](_Lost), False
        for gone, heir in self.heirs(now).items():
            if heir is None:
                missed = True
                continue
            row, passed_on = self._rows[gone], self._unspent.get(gone, _NOTHING)
            # Of a zombie as well: times in ticks are rounded, so what is booked can exceed its final time a little.
            most_ns = elapsed_ns * max(1, row.thread_count) + passed_on.most_ns
            counted_ns = row.cpu_ns + row.reaped_ns + passed_on.counted_ns
            lost[heir] = _Lost(lost[heir].counted_ns + counted_ns, lost[heir].most_ns + most_ns)
        return lost, missed

    def _child(self, row: Member) -> Child:
        """Return a member as it is shown."""
        shown = self._children.get(row.key)
        if shown is not None and row == self._rows.get(row.key):
            return shown
        found_ns = shown.found_cpu_ns if shown is not None else 0 if self._rows and row.is_young else row.cpu_ns
        return Child(*row.key, row.name, row.cpu_ns, found_ns, row.rss_bytes, row.thread_count)
