"""
Hold what a source reads at one instant (`Snapshot`), and compute the difference of two snapshots (`measure`).

Pure functions: none reads a clock or calls the kernel. All counters are integers in nanoseconds or bytes, and
cumulative since the process or thread started.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from operator import is_not, sub
from typing import NamedTuple

__all__ = [
    "HALTED",
    "Extras",
    "Identity",
    "Measurement",
    "Snapshot",
    "ThreadExtras",
    "ThreadRoster",
    "allowance_ns",
    "contradiction",
    "idle_allowance_ns",
    "measure",
]

SUSPEND_GRAIN_NS = 20_000_000
"""
Least time asleep in a window, ns. The two clocks are read one after the other, so a smaller difference between them is
not sleep.
"""

MAKING_NS = 10_000
"""CPU time that a thread uses at least to make another thread, ns."""
HALTED = {
    "stopped": "the target is stopped by a signal (SIGSTOP, job control)",
    "traced": "the target is stopped by a debugger",
    "frozen": "the target is frozen (cgroup freezer)",
}
"""Sentences for warnings, by `Snapshot.state`: what keeps the target from running."""


class Identity(NamedTuple):
    """
    One run of one process.

    ``start_key`` is the kernel's own start time of it (Linux: clock ticks since boot, macOS:
    microseconds of wall clock at fork), so a reused pid never compares equal. Only ``name`` and
    ``program`` may change in its life: ``program`` at exec, ``name`` there and when the main thread is renamed.
    """

    platform: str
    pid: int
    name: str
    boot_id: str
    start_key: int
    started_unix_ns: int
    program: str = ""
    """
    Keyed digest of the executed file and of what it runs, see `vitalsd.sources.programs`; empty: unknown.
    """

    @property
    def start_id(self) -> str:
        """Pid, start and boot in one short string, which has no meaning outside this machine."""
        return f"{self.pid}-{self.start_key}-{self.boot_id[:8]}"


@dataclass(frozen=True, slots=True, eq=False)
class ThreadRoster:
    """
    The threads of a process at one instant; equal as long as no thread starts, ends or is renamed.

    A source returns the same roster until a thread changes, so most comparisons are of one object with itself. An
    equal copy is compared by value, which costs 10 µs per 1000 threads and no memory.
    """

    tids: tuple[int, ...] = ()
    """Ascending."""
    births: tuple[int, ...] = ()
    """Start of each thread in the kernel's own unit; with the tid it identifies a thread."""
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of threads."""
        return len(self.tids)

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same threads under the same names."""
        if self is other:  # A tuple compared with itself is read to its end.
            return True
        return isinstance(other, ThreadRoster) and self.has_same_threads(other) and self.names == other.names

    def has_same_threads(self, other: "ThreadRoster") -> bool:
        """Return whether both have the same threads; the names may differ."""
        return self is other or (self.tids == other.tids and self.births == other.births)

    def sharing(self, previous: "ThreadRoster") -> "ThreadRoster":
        """Return `previous` if it is equal; else this roster, made of the columns of `previous` that are equal."""
        if not self.has_same_threads(previous):
            return self
        return previous if self.names == previous.names else replace(previous, names=self.names)


class ThreadExtras(NamedTuple):
    """Figures of each thread, in the order of `ThreadRoster.tids`; read only for ``detail=full``."""

    user_ns: Sequence[int]
    """CPU time in user mode by the kernel's own split; on Linux an estimate from ticks."""
    system_ns: Sequence[int]
    states: Sequence[str | None]
    priorities: Sequence[int | None]


class Extras(NamedTuple):
    """Figures that are read only for ``detail=full``; ``None``: the platform or the permission does not give it."""

    threads: ThreadExtras
    user_ns: int | None = None
    system_ns: int | None = None
    footprint_bytes: int | None = None
    peak_rss_bytes: int | None = None
    swap_bytes: int | None = None
    open_fds: int | None = None
    minor_faults: int | None = None
    major_faults: int | None = None
    idle_wakeups: int | None = None
    interrupt_wakeups: int | None = None
    energy_nj: int | None = None
    p_core_ns: int | None = None
    qos_ns: Mapping[str, int] | None = None
    """macOS: CPU time by quality-of-service class."""


