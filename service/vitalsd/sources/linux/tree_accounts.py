"""
Add up the CPU time of a process and its descendants; this module reads no file.

The kernel books all CPU time of a child, and of its children that it has waited for, in its parent when the parent
waits for it (kernel/exit.c, wait_task_zombie). What was already counted while the child lived is subtracted there.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vitalsd.snapshot import Child, reaped_within
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS

__all__ = ["Member", "TreeAccounts", "heir_of"]

GRAIN_NS = 2 * USER_TICK_NS
"""Most by which the growth of `Member.reaped_ns` is wrong, ns: user and system time are each rounded down to a tick."""


@dataclass(slots=True, eq=False)
class Member:
    """The target, or a descendant of it, as of the last reading."""

    pid: int
    start_ticks: int
    parent: int = 0
    cpu_ns: int = 0
    """CPU time of its own threads."""
    reaped_ns: int = 0
    """CPU time of the children that it waited for, and of theirs."""
    counted_cpu_ns: int = 0
    """The part of `cpu_ns` that is counted, or is from before the process was found."""
    counted_reaped_ns: int = 0
    """The part of `reaped_ns` that is counted, or is from before the process was found."""
    rounding_ns: int = 0
    """By how much its children were counted too high, because of the steps of `reaped_ns`; at most `GRAIN_NS`."""
    found_cpu_ns: int = 0
    """See `vitalsd.snapshot.Child`."""
    thread_count: int = 1
    is_new: bool = True
    """Whether no reading before had it."""

    # Of the reader of the kernel
    handle: int = 0
    clock: int | None = None
    content: bytes = b""
    """Its ``stat``."""
    name: str = ""
    rss_bytes: int = 0
    child: Child | None = None
    """The same as it is shown; ``None``: it has changed."""

    def start_counting(self) -> None:
        """Count its CPU time from now on only."""
        self.counted_cpu_ns, self.counted_reaped_ns = self.cpu_ns, self.reaped_ns


def heir_of(ended: Member, all_ended: Mapping[int, Member], living: Mapping[int, Member]) -> Member | None:
    """
    Return the nearest ancestor that lives, in which the kernel may book the CPU time; ``None``: it is outside.

    Args:
        ended: a member that has disappeared.
        all_ended: all of them, by pid.
        living: members that were there before and still are, by pid, the target included.
    """
    parent = ended.parent
    for _ in range(len(all_ended)):
        if parent in living or parent not in all_ended:
            break
        parent = all_ended[parent].parent
    return living.get(parent)


class TreeAccounts:
    """
    Sums over all readings.

    A descendant that lives counts with what its CPU time grew by, and one that has ended with what its parent was
    charged beyond that. The sums are lower bounds: what the kernel books in a process outside of the tree, or nowhere
    because the parent ignores SIGCHLD, is missing after the last reading of the child.

    Args:
        cpu_count: cores of the machine; 0: unknown.
    """

    def __init__(self, cpu_count: int) -> None:
        self._cpu_count = cpu_count
        self.cpu_ns = 0
        """See `vitalsd.snapshot.ProcessTree`."""
        self.reaped_ns = 0
        self.gaps = 0

    def begin(self, members: Collection[Member]) -> None:
        """Count the members, the target among them, from now on."""
        for member in members:
            member.start_counting()
            member.is_new = False

    def count(
        self, target: Member, descendants: Collection[Member], ended: Sequence[Member], elapsed_ns: int, *, missed: bool
    ) -> None:
        """
        Count one reading.

        Args:
            target: the root of the tree.
            descendants: the living members without the target; of a new one everything that is not counted counts.
            ended: members that have disappeared since the reading before.
            elapsed_ns: time since the reading before.
            missed: whether the reading is known to lack something.
        """
        living = {member.pid: member for member in (target, *descendants) if not member.is_new}
        by_pid = {member.pid: member for member in ended}
        heirs: dict[int, list[Member]] = {}
        for member in ended:
            heir = heir_of(member, by_pid, living)
            if heir is None:
                missed = True
            else:
                heirs.setdefault(heir.pid, []).append(member)
        for member in (target, *descendants):
            self.cpu_ns += max(0, member.cpu_ns - member.counted_cpu_ns)
            lost = () if member.is_new else heirs.get(member.pid, ())
            grown_ns, explained = self._grown_by_children(member, lost, elapsed_ns)
            self.cpu_ns += grown_ns
            self.reaped_ns += grown_ns if member is target else 0
            missed = missed or not explained
            member.start_counting()
            member.is_new = False
        self.gaps += missed

    def _grown_by_children(self, member: Member, ended: Sequence[Member], elapsed_ns: int) -> tuple[int, bool]:
        """
        Return what children of a member used that is not counted, ns, and whether those that ended explain it.

        Args:
            member: their living ancestor.
            ended: the members that have ended, and of which it is the nearest living ancestor.
            elapsed_ns: time in which they used it.
        """
        counted_ns = sum(each.counted_cpu_ns + each.counted_reaped_ns + each.rounding_ns for each in ended)
        grown_ns = member.reaped_ns - member.counted_reaped_ns - counted_ns - member.rounding_ns
        member.rounding_ns = min(GRAIN_NS, max(0, -grown_ns))
        if grown_ns <= 0:
            return 0, grown_ns >= -GRAIN_NS  # Less than was counted: the kernel did not book the end of one.
        if not reaped_within(grown_ns, elapsed_ns, self._cpu_count):
            return 0, False  # It was used before, by a child that could not be read.
        return grown_ns, grown_ns <= elapsed_ns * sum(each.thread_count for each in ended)
