"""Build snapshots as a kernel could return them, by hand or by hypothesis."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from vitalsd.snapshot import (
    Child,
    Identity,
    MachineFigures,
    ProcessFigures,
    ProcessTree,
    Snapshot,
    ThreadFigures,
    ThreadRoster,
)

IDENTITY = Identity(
    platform="linux",
    pid=4242,
    name="app",
    boot_id="0b7e5a4e-6c1f-4c7e-9c0d-1f6f0a3d5e21",
    start_key=217667,
    started_unix_ns=1_790_000_000_123_456_789,
)

SECOND = 1_000_000_000

Thread = tuple[int, int, int]
"""Thread id, birth, CPU time in ns."""


def roster(threads: Sequence[Thread], names: Sequence[str] | None = None) -> ThreadRoster:
    """Return the roster of `threads`; without `names` each is named after its thread id."""
    tids, births = tuple(tid for tid, _, _ in threads), tuple(birth for _, birth, _ in threads)
    return ThreadRoster(tids, births, tuple(f"thread-{tid}" for tid in tids) if names is None else tuple(names))


def snapshot(
    at_ns: int,
    threads: Sequence[Thread],
    *,
    cpu_ns: int | None = None,
    **fields: Any,
) -> Snapshot:
    """Return a snapshot at `at_ns` with exact counters; without `cpu_ns` no thread has exited yet."""
    living_ns = sum(cpu for _, _, cpu in threads)
    cpu_ns = living_ns if cpu_ns is None else cpu_ns
    known: dict[str, Any] = {
        "monotonic_ns": at_ns,
        "boottime_ns": at_ns,
        "wall_ns": 1_790_000_000 * SECOND + at_ns,
        "uptime_ns": at_ns,
        "skew_ns": 0,
        "cpu_ns": cpu_ns,
        "cpu_grain_ns": 1,
        "exited_cpu_ns": (cpu_ns - living_ns, cpu_ns - living_ns),
        "rss_bytes": 64 << 20,
        "vm_bytes": 128 << 20,
        "image": (1, 2, 3),
        "roster": roster(threads),
        "thread_cpu_ns": [cpu for _, _, cpu in threads],
        "thread_grain_ns": 1,
        "thread_lag_ns": 0,
        "source": "test",
    }
    return Snapshot(**{**known, **fields})


def with_extras(snapshot: Snapshot, **fields: Any) -> Snapshot:
    """Return the snapshot with the counters of ``detail=full``, all CPU time in user mode."""
    threads = ThreadFigures(
        user_ns=snapshot.thread_cpu_ns,
        system_ns=[0] * len(snapshot.roster),
        states=["sleeping"] * len(snapshot.roster),
        priorities=[20] * len(snapshot.roster),
    )
    waits = snapshot.thread_wait_ns or [0] * len(snapshot.roster)
    return replace(
        snapshot,
        figures=ProcessFigures(**fields),
        thread_figures=threads,
        thread_wait_ns=waits,
        wait_ns=sum(waits),
        wait_error_ns=1,
        machine=MachineFigures(False, *[1] * (len(MachineFigures._fields) - 1)),
        tree=ProcessTree(cpu_ns=0, reaped_ns=0, rss_bytes=snapshot.rss_bytes, process_count=1, gaps=0),
    )


counters = st.integers(0, 2**62)
names = st.text(max_size=15) | st.sampled_from(
    ["", "render", 'a"b\\', "\u202e\x1b[31m", "\x00", "\u2028", "\U0001f600"]
)


def machines(optional: st.SearchStrategy[int | None]) -> st.SearchStrategy[MachineFigures]:
    """Return a strategy of figures of a machine, each of which may be missing."""
    figures = {name: optional for name in MachineFigures._fields}
    return st.builds(
        MachineFigures,
        **{
            **figures,
            "in_container": st.booleans(),
            "thermal_level": st.none() | st.integers(0, 5),
            "memory_pressure_level": st.none() | st.integers(0, 2),
        },
    )


def trees() -> st.SearchStrategy[ProcessTree]:
    """Return a strategy of process trees with up to three children, of which two may be one process."""
    small = st.integers(1, 3)
    child = st.builds(
        Child,
        pid=small,
        start_key=small,
        name=names,
        cpu_ns=counters,
        found_cpu_ns=counters,
        rss_bytes=counters,
        thread_count=small,
    )
    children = st.lists(child, max_size=3).map(tuple)
    return st.builds(
        ProcessTree,
        cpu_ns=counters,
        reaped_ns=counters,
        rss_bytes=counters,
        process_count=small,
        gaps=small,
        children=children,
    )


@st.composite
def any_snapshot(draw: st.DrawFn, at_ns: st.SearchStrategy[int], *, extras: bool | None = None) -> Snapshot:
    """Draw a snapshot with counters that are unrelated to each other: the worst answer of a kernel."""
    threads = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2), counters), max_size=8, unique_by=lambda t: t[0])
    )
    threads.sort()
    low, high = sorted((draw(st.integers(-(2**62), 2**62)), draw(st.integers(-(2**62), 2**62))))
    now = draw(at_ns)
    taken = snapshot(
        now,
        threads,
        cpu_ns=draw(counters),
        boottime_ns=now + draw(st.integers(0, 10**12)),
        skew_ns=draw(st.integers(0, SECOND)),
        exited_cpu_ns=(low, high),
        rss_bytes=draw(counters),
        vm_bytes=draw(counters),
        image=draw(st.sampled_from([None, (1,), (2,)])),
        roster=roster(threads, [draw(names) for _ in threads]),
        thread_grain_ns=draw(st.integers(1, 10**7)),
        thread_lag_ns=draw(st.integers(0, 10**7)),
        warnings=tuple(draw(st.lists(st.text(max_size=10), max_size=2))),
    )
    if not (draw(st.booleans()) if extras is None else extras):
        return taken
    optional = st.none() | counters
    states = st.sampled_from([None, "running", "sleeping"])
    per_thread = ThreadFigures(
        user_ns=[draw(counters) for _ in threads],
        system_ns=[draw(counters) for _ in threads],
        states=[draw(states) for _ in threads],
        priorities=[draw(st.none() | st.integers(-100, 39)) for _ in threads],
    )
    return replace(
        taken,
        thread_wait_ns=[draw(counters) for _ in threads] if draw(st.booleans()) else None,
        wait_ns=draw(optional),
        wait_error_ns=draw(optional),
        cpu_count=draw(st.integers(0, 1024)),
        thread_figures=per_thread,
        machine=draw(st.none() | machines(optional)),
        tree=draw(st.none() | trees()),
        figures=ProcessFigures(
            user_ns=draw(optional),
            system_ns=draw(optional),
            footprint_bytes=draw(optional),
            peak_rss_bytes=draw(optional),
            swap_bytes=draw(optional),
            open_fds=draw(optional),
            minor_faults=draw(optional),
            major_faults=draw(optional),
            idle_wakeups=draw(optional),
            interrupt_wakeups=draw(optional),
            energy_nj=draw(optional),
            p_core_ns=draw(optional),
            reaped_ns=draw(optional),
            anonymous_bytes=draw(optional),
        ),
    )


def pairs(*, extras: bool | None = None) -> st.SearchStrategy[tuple[Snapshot, Snapshot]]:
    """Return a strategy of two snapshots, the second one later by 1 ns to an hour."""
    return st.tuples(
        any_snapshot(st.integers(0, 10**15), extras=extras),
        any_snapshot(st.integers(10**15 + 1, 10**15 + 3600 * SECOND), extras=extras),
    )
