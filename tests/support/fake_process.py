"""
Simulate a process that a test or hypothesis advances, and that a source reads without a kernel.

`support.snapshots` builds snapshots with counters that are unrelated to each other.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from hypothesis import strategies as st

from vitalsd.recording.segment import WAIT_STEP_NS
from vitalsd.snapshot import (
    Child,
    Identity,
    MachineFigures,
    Part,
    ProcessFigures,
    ProcessTree,
    Snapshot,
    ThreadFigures,
    ThreadRoster,
)
from vitalsd.sources.base import TargetGoneError, ThreadLook

__all__ = ["ALL_PARTS", "IDENTITY", "SECOND_NS", "FakeSource", "Process", "lives", "same"]

SECOND_NS = 1_000_000_000

IDENTITY = Identity(
    platform="linux",
    pid=4242,
    name="ryll",
    boot_id="0a1b2c3d-0000-0000-0000-000000000000",
    start_key=1234,
    started_unix_ns=1_700_000_000 * SECOND_NS,
)


@dataclass
class Process:
    """Simulate a process: advance it, then take its snapshot. Only calls pass time. A `support.workload.Workload`."""

    threads: dict[tuple[int, int], tuple[str, int]] = field(default_factory=lambda: {(1, 1): ("main", 0)})
    """(tid, birth) -> (name, CPU ns)"""
    monotonic_ns: int = 100 * SECOND_NS
    asleep_ns: int = 0
    set_ns: int = 0
    """Sum of the steps of the wall clock, ns."""
    exited_ns: int = 0
    rss_bytes: int = 1 << 20
    image: int = 1
    state: str = "sleeping"
    gone: bool = False
    pid: int = IDENTITY.pid
    waits: dict[tuple[int, int], int] | None = None
    """Wait of each thread as booked, ns; a thread that is missing has none. ``None``: the kernel counts no waits."""
    ended_wait_ns: int = 0
    wait_ns: int | None = None
    """Wait of the process where the kernel counts none of threads."""
    figures: ProcessFigures | None = None
    """``None``: those of a process that nothing is known of."""
    machine: MachineFigures | None = None
    tree: ProcessTree | None = None
    gauges: dict[str, float] = field(default_factory=dict)
    cpu_count: int = 4
    newest_tid: int = 0
    """Highest thread id; ids are not reused."""
    _roster: ThreadRoster = field(default_factory=ThreadRoster)

    def pass_time(self, elapsed_ns: int, burnt_ns: Sequence[int] = ()) -> None:
        """Let time pass, in which the threads, in order, use `burnt_ns` of CPU time."""
        self.monotonic_ns += elapsed_ns
        for (key, (name, cpu_ns)), ns in zip(list(sorted(self.threads.items())), burnt_ns, strict=False):
            self.threads[key] = name, cpu_ns + ns

    def start_thread(self, name: str) -> int:
        """Start a thread, which costs the main one 20 µs, and return its id."""
        self.pass_time(1000, [20_000])
        self.newest_tid = max(self.newest_tid, *(tid for tid, _ in self.threads)) + 1
        self.threads[self.newest_tid, self.monotonic_ns] = name, 0
        return self.newest_tid

    def rename_thread(self, tid: int, name: str) -> None:
        """Rename a thread."""
        key = self._key(tid)
        self.threads[key] = name, self.threads[key][1]

    def burn(self, tid: int, cpu_ns: int) -> int:
        """Let a thread use CPU time, which takes the same elapsed time; return it."""
        self.pass_time(cpu_ns)
        key = self._key(tid)
        name, used_ns = self.threads[key]
        self.threads[key] = name, used_ns + cpu_ns
        return cpu_ns

    def end_thread(self, tid: int, birth: int | None = None) -> None:
        """End a thread, without `birth` the only one with this id; the process keeps its CPU time."""
        key = self._key(tid) if birth is None else (tid, birth)
        self.exited_ns += self.threads.pop(key)[1]
        self.ended_wait_ns += (self.waits or {}).pop(key, 0)

    def book_wait(self, tid: int, wait_ns: int) -> None:
        """Charge a thread with a wait that ends now."""
        key = self._key(tid)
        self.waits = {**(self.waits or {}), key: (self.waits or {}).get(key, 0) + wait_ns}

    def kill(self) -> None:
        """End the process."""
        self.gone = True

    def close(self) -> None:
        """Do nothing: no resource is open."""

    def _key(self, tid: int) -> tuple[int, int]:
        (key,) = (key for key in self.threads if key[0] == tid)
        return key

    def snapshot(self, *, parts: Part = Part.NONE) -> Snapshot:
        """Return a snapshot as a source does: with the same roster as long as no thread or name changes."""
        rows = sorted(self.threads.items())
        self._roster = ThreadRoster(
            tuple(tid for (tid, _), _ in rows),
            tuple(birth for (_, birth), _ in rows),
            tuple(name for _, (name, _) in rows),
        ).sharing(self._roster)
        living_ns = sum(cpu_ns for _, (_, cpu_ns) in rows)
        waits = None if self.waits is None else [self.waits.get(key, 0) for key, _ in rows]
        figures = self.figures or ProcessFigures(footprint_bytes=32 << 20)
        return Snapshot(
            monotonic_ns=self.monotonic_ns,
            boottime_ns=self.monotonic_ns + self.asleep_ns,
            wall_ns=1_700_000_500 * SECOND_NS + self.monotonic_ns + self.asleep_ns + self.set_ns,
            uptime_ns=self.monotonic_ns,
            skew_ns=1000,
            cpu_ns=living_ns + self.exited_ns,
            cpu_grain_ns=1,
            exited_cpu_ns=(self.exited_ns, self.exited_ns),
            rss_bytes=self.rss_bytes,
            vm_bytes=10 * self.rss_bytes,
            state=self.state,
            image=self.image,
            roster=self._roster,
            thread_cpu_ns=[cpu_ns for _, (_, cpu_ns) in rows],
            thread_grain_ns=1,
            thread_lag_ns=0,
            source="fake",
            thread_wait_ns=waits,
            wait_ns=self.wait_ns if waits is None else self.ended_wait_ns + sum(waits),
            cpu_count=self.cpu_count,
            figures=figures._replace(user_ns=living_ns + self.exited_ns, system_ns=0)
            if Part.FIGURES in parts
            else None,
            machine=self.machine if Part.FIGURES in parts else None,
            tree=self.tree if Part.CHILDREN in parts else None,
            gauges=tuple(sorted(self.gauges.items())),
            thread_figures=self._thread_figures() if Part.THREADS in parts else None,
        )

    def _thread_figures(self) -> ThreadFigures:
        used_ns = [cpu_ns for _, (_, cpu_ns) in sorted(self.threads.items())]
        count = len(used_ns)
        return ThreadFigures(
            user_ns=used_ns, system_ns=[0] * count, states=["waiting"] * count, priorities=[31] * count
        )


class FakeSource:
    """Read a `Process` as a `vitalsd.sources.base.Source`; each read takes `step_ns`."""

    def __init__(self, process: Process, step_ns: int = 1000) -> None:
        self.process, self._step_ns = process, step_ns
        self.closed = False
        self.restarts = 0

    def identity(self) -> Identity:
        """Return `IDENTITY`."""
        return IDENTITY

    def restart(self) -> None:
        """Count the restarts."""
        self.restarts += 1

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """Return the CPU time of a thread, which sleeps in epoll."""
        if self.closed:
            raise ValueError("the source is closed")
        process = self.process
        process.pass_time(self._step_ns)
        found = [cpu_ns for (known, _), (_, cpu_ns) in process.threads.items() if known == tid and not process.gone]
        if not found:
            return None
        look = ThreadLook(process.monotonic_ns, found[0], wait_ns=0, slices=0)
        return look._replace(state="sleeping", major_faults=0, wait_channel="epoll") if closely else look

    def close(self) -> None:
        """Record that the source is closed."""
        self.closed = True

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        """Return the snapshot of the process. Raises `TargetGoneError`."""
        if self.closed:
            raise ValueError("the source is closed")
        if self.process.gone:
            raise TargetGoneError(f"target {self.process.pid} has exited")
        self.process.pass_time(self._step_ns)
        return self.process.snapshot(parts=parts)


NAMES = st.text(max_size=8)
ALL_PARTS = Part.FIGURES | Part.CHILDREN


@st.composite
def lives(draw: st.DrawFn, *, max_steps: int = 80, figures: bool | None = None) -> list[Snapshot]:
    """
    Draw the snapshots of a process, at least one, while threads use CPU, idle, wait, start, are renamed and exit.

    Args:
        draw: of hypothesis.
        max_steps: limit of the steps.
        figures: whether snapshots have waits, figures, machine and tree; ``None``: some lives do, and some of their
            snapshots.
    """
    process = Process()
    rich = draw(st.booleans()) if figures is None else figures
    if rich:
        process.waits = draw(st.sampled_from([{}, None]))
    chance = Random(draw(st.integers(0, 2**16)) if rich else 0)  # a draw for each figure would take seconds
    found = [process.snapshot()]
    for step in range(draw(st.integers(0, max_steps))):
        kind = draw(st.sampled_from(["burn", "burn", "idle", "all", "born", "exit", "rename", "exec", "wait"]))
        keys = sorted(process.threads)
        used_ns = [0] * len(keys)
        if kind == "burn":
            used_ns[draw(st.integers(0, len(keys) - 1))] = draw(st.integers(0, 2**33))
        elif kind == "all":
            used_ns = [draw(st.integers(0, 2**31)) for _ in keys]
        elif kind == "born":
            process.threads[draw(st.integers(1, 9)), step + 2] = draw(NAMES), draw(st.integers(0, 2**40))
        elif kind == "exit" and len(keys) > 1:
            process.end_thread(*draw(st.sampled_from(keys)))
        elif kind == "rename":
            key = draw(st.sampled_from(keys))
            process.threads[key] = draw(NAMES), process.threads[key][1]
        elif kind == "exec":
            process.image += 1
        elif kind == "wait" and process.waits is not None:
            key = draw(st.sampled_from(keys))
            process.waits[key] = process.waits.get(key, 0) + draw(st.integers(0, 2**34))
        process.rss_bytes = draw(st.integers(0, 2**40))
        process.pass_time(draw(st.integers(1_000_000, 10 * SECOND_NS)), used_ns)
        parts = Part.NONE
        if rich and chance.randrange(3):
            parts = ALL_PARTS
            change_figures(chance, process)
            change_gauges(chance, process)
        found.append(process.snapshot(parts=parts))
    return found


def change_figures(chance: Random, process: Process) -> None:
    """Let the figures of a process, its machine and its descendants change: gauges freely, counters upwards."""
    figures, machine, tree = process.figures, process.machine, process.tree

    def grown(counter: int | None) -> int:
        return (counter or 0) + chance.choice((0, chance.randrange(SECOND_NS)))

    def size(most: int = 2**40) -> int | None:
        return chance.choice((None, 0, chance.randrange(most)))

    process.figures = ProcessFigures(
        anonymous_bytes=size(),
        swap_bytes=size(),
        open_fds=size(),
        major_faults=grown(figures and figures.major_faults),
        reaped_ns=grown(figures and figures.reaped_ns),
    )
    process.machine = MachineFigures(
        in_container=machine.in_container if machine else chance.random() < 0.5,
        busy_ns=grown(machine and machine.busy_ns),
        load_milli=size(99_000),
        cpu_pressure_ns=grown(machine and machine.cpu_pressure_ns),
        memory_pressure_level=size(3),
        thermal_level=size(6),
    )
    before = {child.pid: child for child in tree.children} if tree else {}
    children = []
    for pid in sorted(chance.sample((50, 51, 52, 53), chance.randrange(4))):
        child = before.get(pid) or Child(
            pid, process.monotonic_ns, chance.choice(("", "sh", "\u202ecc")), 5, chance.randrange(6), 0, 1
        )
        children.append(child._replace(cpu_ns=grown(child.cpu_ns), rss_bytes=chance.randrange(2**40)))
    process.tree = ProcessTree(
        cpu_ns=grown(tree and tree.cpu_ns),
        reaped_ns=grown(tree and tree.reaped_ns),
        rss_bytes=chance.randrange(2**40),
        process_count=1 + len(children),
        gaps=(tree.gaps if tree else 0) + chance.randrange(2),
        children=tuple(children),
    )


VALUES = (0.0, -0.0, 58.0, -1.5, 0.1, 5e-324, -1e308)


def change_gauges(chance: Random, process: Process) -> None:
    """Let gauges be set, opened and closed."""
    for name in ("fps", "queue.length", "a-b_C9"):
        if chance.random() < 0.1:
            process.gauges.pop(name, None)
        elif name in process.gauges or chance.random() < 0.1:
            process.gauges[name] = chance.choice((*VALUES, chance.gauss(0, 1e6)))


def same(a: Snapshot, b: Snapshot) -> bool:
    """Return whether two snapshots are equal in everything that is recorded."""

    def values(s: Snapshot) -> tuple[object, ...]:
        figures = s.figures and s.figures._replace(
            user_ns=None, system_ns=None, peak_rss_bytes=None, minor_faults=None, p_core_ns=None, qos_ns=None
        )
        return (
            (s.monotonic_ns, s.boottime_ns, s.wall_ns, s.uptime_ns, s.skew_ns, s.cpu_ns, s.cpu_grain_ns),
            (s.exited_cpu_ns, s.rss_bytes, s.vm_bytes),
            (s.roster, list(s.thread_cpu_ns)),
            (s.thread_grain_ns, s.thread_lag_ns, s.source),
            (
                None if s.thread_wait_ns is None else [ns // WAIT_STEP_NS for ns in s.thread_wait_ns],
                s.wait_ns,
                s.wait_error_ns,
                s.cpu_count,
            ),
            (figures, s.machine, s.tree),
            [(name, struct.pack("d", value)) for name, value in s.gauges],
        )

    return values(a) == values(b)
