"""Compare two snapshots: which threads are the same, and which CPU counters contradict others."""

import math
from collections.abc import Collection, Sequence
from operator import sub
from typing import NamedTuple

from vitalsd.snapshot.reading import Snapshot

__all__ = [
    "Match",
    "all_idle",
    "allowance_ns",
    "comparable",
    "contradicted_threads",
    "exited_ns_between",
    "idle_allowance_ns",
    "idle_text",
    "match_threads",
    "thread_deltas",
    "wrong_text",
    "wrong_threads",
]

MAKING_NS = 10_000
"""CPU time that a thread uses at least to make another thread, ns."""


def allowance_ns(first_skew_ns: int, last: Snapshot) -> int:
    """Return by how much a thread may seem to have used more CPU than its process: the errors of both figures, ns."""
    skew_ns = max(first_skew_ns, last.skew_ns)
    return last.cpu_grain_ns + last.thread_grain_ns + 2 * (last.thread_lag_ns + skew_ns)


def idle_allowance_ns(first_skew_ns: int, last: Snapshot) -> float:
    """
    Return the CPU time that the process may have used while no thread's counter changed, ns.

    Infinite if the counters are too coarse to show that a thread was made: such a thread may have started and exited
    in the window.
    """
    if last.thread_grain_ns > MAKING_NS:
        return math.inf
    skew_ns = max(first_skew_ns, last.skew_ns)
    return last.cpu_grain_ns + len(last.roster) * (last.thread_grain_ns + last.thread_lag_ns + skew_ns)


def thread_deltas(first: Snapshot, last: Snapshot, match: "Match") -> list[int]:
    """Return how much each counter of `last` grew, ns; for a thread without a counter in `first`, all of it or 0."""
    if match.pairs is None:
        return list(map(sub, last.thread_cpu_ns, first.thread_cpu_ns))
    deltas = [0] * len(last.roster)
    for b, a in match.pairs:
        deltas[b] = last.thread_cpu_ns[b] - first.thread_cpu_ns[a]
    for b in match.counted_born:
        deltas[b] = last.thread_cpu_ns[b]
    return deltas


def contradicted_threads(
    first: Snapshot, last: Snapshot, match: "Match", deltas: Sequence[int]
) -> tuple[str | None, Collection[int]]:
    """Return how the counters contradict each other, as a sentence, and the indexes of threads without a figure."""
    every = range(len(deltas))
    if not match.comparable:
        return None, every
    if not match.born and not match.gone_ns and all_idle(first, last, deltas):
        return idle_text(first, last), every
    wrong = wrong_threads(first, last, deltas)
    return wrong_text(first, last, wrong[0], deltas[wrong[0]]) if wrong else None, wrong


def comparable(first: Snapshot, last: Snapshot) -> bool:
    """Return whether the counters of a thread in both are of one thread."""
    executed = None not in (first.image, last.image) and first.image != last.image
    return not executed and first.reading == last.reading


def all_idle(first: Snapshot, last: Snapshot, deltas: Sequence[int]) -> bool:
    """
    Return whether all threads were idle by their counters while the process used CPU time.

    If no thread is known to have started or exited, a thread that did both unseen was made by one that is still alive.

    Args:
        first: the earlier snapshot.
        last: the later snapshot.
        deltas: CPU time of threads, ns; those that are left out were idle.
    """
    return not any(deltas) and last.cpu_ns - first.cpu_ns > idle_allowance_ns(first.skew_ns, last)


def wrong_threads(first: Snapshot, last: Snapshot, deltas: Sequence[int]) -> list[int]:
    """Return the places in `deltas` of counters that went backwards or used more CPU than the process."""
    if not deltas:
        return []
    most_ns = max(0, last.cpu_ns - first.cpu_ns) + allowance_ns(first.skew_ns, last)
    if min(deltas) >= 0 and max(deltas) <= most_ns:
        return []
    return [i for i, ns in enumerate(deltas) if not 0 <= ns <= most_ns]


def idle_text(first: Snapshot, last: Snapshot) -> str:
    """Return the contradiction that no thread ran while the process did, as a sentence."""
    return f"no thread used CPU while the process used {(last.cpu_ns - first.cpu_ns) / 1e6:.1f} ms"


def wrong_text(first: Snapshot, last: Snapshot, thread: int, delta_ns: int) -> str:
    """Return the contradiction of one thread's counter and the process's clock, as a sentence."""
    if delta_ns < 0:
        return f"the CPU counter of thread {last.roster.tids[thread]} went backwards"
    used = f"used {delta_ns / 1e6:.1f} ms of CPU while the process used {(last.cpu_ns - first.cpu_ns) / 1e6:.1f} ms"
    return f"thread {last.roster.tids[thread]} {used}"


class Match(NamedTuple):
    """The threads of two snapshots, matched."""

    comparable: bool
    pairs: Sequence[tuple[int, int]] | None = None
    """(index in last, index in first) of the threads in both; ``None``: each thread has the same index in both."""
    born: Sequence[int] = ()
    """Indexes of the threads that are only in the last."""
    gone_ns: Sequence[int] = ()
    """CPU time of the threads that are only in the first, ns."""

    @property
    def counted_born(self) -> Sequence[int]:
        """Indexes in `born` of threads with a counter that began in the window."""
        return self.born if self.comparable else ()


def match_threads(first: Snapshot, last: Snapshot) -> Match:
    """Match the threads of two snapshots by tid and birth; none match if the counters restarted in between."""
    if not comparable(first, last):
        return Match(comparable=False, pairs=(), born=range(len(last.roster)))
    if first.roster.has_same_threads(last.roster):
        return Match(comparable=True)
    before = {key: i for i, key in enumerate(zip(first.roster.tids, first.roster.births, strict=True))}
    pairs: list[tuple[int, int]] = []
    born: list[int] = []
    for b, key in enumerate(zip(last.roster.tids, last.roster.births, strict=True)):
        a = before.pop(key, None)
        if a is None:
            born.append(b)
        else:
            pairs.append((b, a))
    return Match(comparable=True, pairs=pairs, born=born, gone_ns=[first.thread_cpu_ns[a] for a in before.values()])


def exited_ns_between(first: Snapshot, last: Snapshot, gone_ns: int, limit: int) -> int:
    """
    Return the CPU time that threads which exited in the window used inside it, ns.

    The growth of the exited total holds all CPU time of those threads; they used `gone_ns` of it before the window.
    Both totals are known as intervals. If no thread is known to have exited and the interval of the difference
    contains 0, the result is 0; otherwise it is the middle of the interval.
    """
    low = last.exited_cpu_ns[0] - first.exited_cpu_ns[1] - gone_ns
    high = last.exited_cpu_ns[1] - first.exited_cpu_ns[0] - gone_ns
    if gone_ns == 0 and low <= 0 <= high:
        return 0
    return min(limit, max(0, (low + high) // 2))
