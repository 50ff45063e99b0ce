"""
What a source reads at one instant (`Snapshot`), and the arithmetic between two of them (`measure`).

Pure: no clock is read here and no kernel is asked. All counters are integers, in nanoseconds and
bytes, and cumulative since the process or thread started.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import sub
from typing import NamedTuple

__all__ = ["Extras", "Identity", "Measurement", "Snapshot", "ThreadExtras", "measure"]

SUSPEND_GRAIN_NS = 20_000_000
"""The two clocks are read one after the other; a smaller difference between them is that, not sleep."""


class Identity(NamedTuple):
    """
    One run of one process.

    ``start_key`` is the kernel's own start time of it (Linux: clock ticks since boot, macOS:
    microseconds of wall clock at fork), so a reused pid never compares equal. Only ``name`` and
    ``program`` may change in its life: at exec.
    """

    platform: str
    pid: int
    name: str
    boot_id: str
    start_key: int
    started_unix_ns: int
    program: str = ""
    """
    Keyed digest of the executed file and of what it was told to run, see `vitalsd.sources.programs`; empty: unknown.
    """

    @property
    def start_id(self) -> str:
        """Pid, start and boot in one short string without meaning outside this machine."""
        return f"{self.pid}-{self.start_key}-{self.boot_id[:8]}"


class ThreadExtras(NamedTuple):
    """Per thread, in the order of `Snapshot.tids`; read only for ``detail=full``."""

    user_ns: Sequence[int]
    """CPU time in user mode by the kernel's own split; on Linux an estimate from ticks."""
    system_ns: Sequence[int]
    states: Sequence[str | None]
    priorities: Sequence[int | None]


class Extras(NamedTuple):
    """What only ``detail=full`` asks for. ``None``: this platform or permission does not give it."""

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
    Cumulative counters of a process and its threads, columnar, threads by ascending tid.

    Two snapshots are the same only if they are one object: `eq` is identity. Nobody changes one: it is
    shared. That it is not frozen makes it a fifth as dear to create.
    """

    monotonic_ns: int
    """When the process total was read; a clock that stops while the machine sleeps."""
    boottime_ns: int
    """The same instant on a clock that goes on in sleep."""
    wall_ns: int
    """The same instant, Unix time."""
    uptime_ns: int
    """Since the process started, by the kernel's own clock: immune to wall-clock steps."""
    skew_ns: int
    """From the first to the last kernel read of this snapshot."""

    cpu_ns: int
    """The process's own total: living and exited threads, user and system."""
    cpu_grain_ns: int
    """Step of that total, ns."""
    exited_cpu_ns: tuple[int, int]
    """Bounds of the CPU time of exited threads, ns. Equal where the kernel tells it atomically."""
    rss_bytes: int
    vm_bytes: int
    state: str | None = None
    """Of the main thread, as in `ThreadExtras.states`."""
    image: Hashable
    """Changes when the process executes another program; ``None`` if that cannot be seen."""

    tids: Sequence[int]
    births: Sequence[int]
    """Start of each thread in the kernel's own unit; with the tid it names a thread for ever."""
    thread_cpu_ns: Sequence[int]
    names: Sequence[str]
    kernel_names: Sequence[str] | None = None
    """The names that ps(1) and top(1) show, where `names` has those that only the process itself knows."""
    thread_grain_ns: int
    """Step of a thread's counter, ns; of one that is the sum of two, of both."""
    thread_lag_ns: int
    """How far behind the counter of a thread that runs right now may be, ns."""
    source: str
    """Which kernel interface the thread counters came from."""

    extras: Extras | None = None
    warnings: tuple[str, ...] = ()

    def public(self) -> "Snapshot":
        """Return it with the names that every user of the machine can read."""
        return self if self.kernel_names is None else replace(self, names=self.kernel_names, kernel_names=None)


