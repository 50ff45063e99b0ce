"""
Hold what a source reads at one instant: a `Snapshot` of counters, and the figures that are read on request.

All counters are integers in nanoseconds, bytes or events, and cumulative since the process, the thread or the machine
started, unless their documentation names another zero. ``None``: the platform or the permission does not give it.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import NamedTuple

__all__ = [
    "HALTED",
    "MEMORY_PRESSURE_LEVELS",
    "SUSPEND_GRAIN_NS",
    "THERMAL_STATES",
    "Child",
    "Identity",
    "MachineFigures",
    "Part",
    "ProcessFigures",
    "ProcessTree",
    "Snapshot",
    "ThreadFigures",
    "ThreadRoster",
]

SUSPEND_GRAIN_NS = 20_000_000
"""
Least time asleep in a window, ns. The two clocks are read one after the other, so a smaller difference between them is
not sleep.
"""

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


THERMAL_STATES = ("nominal", "moderate", "heavy", "trapping", "sleeping", "throttled")
"""Names of thermal states: those of macOS, then that of a Linux CPU which was throttled since the last reading."""


MEMORY_PRESSURE_LEVELS = ("normal", "warning", "critical")
"""Names of the kernel's levels of memory pressure on macOS."""


class Part(Flag):
    """What a snapshot has beside its counters. Each part costs reads of its own."""

    FIGURES = auto()
    """`Snapshot.figures` and `Snapshot.machine`; the recorder reads them once a second."""
    THREADS = auto()
    """`Snapshot.thread_figures`; on Linux one more file per thread."""
    CHILDREN = auto()
    """`Snapshot.tree`; it needs `FIGURES`, and names processes."""
    NONE = 0
    DETAIL = FIGURES | THREADS


class ThreadFigures(NamedTuple):
    """Figures of each thread, in the order of `ThreadRoster.tids`."""

    user_ns: Sequence[int]
    """CPU time in user mode by the kernel's own split; on Linux an estimate from ticks."""
    system_ns: Sequence[int]
    states: Sequence[str | None]
    priorities: Sequence[int | None]


class ProcessFigures(NamedTuple):
    """Figures of the process that cost more than its counters."""

    user_ns: int | None = None
    system_ns: int | None = None
    footprint_bytes: int | None = None
    """macOS: memory that is charged to the process, compressed and swapped memory included."""
    anonymous_bytes: int | None = None
    """Linux: resident memory that belongs to no file."""
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
    reaped_ns: int | None = None
    """CPU time of all children that the process has waited for, and of theirs; booked whole when it waits."""


class MachineFigures(NamedTuple):
    """Figures of the machine, or of the container in which the target runs. They name no process and no user."""

    in_container: bool = False
    """Whether the figures are those of a container."""
    busy_ns: int | None = None
    """CPU time of all cores: user, nice, system, interrupts; time that another guest stole is not included."""
    load_milli: int | None = None
    """Load average of one minute, thousandths."""
    memory_available_bytes: int | None = None
    swap_used_bytes: int | None = None
    cpu_pressure_ns: int | None = None
    """Linux: time in which at least one task waited for a CPU (PSI, ``some``)."""
    memory_pressure_ns: int | None = None
    io_pressure_ns: int | None = None
    memory_pressure_level: int | None = None
    """macOS: index in `MEMORY_PRESSURE_LEVELS`."""
    quota_throttled_ns: int | None = None
    """Linux: time for which a CPU quota kept the target's control group, or one above it, from running."""
    thermal_level: int | None = None
    """Index in `THERMAL_STATES`."""


class Child(NamedTuple):
    """A living descendant of the target."""

    pid: int
    start_key: int
    """Start in the kernel's own unit; with the pid it identifies the process."""
    name: str
    cpu_ns: int
    found_cpu_ns: int
    """Its CPU time when it was found; 0 if it started after the reading before."""
    rss_bytes: int
    thread_count: int


class ProcessTree(NamedTuple):
    """
    The target and its living descendants, without the process that reads them.

    The counters begin at 0 when the source reads the tree for the first time.
    """

    cpu_ns: int
    """CPU time of all of them, with that of descendants that ended; never decreases."""
    reaped_ns: int
    """CPU time of children that the target waited for, less what they had used when they were last read."""
    rss_bytes: int
    """Sum of resident memory; pages that processes share count once for each."""
    process_count: int
    gaps: int
    """
    Readings that missed something: a descendant that started and ended between two of them, one that was unreadable,
    more than `CHILDREN` of them. A window is complete if this did not grow.
    """
    children: tuple[Child, ...] = ()
    """By ascending pid."""


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
    State of the main thread, or of another one if it has exited: as in `ThreadFigures.states`, or ``"frozen"``.
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
    thread_wait_ns: Sequence[int] | None = None
    """
    Time for which each thread was runnable and did not run. The kernel adds a wait when it ends, so a wait in progress
    is not included. ``None``: the kernel does not count it. Objects are shared as those of `thread_cpu_ns`.
    """
    wait_ns: int | None = None
    """
    Time for which the threads of the process waited for a CPU: on Linux the sum of what `thread_wait_ns` grew by since
    the source was opened, exited threads included as far as they were read.
    """
    wait_error_ns: int | None = None
    """Half-width of the error bar of `wait_ns`; ``None``: the kernel shows no wait that is still in progress."""
    cpu_count: int = 0
    """Cores of the machine; 0: unknown."""
    source: str
    """Which kernel interface the thread counters came from."""

    figures: ProcessFigures | None = None
    thread_figures: ThreadFigures | None = None
    machine: MachineFigures | None = None
    tree: ProcessTree | None = None
    gauges: tuple[tuple[str, float], ...] = ()
    """Names and values of the gauges that the application has set, by ascending name; in snapshots of a record only."""
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> Part:
        """What it has beside its counters."""
        parts = Part.NONE if self.figures is None else Part.FIGURES
        if self.thread_figures is not None:
            parts |= Part.THREADS
        return parts if self.tree is None else parts | Part.CHILDREN

    def public(self) -> "Snapshot":
        """Return it with the names that every user of the machine can read."""
        return self if self.public_roster is None else replace(self, roster=self.public_roster, public_roster=None)