@dataclass(slots=True, kw_only=True, eq=False)
class Snapshot:
    """
    Cumulative counters of a process and its threads; those of threads in the order of the roster.

    Equality is identity. A snapshot is shared and must not be changed. It is not frozen, because to create a frozen one
    takes five times as long.
    """

    monotonic_ns: int
    """When the process total was read; a clock that stops while the machine sleeps."""
    boottime_ns: int
    """The same instant on a clock that counts the time asleep."""
    wall_ns: int
    """The same instant, Unix time."""
    uptime_ns: int
    """Time since the process started, by the kernel's own clock: steps of the wall clock do not change it."""
    skew_ns: int
    """Time from the first to the last kernel read of this snapshot."""

    cpu_ns: int
    """The process's own total: living and exited threads, user and system."""
    cpu_grain_ns: int
    """Step of that total, ns."""
    exited_cpu_ns: tuple[int, int]
    """Lower and upper bound of the CPU time of exited threads, ns; equal if the kernel reports it atomically."""
    rss_bytes: int
    vm_bytes: int
    state: str | None = None
    """
    State of the main thread, or of another thread if that one has exited: as in `ThreadExtras.states`, or ``"frozen"``.
    """
    image: Hashable
    """A value that changes when the process executes another program; ``None`` if the kernel does not show that."""
    reading: int = 0
    """Number of times that contradictory counters were read anew. Snapshots with different numbers are not compared."""

    roster: ThreadRoster
    public_roster: ThreadRoster | None = None
    """The threads by the names that ps(1) and top(1) show, if `roster` has names that only the process knows."""
    thread_cpu_ns: Sequence[int]
    """
    CPU time of each thread. The counter of a thread that was not read again is the same object as in the snapshot
    before, if possible.
    """
    thread_grain_ns: int
    """Step of a thread's counter, ns; the sum of both steps for a counter that is a sum of two."""
    thread_lag_ns: int
    """Most by which the counter of a running thread may be behind, ns."""
    source: str
    """Which kernel interface the thread counters came from."""

    extras: Extras | None = None
    warnings: tuple[str, ...] = ()

    def public(self) -> "Snapshot":
        """Return it with the names that every user of the machine can read."""
        return self if self.public_roster is None else replace(self, roster=self.public_roster, public_roster=None)


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


def _is_running(snapshot: Snapshot, index: int) -> bool:
    return snapshot.extras is not None and snapshot.extras.threads.states[index] == "running"


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


def contradiction(first: Snapshot, last: Snapshot) -> str | None:
    """
    Return how the counters of two snapshots contradict each other, as a sentence; ``None``: they do not.

    It is `Measurement.contradiction`, and costs less than a measurement if both have the same threads.
    """
    if not _comparable(first, last):
        return None
    if not first.roster.has_same_threads(last.roster):
        return measure(first, last).contradiction if last.monotonic_ns > first.monotonic_ns else None
    # The counter of a thread that was not read again is the same object: most need no arithmetic.
    changed = list(compress(range(len(last.roster)), map(is_not, last.thread_cpu_ns, first.thread_cpu_ns)))
    deltas = [last.thread_cpu_ns[i] - first.thread_cpu_ns[i] for i in changed]
    if _all_idle(first, last, deltas):
        return _idle_words(first, last)
    wrong = _wrong(first, last, deltas)
    return _wrong_words(first, last, changed[wrong[0]], deltas[wrong[0]]) if wrong else None


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
    match = _match(first, last)
    deltas = _deltas(first, last, match)
    contradicted, unknown = _contradicted(first, last, match, deltas)
    if contradicted is not None:
        warnings.append(contradicted)
        for i in unknown:
            deltas[i] = 0
    cpu_ns = last.cpu_ns - first.cpu_ns
    if cpu_ns < 0:
        warnings.append("the CPU clock of the process went backwards and counts as 0")
        cpu_ns = 0
    living_ns = sum(deltas)
    exited_ns = 0 if unknown else _exited(first, last, sum(match.gone_ns), limit=cpu_ns)
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
        p_core_ns=_grown(first, last, lambda extras: extras.p_core_ns),
        qos_ns=_qos(first.extras, last.extras),
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
    elif not _comparable(first, last):
        warnings.append("the target executed another program inside the window; its threads restart there")
    return warnings


def _deltas(first: Snapshot, last: Snapshot, match: "_Match") -> list[int]:
    """Return how much each counter of `last` grew, ns; for a thread without a counter in `first`, all of it or 0."""
    if match.pairs is None:
        return list(map(sub, last.thread_cpu_ns, first.thread_cpu_ns))
    deltas = [0] * len(last.roster)
    for b, a in match.pairs:
        deltas[b] = last.thread_cpu_ns[b] - first.thread_cpu_ns[a]
    for b in match.counted_born:
        deltas[b] = last.thread_cpu_ns[b]
    return deltas


def _contradicted(
    first: Snapshot, last: Snapshot, match: "_Match", deltas: Sequence[int]
) -> tuple[str | None, Collection[int]]:
    """Return how the counters contradict each other, as a sentence, and the indexes of threads without a figure."""
    every = range(len(deltas))
    if not match.comparable:
        return None, every
    if not match.born and not match.gone_ns and _all_idle(first, last, deltas):
        return _idle_words(first, last), every
    wrong = _wrong(first, last, deltas)
    return _wrong_words(first, last, wrong[0], deltas[wrong[0]]) if wrong else None, wrong


