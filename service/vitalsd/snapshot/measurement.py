"""
Compute the difference of two snapshots (`measure`): rates, accounting, stated errors, and the reasons behind them.

Pure functions: none reads a clock or calls the kernel.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from operator import is_not

from vitalsd.snapshot.comparison import (
    Match,
    all_idle,
    comparable,
    contradicted_threads,
    exited_ns_between,
    idle_text,
    match_threads,
    thread_deltas,
    wrong_text,
    wrong_threads,
)
from vitalsd.snapshot.reading import HALTED, SUSPEND_GRAIN_NS, ProcessFigures, Snapshot
from vitalsd.snapshot.reasons import MachineUse, TreeUse, grown, machine_use, reaped, tree_use, waits

__all__ = ["Measurement", "contradiction", "measure"]


@dataclass(slots=True, kw_only=True, eq=False)
class Measurement:
    """
    Difference of two snapshots of one process; CPU figures in ns over `elapsed_ns`.

    The parts add up exactly: ``cpu_ns == living_ns + exited_ns + unattributed_ns``.
    """

    first: Snapshot
    last: Snapshot
    elapsed_ns: int
    """Measured time awake between the two, > 0."""
    suspended_ns: int
    """Time that the machine slept between the two."""
    cpu_ns: int
    living_ns: int
    exited_ns: int
    unattributed_ns: int
    """May be negative: the readings of one snapshot are not simultaneous."""
    cpu_error_ns: int
    thread_cpu_ns: Sequence[int]
    """
    CPU time of each thread of `last`, >= 0: for a thread born inside the window, all of it; for one in `unknown`, 0.
    """
    born: frozenset[int]
    """Indexes of the threads that were not there at `first`."""
    unknown: frozenset[int]
    """
    Indexes of the threads without a figure: all of them if the process executed another program in between, and those
    that contradict the process's clock.
    """
    contradiction: str | None
    """Sentence that states how the counters contradict each other; ``None``: they do not."""
    thread_user_ns: Sequence[int | None] | None
    """The user-mode part of `thread_cpu_ns`; ``None`` if the split is unknown."""
    user_ns: int | None
    p_core_ns: int | None
    qos_ns: Mapping[str, int] | None
    thread_wait_ns: Sequence[int] | None
    """
    Time for which each thread of `last` waited for a CPU, at most the part of the window in which it did not run; 0 for
    a thread in `unknown`. ``None``: the kernel does not count it.
    """
    wait_ns: int | None
    """The same for the process: a lower bound if threads exited in the window."""
    reaped_ns: int | None
    """CPU time of children that the target waited for, as far as they used it in the window; ``None``: unknown."""
    machine: MachineUse | None
    tree: TreeUse | None
    warnings: tuple[str, ...]
    encoded: dict[Hashable, bytes] = field(default_factory=dict)
    """Encoded answers of this measurement, which clients that share a window share too."""

    def public(self) -> "Measurement":
        """Return it with the names that every user of the machine can read."""
        last = self.last.public()
        return self if last is self.last else replace(self, last=last, encoded={})

    def thread_error_ns(self, index: int) -> int:
        """Half-width of the error bar of ``thread_cpu_ns[index]``, ns."""
        last = self.last
        ran = self.thread_cpu_ns[index] > 0 or _is_running(last, index)
        # While it was being read, it may have run all the time at one end of the window and never at the other.
        return last.thread_grain_ns + ran * (last.thread_lag_ns + max(self.first.skew_ns, last.skew_ns))

    def thread_state(self, index: int) -> str | None:
        """Return the state of a thread at the end; ``"runnable"`` if it was to run at both ends and did not run."""
        last = self.last
        if last.thread_figures is None:
            return None
        state = last.thread_figures.states[index]
        waited = state == "running" and self.thread_cpu_ns[index] == 0 and index not in self.unknown
        return "runnable" if waited and _was_running(self.first, last, index) else state


def _is_running(snapshot: Snapshot, index: int) -> bool:
    return snapshot.thread_figures is not None and snapshot.thread_figures.states[index] == "running"


def _was_running(first: Snapshot, last: Snapshot, index: int) -> bool:
    """Return whether the thread at `index` in `last` ran or was to run at `first`."""
    if first.roster.has_same_threads(last.roster):
        return _is_running(first, index)
    key = last.roster.tids[index], last.roster.births[index]
    keys = zip(first.roster.tids, first.roster.births, strict=True)
    return any(key == each and _is_running(first, i) for i, each in enumerate(keys))


def contradiction(first: Snapshot, last: Snapshot) -> str | None:
    """
    Return how the counters of two snapshots contradict each other, as a sentence; ``None``: they do not.

    It is `Measurement.contradiction`, and costs less than a measurement if both have the same threads.
    """
    if not comparable(first, last):
        return None
    if not first.roster.has_same_threads(last.roster):
        return measure(first, last).contradiction if last.monotonic_ns > first.monotonic_ns else None
    # The counter of a thread that was not read again is the same object: most need no arithmetic.
    changed = list(compress(range(len(last.roster)), map(is_not, last.thread_cpu_ns, first.thread_cpu_ns)))
    deltas = [last.thread_cpu_ns[i] - first.thread_cpu_ns[i] for i in changed]
    if all_idle(first, last, deltas):
        return idle_text(first, last)
    wrong = wrong_threads(first, last, deltas)
    return wrong_text(first, last, changed[wrong[0]], deltas[wrong[0]]) if wrong else None


def measure(first: Snapshot, last: Snapshot) -> Measurement:
    """
    Return the difference of two snapshots of one process.

    Threads are matched by tid and birth. If the process executed another program in between, every thread counts as
    born in the window, because the kernel gives the id of the main thread to the thread that called exec, and no
    thread has a figure.

    A thread has no figure either if its counter went backwards or, beyond the errors of both, it used more CPU than
    the process; no thread has one if all were idle while the process's clock ran. ``warnings`` states each.

    Raises:
        ValueError: `last` was not taken after `first`.
    """
    elapsed_ns = last.monotonic_ns - first.monotonic_ns
    if elapsed_ns <= 0:
        raise ValueError(f"last was taken {-elapsed_ns} ns before first")
    suspended_ns = (last.boottime_ns - first.boottime_ns) - elapsed_ns
    if suspended_ns < SUSPEND_GRAIN_NS:
        suspended_ns = 0
    warnings = _warnings(first, last, suspended_ns)
    match = match_threads(first, last)
    deltas = thread_deltas(first, last, match)
    contradicted, unknown = contradicted_threads(first, last, match, deltas)
    if contradicted is not None:
        warnings.append(contradicted)
        for i in unknown:
            deltas[i] = 0
    cpu_ns = last.cpu_ns - first.cpu_ns
    if cpu_ns < 0:
        warnings.append("the CPU clock of the process went backwards and counts as 0")
        cpu_ns = 0
    living_ns = sum(deltas)
    exited_ns = 0 if unknown else exited_ns_between(first, last, sum(match.gone_ns), limit=cpu_ns)
    thread_wait_ns, wait_ns = waits(first, last, match, deltas, unknown, elapsed_ns, warnings)
    thread_user_ns, user_ns = _split(first, last, match, deltas, cpu_ns)
    if thread_user_ns is not None:
        for i in unknown:
            thread_user_ns[i] = None
    return Measurement(
        first=first,
        last=last,
        elapsed_ns=elapsed_ns,
        suspended_ns=suspended_ns,
        cpu_ns=cpu_ns,
        living_ns=living_ns,
        exited_ns=exited_ns,
        unattributed_ns=cpu_ns - living_ns - exited_ns,
        cpu_error_ns=_cpu_error_ns(first, last, deltas, elapsed_ns, has_run=cpu_ns > 0),
        thread_cpu_ns=deltas,
        born=frozenset(match.born),
        unknown=frozenset(unknown),
        contradiction=contradicted,
        thread_user_ns=thread_user_ns,
        user_ns=user_ns,
        p_core_ns=grown(first.figures, last.figures, lambda figures: figures.p_core_ns),
        qos_ns=_qos(first.figures, last.figures),
        thread_wait_ns=thread_wait_ns,
        wait_ns=wait_ns,
        reaped_ns=reaped(first, last, elapsed_ns, warnings),
        machine=machine_use(first, last, elapsed_ns),
        tree=tree_use(first.tree, last.tree),
        warnings=tuple(warnings),
    )


def _warnings(first: Snapshot, last: Snapshot, suspended_ns: int) -> list[str]:
    """Return what is odd about the window, but for contradictions of its counters."""
    warnings = list(dict.fromkeys(first.warnings + last.warnings))
    if last.state in HALTED:
        warnings.append(HALTED[last.state])
    if suspended_ns:
        warnings.append(f"the machine slept {suspended_ns / 1e9:.1f} s inside the window")
    if first.reading != last.reading:
        warnings.append("CPU counters contradicted each other inside the window; its threads have no figure")
    elif not comparable(first, last):
        warnings.append("the target executed another program inside the window; its threads restart there")
    return warnings


def _cpu_error_ns(first: Snapshot, last: Snapshot, deltas: list[int], elapsed_ns: int, *, has_run: bool) -> int:
    """Return half the width of the error bar of the process's CPU time, ns."""
    ran = len(deltas) - deltas.count(0)
    at_once = min(ran, 1 + sum(deltas) // elapsed_ns)
    skew_ns = max(first.skew_ns, last.skew_ns)
    return last.cpu_grain_ns + last.thread_lag_ns * at_once + skew_ns * max(at_once, 1 if has_run else 0)


def _split(
    first: Snapshot, last: Snapshot, match: Match, deltas: Sequence[int], cpu_ns: int
) -> tuple[list[int | None] | None, int | None]:
    """Return the user-mode part of each thread's and of the process's CPU time, ns."""
    a, b = first.thread_figures, last.thread_figures
    user_ns = _user_total(first.figures, last.figures, cpu_ns)
    if a is None or b is None:
        return None, user_ns
    places = range(len(deltas))
    threads: list[int | None] = [None] * len(deltas)
    for i, j in zip(places, places, strict=True) if match.pairs is None else match.pairs:
        threads[i] = _user_part(
            deltas[i],
            b.user_ns[i] - a.user_ns[j],
            b.system_ns[i] - a.system_ns[j],
        )
    for i in match.counted_born:
        threads[i] = _user_part(deltas[i], b.user_ns[i], b.system_ns[i])
    return threads, user_ns


def _user_total(before: ProcessFigures | None, after: ProcessFigures | None, cpu_ns: int) -> int | None:
    """Return the user-mode part of the process's CPU time, ns."""
    user_ns = grown(before, after, lambda figures: figures.user_ns)
    system_ns = grown(before, after, lambda figures: figures.system_ns)
    return None if user_ns is None or system_ns is None else _user_part(cpu_ns, user_ns, system_ns)


def _qos(before: ProcessFigures | None, after: ProcessFigures | None) -> dict[str, int] | None:
    """Return the CPU time used in each quality-of-service class, ns."""
    if before is None or after is None or before.qos_ns is None or after.qos_ns is None:
        return None
    return {name: max(0, ns - before.qos_ns.get(name, 0)) for name, ns in after.qos_ns.items()}


def _user_part(cpu_ns: int, user_ns: int, system_ns: int) -> int | None:
    """Return the user-mode part of `cpu_ns`, in proportion to the coarser counters; ``None`` if only `cpu_ns` grew."""
    if cpu_ns == 0:
        return 0
    user_ns, system_ns = max(0, user_ns), max(0, system_ns)
    if user_ns + system_ns == 0:
        return None
    return cpu_ns * user_ns // (user_ns + system_ns)
