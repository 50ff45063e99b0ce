"""Compute the reasons behind the CPU time of a window: waits for a CPU, children, the machine."""

from collections.abc import Callable, Collection, Sequence
from itertools import compress
from operator import sub
from typing import NamedTuple, TypeVar

from vitalsd.snapshot.comparison import Match
from vitalsd.snapshot.reading import Child, ProcessTree, Snapshot

__all__ = [
    "MachineUse",
    "TreeUse",
    "grown",
    "machine_use",
    "reaped",
    "reaped_within",
    "tree_use",
    "waits",
]

EARLIER_WAIT_NS = 100_000_000
"""Least wait before a window that a warning states, ns."""

REAPED_GRAIN_NS = 40_000_000
"""Error of the CPU time of reaped children, ns: user and system time in ticks of 10 ms, at both ends of a window."""


class MachineUse(NamedTuple):
    """What the machine did in a window, ns; ``None`` as in `MachineFigures`."""

    busy_ns: int | None
    cpu_pressure_ns: int | None
    memory_pressure_ns: int | None
    io_pressure_ns: int | None
    quota_throttled_ns: int | None


class TreeUse(NamedTuple):
    """What the target and its descendants did in a window."""

    cpu_ns: int
    children: tuple[tuple[Child, int], ...]
    """The living descendants, each with its CPU time in the window, ns; of one born in the window, all of it."""
    complete: bool
    """Whether the list and the sum lack nothing; see `ProcessTree.gaps`."""


FiguresT = TypeVar("FiguresT")


def grown(before: FiguresT | None, after: FiguresT | None, counter: Callable[[FiguresT], int | None]) -> int | None:
    """Return how much a counter grew; ``None`` if either end lacks it."""
    if before is None or after is None:
        return None
    first, last = counter(before), counter(after)
    return None if first is None or last is None else max(0, last - first)


def waits(
    first: Snapshot,
    last: Snapshot,
    match: Match,
    deltas: Sequence[int],
    unknown: Collection[int],
    elapsed_ns: int,
    warnings: list[str],
) -> tuple[list[int] | None, int | None]:
    """
    Return for how long each thread, and the process, waited for a CPU, ns.

    The kernel adds a wait when it ends, so one window can be charged with the waits of earlier ones. A thread cannot
    have waited while it ran, so its figure is at most the rest of the window.
    """
    if last.thread_wait_ns is None or first.thread_wait_ns is None:
        total_ns = None if last.wait_ns is None or first.wait_ns is None else max(0, last.wait_ns - first.wait_ns)
        return None, total_ns
    waited = _grown_by_thread(first.thread_wait_ns, last.thread_wait_ns, match)
    earlier_ns = 0
    for i in list(compress(range(len(waited)), waited)):
        wait_ns, most_ns = waited[i], max(0, elapsed_ns - deltas[i])
        waited[i] = 0 if i in unknown else min(max(0, wait_ns), most_ns)
        earlier_ns = max(earlier_ns, wait_ns - most_ns)
    if earlier_ns > EARLIER_WAIT_NS:
        warnings.append(f"a thread waited for a CPU for {earlier_ns / 1e9:.1f} s before the window, which ended in it")
    if len(unknown) == len(deltas) > 0:
        return waited, None
    if match.gone_ns and any(waited):
        warnings.append("wait_percent of the process lacks the threads that exited in the window: it is a lower bound")
    return waited, sum(waited)


def _grown_by_thread(before: Sequence[int], after: Sequence[int], match: Match) -> list[int]:
    """Return how much a counter of each thread grew: of one born in between, all of it."""
    if match.pairs is None:
        return list(map(sub, after, before))
    grown_by = [0] * len(after)
    for i, j in match.pairs:
        grown_by[i] = after[i] - before[j]
    for i in match.counted_born:
        grown_by[i] = after[i]
    return grown_by


def reaped_within(reaped_ns: int, elapsed_ns: int, cpu_count: int) -> bool:
    """
    Return whether reaped children can have used that CPU time within `elapsed_ns`.

    The kernel books the whole life of a child when its parent waits for it. More than all cores could have used was
    used before.
    """
    return cpu_count == 0 or reaped_ns <= elapsed_ns * cpu_count + REAPED_GRAIN_NS


def reaped(first: Snapshot, last: Snapshot, elapsed_ns: int, warnings: list[str]) -> int | None:
    """Return the CPU time of children that the target waited for, ns; ``None`` if part of it is from before."""
    watched_ns = grown(first.tree, last.tree, lambda tree: tree.reaped_ns)
    if watched_ns is not None:
        return watched_ns
    reaped_ns = grown(first.figures, last.figures, lambda figures: figures.reaped_ns)
    if reaped_ns is None or reaped_within(reaped_ns, elapsed_ns, last.cpu_count):
        return reaped_ns
    warnings.append(
        f"the target reaped children with {reaped_ns / 1e9:.1f} s of CPU time, more than the window has: null; ask with"
        " children=true to count children while they live"
    )
    return None


def machine_use(first: Snapshot, last: Snapshot, elapsed_ns: int) -> MachineUse | None:
    """
    Return what the machine did between two snapshots; ``None`` if either was not read or is of something else.

    The kernel counts in ticks, so in a short window its cores may seem to have used more time than they have.
    """
    before, after = first.machine, last.machine
    if before is None or after is None or before.in_container != after.in_container:
        return None
    busy_ns = grown(before, after, lambda machine: machine.busy_ns)
    if busy_ns is not None and last.cpu_count:
        busy_ns = min(busy_ns, elapsed_ns * last.cpu_count)
    return MachineUse(
        busy_ns=busy_ns,
        cpu_pressure_ns=grown(before, after, lambda machine: machine.cpu_pressure_ns),
        memory_pressure_ns=grown(before, after, lambda machine: machine.memory_pressure_ns),
        io_pressure_ns=grown(before, after, lambda machine: machine.io_pressure_ns),
        quota_throttled_ns=grown(before, after, lambda machine: machine.quota_throttled_ns),
    )


def tree_use(before: ProcessTree | None, after: ProcessTree | None) -> TreeUse | None:
    """Return what the target and its descendants did between two readings; ``None`` if either is missing."""
    if before is None or after is None:
        return None
    earlier_ns = {(child.pid, child.start_key): child.cpu_ns for child in before.children}
    return TreeUse(
        cpu_ns=max(0, after.cpu_ns - before.cpu_ns),
        children=tuple(
            (child, max(0, child.cpu_ns - earlier_ns.get((child.pid, child.start_key), child.found_cpu_ns)))
            for child in after.children
        ),
        complete=before.gaps == after.gaps,
    )