@dataclass(slots=True, kw_only=True, eq=False)
class Measurement:
    """
    What happened between two snapshots of one process. CPU figures in ns over `elapsed_ns`.

    The books balance exactly: ``cpu_ns == living_ns + exited_ns + unattributed_ns``.
    """

    first: Snapshot
    last: Snapshot
    elapsed_ns: int
    """Measured time awake between the two, > 0."""
    suspended_ns: int
    """Time the machine slept in between."""
    cpu_ns: int
    living_ns: int
    exited_ns: int
    unattributed_ns: int
    """May be negative: the readings of one snapshot are not simultaneous."""
    cpu_error_ns: int
    thread_cpu_ns: Sequence[int]
    """Per thread of `last`, >= 0; for one born inside the window, its whole life. Unknown, and all 0, if `executed`."""
    born: frozenset[int]
    """Indexes of the threads that were not there at `first`."""
    executed: bool
    """The process executed another program in between: what its threads of now did before is not told apart."""
    thread_user_ns: Sequence[int | None] | None
    """The user-mode part of `thread_cpu_ns`; ``None`` where the split is unknown."""
    user_ns: int | None
    p_core_ns: int | None
    qos_ns: Mapping[str, int] | None
    warnings: tuple[str, ...]
    encoded: dict[Hashable, bytes] = field(default_factory=dict)
    """Renderings of this measurement, so that all who share a window share them too."""

    def public(self) -> "Measurement":
        """Return it with the names that every user of the machine can read."""
        last = self.last.public()
        return self if last is self.last else replace(self, last=last, encoded={})

    def thread_error_ns(self, index: int) -> int:
        """Half-width of the error bar of ``thread_cpu_ns[index]``, ns."""
        last = self.last
        ran = self.thread_cpu_ns[index] > 0 or _is_running(last, index)
        # Whatever its share, while it was being read it may have run all the time at one end and never at the other.
        return last.thread_grain_ns + ran * (last.thread_lag_ns + max(self.first.skew_ns, last.skew_ns))


def _is_running(snapshot: Snapshot, index: int) -> bool:
    return snapshot.extras is not None and snapshot.extras.threads.states[index] == "running"