def _cpu_error_ns(first: Snapshot, last: Snapshot, deltas: list[int], elapsed_ns: int, *, has_run: bool) -> int:
    """Return half the width of the error bar of the process's CPU time, ns."""
    ran = len(deltas) - deltas.count(0)
    at_once = min(ran, 1 + sum(deltas) // elapsed_ns)
    skew_ns = max(first.skew_ns, last.skew_ns)
    return last.cpu_grain_ns + last.thread_lag_ns * at_once + skew_ns * max(at_once, 1 if has_run else 0)


def _comparable(first: Snapshot, last: Snapshot) -> bool:
    """Return whether the counters of a thread in both are of one thread."""
    executed = None not in (first.image, last.image) and first.image != last.image
    return not executed and first.reading == last.reading


def _all_idle(first: Snapshot, last: Snapshot, deltas: Sequence[int]) -> bool:
    """
    Return whether all threads were idle by their counters while the process used CPU time.

    If no thread is known to have started or exited, a thread that did both unseen was made by one that is still alive.

    Args:
        first: the earlier snapshot.
        last: the later snapshot.
        deltas: CPU time of threads, ns; those that are left out were idle.
    """
    return not any(deltas) and last.cpu_ns - first.cpu_ns > idle_allowance_ns(first.skew_ns, last)


def _wrong(first: Snapshot, last: Snapshot, deltas: Sequence[int]) -> list[int]:
    """Return the places in `deltas` of counters that went backwards or used more CPU than the process."""
    if not deltas:
        return []
    most_ns = max(0, last.cpu_ns - first.cpu_ns) + allowance_ns(first.skew_ns, last)
    if min(deltas) >= 0 and max(deltas) <= most_ns:
        return []
    return [i for i, ns in enumerate(deltas) if not 0 <= ns <= most_ns]


def _idle_words(first: Snapshot, last: Snapshot) -> str:
    return f"no thread used CPU while the process used {(last.cpu_ns - first.cpu_ns) / 1e6:.1f} ms"


def _wrong_words(first: Snapshot, last: Snapshot, thread: int, delta_ns: int) -> str:
    if delta_ns < 0:
        return f"the CPU counter of thread {last.roster.tids[thread]} went backwards"
    used = f"used {delta_ns / 1e6:.1f} ms of CPU while the process used {(last.cpu_ns - first.cpu_ns) / 1e6:.1f} ms"
    return f"thread {last.roster.tids[thread]} {used}"


class _Match(NamedTuple):
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


def _match(first: Snapshot, last: Snapshot) -> _Match:
    if not _comparable(first, last):
        return _Match(comparable=False, pairs=(), born=range(len(last.roster)))
    if first.roster.has_same_threads(last.roster):
        return _Match(comparable=True)
    before = {key: i for i, key in enumerate(zip(first.roster.tids, first.roster.births, strict=True))}
    pairs: list[tuple[int, int]] = []
    born: list[int] = []
    for b, key in enumerate(zip(last.roster.tids, last.roster.births, strict=True)):
        a = before.pop(key, None)
        if a is None:
            born.append(b)
        else:
            pairs.append((b, a))
    return _Match(comparable=True, pairs=pairs, born=born, gone_ns=[first.thread_cpu_ns[a] for a in before.values()])


def _exited(first: Snapshot, last: Snapshot, gone_ns: int, limit: int) -> int:
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


def _split(
    first: Snapshot, last: Snapshot, match: _Match, deltas: Sequence[int], cpu_ns: int
) -> tuple[list[int | None] | None, int | None]:
    """Return the user-mode part of each thread's and of the process's CPU time, ns."""
    a, b = first.extras, last.extras
    if a is None or b is None:
        return None, None
    places = range(len(deltas))
    threads: list[int | None] = [None] * len(deltas)
    for i, j in zip(places, places, strict=True) if match.pairs is None else match.pairs:
        threads[i] = _user_part(
            deltas[i],
            b.threads.user_ns[i] - a.threads.user_ns[j],
            b.threads.system_ns[i] - a.threads.system_ns[j],
        )
    for i in match.counted_born:
        threads[i] = _user_part(deltas[i], b.threads.user_ns[i], b.threads.system_ns[i])
    user_ns = None
    if None not in (a.user_ns, b.user_ns, a.system_ns, b.system_ns):
        user_ns = _user_part(cpu_ns, b.user_ns - a.user_ns, b.system_ns - a.system_ns)  # type: ignore[operator]
    return threads, user_ns


def _grown(first: Snapshot, last: Snapshot, counter: Callable[[Extras], int | None]) -> int | None:
    """Return how much a counter of the extras grew; ``None`` if either end lacks it."""
    if first.extras is None or last.extras is None:
        return None
    before, after = counter(first.extras), counter(last.extras)
    return None if before is None or after is None else max(0, after - before)


def _qos(before: Extras | None, after: Extras | None) -> dict[str, int] | None:
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