def measure(first: Snapshot, last: Snapshot) -> Measurement:
    """
    The difference of two snapshots of one process.

    Threads are matched by tid and birth. A counter that went backwards counts as 0 and is said in
    ``warnings``. If the process executed another program in between, every thread counts as born
    in the window, because the kernel hands the old leader's id to whichever thread called exec.

    Raises:
        ValueError: `last` was not taken after `first`.
    """
    elapsed_ns = last.monotonic_ns - first.monotonic_ns
    if elapsed_ns <= 0:
        raise ValueError(f"last was taken {-elapsed_ns} ns before first")
    warnings = list(dict.fromkeys(first.warnings + last.warnings))

    suspended_ns = (last.boottime_ns - first.boottime_ns) - elapsed_ns
    if suspended_ns < SUSPEND_GRAIN_NS:
        suspended_ns = 0
    else:
        warnings.append(f"the machine slept {suspended_ns / 1e9:.1f} s inside the window")

    executed = None not in (first.image, last.image) and first.image != last.image
    if executed:
        warnings.append("the target executed another program inside the window; its threads restart there")

    matched, born, gone_ns = _match(first, last, executed)
    backwards = 0
    if matched is None:
        deltas = list(map(sub, last.thread_cpu_ns, first.thread_cpu_ns))
    else:
        deltas = [0] * len(last.tids)
        for b, a in matched:
            deltas[b] = last.thread_cpu_ns[b] - first.thread_cpu_ns[a]
    if deltas and min(deltas) < 0:
        backwards = sum(d < 0 for d in deltas)
        deltas = [max(0, d) for d in deltas]
    known = () if executed else born
    for b in known:
        deltas[b] = last.thread_cpu_ns[b]

    cpu_ns = last.cpu_ns - first.cpu_ns
    if cpu_ns < 0:
        backwards += 1
        cpu_ns = 0
    if backwards:
        warnings.append(f"{backwards} CPU counters went backwards and count as 0")
    living_ns = sum(deltas)
    exited_ns = 0 if executed else _exited(first, last, gone_ns, limit=cpu_ns)

    ran = len(deltas) - deltas.count(0)
    at_once = min(ran, 1 + living_ns // elapsed_ns)
    cpu_error_ns = (
        last.cpu_grain_ns
        + last.thread_lag_ns * at_once
        + max(first.skew_ns, last.skew_ns) * max(at_once, 1 if cpu_ns else 0)
    )
    thread_user_ns, user_ns = _split(first, last, matched, known, deltas, cpu_ns)
    return Measurement(
        first=first,
        last=last,
        elapsed_ns=elapsed_ns,
        suspended_ns=suspended_ns,
        cpu_ns=cpu_ns,
        living_ns=living_ns,
        exited_ns=exited_ns,
        unattributed_ns=cpu_ns - living_ns - exited_ns,
        cpu_error_ns=cpu_error_ns,
        thread_cpu_ns=deltas,
        born=frozenset(born),
        executed=executed,
        thread_user_ns=thread_user_ns,
        user_ns=user_ns,
        p_core_ns=_grown(first, last, lambda extras: extras.p_core_ns),
        qos_ns=_qos(first.extras, last.extras),
        warnings=tuple(warnings),
    )


def _match(first: Snapshot, last: Snapshot, executed: bool) -> tuple[list[tuple[int, int]] | None, Sequence[int], int]:
    """
    Pairs (index in last, index in first), the indexes born since, and the CPU time at `first` of those gone.

    No pairs but ``None``: every thread is at its old place.
    """
    if executed:
        return [], range(len(last.tids)), 0
    if first.tids is last.tids and first.births is last.births:
        return None, (), 0
    before = {key: i for i, key in enumerate(zip(first.tids, first.births, strict=True))}
    matched: list[tuple[int, int]] = []
    born: list[int] = []
    for b, key in enumerate(zip(last.tids, last.births, strict=True)):
        a = before.pop(key, None)
        if a is None:
            born.append(b)
        else:
            matched.append((b, a))
    return matched, born, sum(first.thread_cpu_ns[a] for a in before.values())


def _exited(first: Snapshot, last: Snapshot, gone_ns: int, limit: int) -> int:
    """
    CPU time burnt inside the window by threads that did not live to its end.

    The growth of "exited" holds the whole lives of the threads that went; `gone_ns` of it was burnt
    before the window. Both ends are known as intervals: an interval that allows 0 while nobody is
    known to have gone means 0, otherwise its middle is the estimate.
    """
    low = last.exited_cpu_ns[0] - first.exited_cpu_ns[1] - gone_ns
    high = last.exited_cpu_ns[1] - first.exited_cpu_ns[0] - gone_ns
    if gone_ns == 0 and low <= 0 <= high:
        return 0
    return min(limit, max(0, (low + high) // 2))


def _split(
    first: Snapshot,
    last: Snapshot,
    matched: Sequence[tuple[int, int]] | None,
    born: Sequence[int],
    deltas: Sequence[int],
    cpu_ns: int,
) -> tuple[list[int | None] | None, int | None]:
    """The user-mode part of each thread's and of the process's CPU time."""
    a, b = first.extras, last.extras
    if a is None or b is None:
        return None, None
    places = range(len(deltas))
    threads: list[int | None] = [None] * len(deltas)
    for i, j in zip(places, places, strict=True) if matched is None else matched:
        threads[i] = _user_part(
            deltas[i],
            b.threads.user_ns[i] - a.threads.user_ns[j],
            b.threads.system_ns[i] - a.threads.system_ns[j],
        )
    for i in born:
        threads[i] = _user_part(deltas[i], b.threads.user_ns[i], b.threads.system_ns[i])
    user_ns = None
    if None not in (a.user_ns, b.user_ns, a.system_ns, b.system_ns):
        user_ns = _user_part(cpu_ns, b.user_ns - a.user_ns, b.system_ns - a.system_ns)  # type: ignore[operator]
    return threads, user_ns


def _grown(first: Snapshot, last: Snapshot, counter: Callable[[Extras], int | None]) -> int | None:
    """How much a counter of the extras grew; ``None`` if either end lacks it."""
    if first.extras is None or last.extras is None:
        return None
    before, after = counter(first.extras), counter(last.extras)
    return None if before is None or after is None else max(0, after - before)


def _qos(before: Extras | None, after: Extras | None) -> dict[str, int] | None:
    """CPU time that was burnt in each quality-of-service class, ns."""
    if before is None or after is None or before.qos_ns is None or after.qos_ns is None:
        return None
    return {name: max(0, ns - before.qos_ns.get(name, 0)) for name, ns in after.qos_ns.items()}


def _user_part(cpu_ns: int, user_ns: int, system_ns: int) -> int | None:
    """`cpu_ns` divided as the coarser counters are; ``None`` if they did not move and it did."""
    if cpu_ns == 0:
        return 0
    user_ns, system_ns = max(0, user_ns), max(0, system_ns)
    if user_ns + system_ns == 0:
        return None
    return cpu_ns * user_ns // (user_ns + system_ns)
