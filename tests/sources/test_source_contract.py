"""
What every source promises, on every source.

Linux (own process and another), macOS over the simulated libSystem (Mach for our own process, libproc for our own and
another), and a fake. On a Mac the real libSystem takes the place of the simulated one.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from support.darwin.simulator import Simulator
from support.fake_process import FakeSource, Process
from support.target import OwnWorkload
from support.workload import ChildWorkload, Workload
from vitalsd.snapshot import Part, measure
from vitalsd.sources.base import Source, TargetGoneError
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.darwin.libsystem import LibSystem, load
from vitalsd.sources.darwin.mach_source import MachSource

BURN_NS = 60_000_000
SLACK_NS = 25_000_000
"""CPU time that carrying out an order, and two snapshots of our own process, may cost besides."""


@dataclass
class World:
    """A target, and how to open sources of it."""

    workload: Workload
    open: Callable[[], Source]


def _linux(pid: int | None) -> Source:
    from vitalsd.sources.linux.source import LinuxSource

    return LinuxSource(pid)


def _world(kind: str, libsystem: Callable[[], LibSystem]) -> World:
    if kind == "fake":
        process = Process(threads={(4242, 0): ("main", 0)})
        return World(process, lambda: FakeSource(process))
    workload: Workload = ChildWorkload() if kind.endswith("other") else OwnWorkload()
    pid = workload.pid
    if kind.startswith("linux"):
        return World(workload, lambda: _linux(None if kind == "linux-own" else pid))
    lib = libsystem()
    if kind == "mach":
        return World(workload, lambda: MachSource(lib=lib))
    return World(workload, lambda: LibprocSource(pid, lib=lib))


LINUX = ["linux-own", "linux-other"] if sys.platform == "linux" else []


@pytest.fixture(params=[*LINUX, "mach", "libproc-own", "libproc-other", "fake"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    def libsystem() -> LibSystem:
        if sys.platform == "darwin":
            return load()
        simulator: Simulator = request.getfixturevalue("simulator")
        return simulator.lib

    world = _world(request.param, libsystem)
    yield world
    world.workload.close()


@pytest.fixture
def source(world: World) -> Iterator[Source]:
    source = world.open()
    yield source
    source.close()


def test_identity_is_equal_for_two_sources_of_one_process(world: World, source: Source) -> None:
    """Pid, platform, start and name; two sources of one process agree, so that a reused pid can differ."""
    identity = source.identity()
    assert identity.pid == world.workload.pid
    assert identity.platform in ("linux", "macos")
    assert identity.name
    assert identity.started_unix_ns > 1_600_000_000 * 10**9
    again = world.open()
    assert again.identity().start_id == identity.start_id
    again.close()
    assert source.identity() == identity


def test_snapshot_columns_are_parallel_and_ascending(world: World, source: Source) -> None:
    """One entry per thread in each column, by ascending tid, without a negative or a made-up size."""
    for i in range(5):
        world.workload.start_thread(f"worker-{i}")
    snapshot = source.snapshot()
    assert len(snapshot.roster) >= 6
    assert list(snapshot.roster.tids) == sorted(set(snapshot.roster.tids))
    roster = snapshot.roster
    assert {len(roster.births), len(roster.names), len(snapshot.thread_cpu_ns)} == {len(roster)}
    assert all(ns >= 0 for ns in snapshot.thread_cpu_ns)
    assert snapshot.cpu_ns >= 0
    assert snapshot.exited_cpu_ns[0] <= snapshot.exited_cpu_ns[1]
    assert snapshot.thread_wait_ns is None or len(snapshot.thread_wait_ns) == len(roster)
    assert snapshot.cpu_count >= 0
    assert 0 < snapshot.rss_bytes <= snapshot.vm_bytes
    assert snapshot.cpu_grain_ns > 0
    assert snapshot.thread_grain_ns > 0
    assert snapshot.source


def test_snapshot_lists_every_thread_by_its_native_id(world: World, source: Source) -> None:
    """The id is that of threading.get_native_id, also with hundreds of threads."""
    tids = {world.workload.start_thread(f"t{i}") for i in range(150)}
    assert tids <= set(source.snapshot().roster.tids)


def test_snapshot_clocks_advance_together(source: Source) -> None:
    """Uptime advances exactly as the clock that includes sleep, and no snapshot is older than the last."""
    first, last = source.snapshot(), source.snapshot()
    assert last.monotonic_ns > first.monotonic_ns
    # Read one after the other, and Linux knows the start to a tick of 10 ms; the difference is exact.
    assert last.uptime_ns - first.uptime_ns == last.boottime_ns - first.boottime_ns
    assert first.uptime_ns >= 0
    assert first.skew_ns >= 0


def test_snapshot_cpu_time_is_in_the_thread_that_used_it(world: World, source: Source) -> None:
    """It is right to the error bar that the source states, in the thread and in the process."""
    busy, idle = world.workload.start_thread("busy"), world.workload.start_thread("idle")
    first = source.snapshot()
    used_ns = world.workload.burn(busy, BURN_NS)
    last = source.snapshot()
    m = measure(first, last)
    i, j = last.roster.tids.index(busy), last.roster.tids.index(idle)
    error_ns = m.thread_error_ns(i) + first.thread_lag_ns
    assert used_ns - error_ns <= m.thread_cpu_ns[i] <= used_ns + error_ns + SLACK_NS
    assert m.thread_cpu_ns[j] <= m.thread_error_ns(j) + SLACK_NS
    assert used_ns - m.cpu_error_ns - first.thread_lag_ns <= m.cpu_ns
    assert m.cpu_ns == m.living_ns + m.exited_ns + m.unattributed_ns


def test_snapshot_thread_name_follows_a_rename(world: World, source: Source) -> None:
    """The operating system's, byte for byte in UTF-8."""
    tid = world.workload.start_thread("décodeur")
    first = source.snapshot()
    assert first.roster.names[first.roster.tids.index(tid)] == "décodeur"
    world.workload.rename_thread(tid, "encoder")
    world.workload.burn(tid, 1_000_000)
    last = source.snapshot()
    assert last.roster.names[last.roster.tids.index(tid)] == "encoder"


def test_snapshot_cpu_accounting_balances_over_births_and_deaths(world: World, source: Source) -> None:
    """A thread born in the window is marked so, one that ended is not listed, and the CPU time of both is counted."""
    old = world.workload.start_thread("old")
    world.workload.burn(old, BURN_NS)
    first = source.snapshot()
    old_ns = world.workload.burn(old, BURN_NS)
    world.workload.end_thread(old)
    young = world.workload.start_thread("young")
    young_ns = world.workload.burn(young, BURN_NS // 2)
    last = source.snapshot()
    m = measure(first, last)
    assert old not in last.roster.tids
    assert last.roster.tids.index(young) in m.born
    error_ns = m.cpu_error_ns + first.thread_lag_ns
    assert m.thread_cpu_ns[last.roster.tids.index(young)] >= young_ns - error_ns
    assert old_ns - error_ns <= m.exited_ns <= old_ns + error_ns + SLACK_NS
    assert m.cpu_ns == m.living_ns + m.exited_ns + m.unattributed_ns
    assert abs(m.unattributed_ns) <= error_ns + SLACK_NS


def test_snapshot_accounts_for_a_thread_that_lived_inside_the_window(world: World, source: Source) -> None:
    """No snapshot ever saw it; its CPU time is in the process and among the exited."""
    first = source.snapshot()
    brief = world.workload.start_thread("brief")
    used_ns = world.workload.burn(brief, BURN_NS)
    world.workload.end_thread(brief)
    m = measure(first, source.snapshot())
    error_ns = m.cpu_error_ns + first.thread_lag_ns
    assert m.cpu_ns >= used_ns - error_ns
    assert m.exited_ns >= used_ns - error_ns


def test_wait_for_a_cpu_never_decreases(world: World, source: Source) -> None:
    """Neither that of a thread nor the sum, which keeps that of exited threads; it is null throughout or never."""
    tids = [world.workload.start_thread(f"worker-{i}") for i in range(3)]
    taken = [source.snapshot()]
    for tid in tids:
        world.workload.burn(tid, 5_000_000)
        taken.append(source.snapshot())
        world.workload.end_thread(tid)
        taken.append(source.snapshot())
    for first, last in pairwise(taken):
        assert (first.wait_ns is None) == (last.wait_ns is None)
        assert (first.thread_wait_ns is None) == (last.thread_wait_ns is None)
        if first.wait_ns is not None and last.wait_ns is not None:
            assert 0 <= first.wait_ns <= last.wait_ns
        m = measure(first, last)
        if m.thread_wait_ns is not None and m.wait_ns is not None:
            assert all(ns >= 0 for ns in m.thread_wait_ns)
            assert sum(m.thread_wait_ns) == m.wait_ns


def test_roster_of_an_unchanged_process_is_the_same_object(source: Source) -> None:
    """A recorder of many snapshots then keeps one roster, and compares it at no cost."""
    first, last = source.snapshot(), source.snapshot()
    assert first.roster is last.roster


def test_snapshot_extras_are_read_on_request_only(world: World, source: Source) -> None:
    """They are columns parallel to the threads; user and system time add up to the total."""
    tid = world.workload.start_thread("worker")
    world.workload.burn(tid, BURN_NS)
    assert source.snapshot().parts == Part.NONE
    snapshot = source.snapshot(parts=Part.DETAIL)
    assert snapshot.thread_figures is not None
    threads = snapshot.thread_figures
    sizes = {len(column) for column in (threads.user_ns, threads.system_ns, threads.states, threads.priorities)}
    assert sizes == {len(snapshot.roster)}
    i = snapshot.roster.tids.index(tid)
    both_ns = threads.user_ns[i] + threads.system_ns[i]
    assert abs(both_ns - snapshot.thread_cpu_ns[i]) <= snapshot.thread_lag_ns + 2 * 10_000_000
    assert snapshot.figures is not None
    assert snapshot.figures.user_ns is not None
    assert snapshot.figures.system_ns is not None
    assert snapshot.figures.user_ns + snapshot.figures.system_ns > 0
    assert snapshot.figures.reaped_ns is None or snapshot.figures.reaped_ns >= 0


@pytest.mark.parametrize("closely", [False, True])
def test_look_at_a_thread_has_its_cpu_time_until_it_ends(world: World, source: Source, closely: bool) -> None:
    """Without a snapshot before it; what a platform does not give is None, and so is the look at no thread."""
    tid = world.workload.start_thread("worker")
    before = source.look_at(tid, closely=closely)
    burnt_ns = world.workload.burn(tid, BURN_NS)
    now = source.look_at(tid, closely=closely)
    assert before is not None
    assert now is not None
    assert now.monotonic_ns > before.monotonic_ns
    lag_ns = source.snapshot().thread_lag_ns
    assert burnt_ns - lag_ns - SLACK_NS <= now.cpu_ns - before.cpu_ns <= burnt_ns + SLACK_NS
    if closely:
        assert now.state is not None
    world.workload.end_thread(tid)
    assert source.look_at(tid, closely=closely) is None
    assert source.look_at(2**31 - 1, closely=closely) is None


def test_source_after_close_refuses(source: Source) -> None:
    """A second close does nothing."""
    source.snapshot()
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.snapshot()
    with pytest.raises(ValueError, match="closed"):
        source.look_at(os.getpid())


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no list of descriptors")
def test_source_after_close_leaks_no_descriptor(world: World) -> None:
    """Opened, used and closed: as many descriptors as before."""
    world.open().close()
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        source = world.open()
        source.look_at(source.snapshot(parts=Part.DETAIL).roster.tids[0])
        source.close()
    assert len(os.listdir("/dev/fd")) == before


def test_source_of_a_dead_target_stays_target_gone(world: World, source: Source) -> None:
    """It stays so as a zombie and after it is reaped. The own exit cannot be observed."""
    if isinstance(world.workload, OwnWorkload):
        assert source.identity().pid == os.getpid()
        return
    source.snapshot()
    assert isinstance(world.workload, ChildWorkload | Process)
    world.workload.kill()
    with pytest.raises(TargetGoneError):
        source.snapshot()
    assert source.look_at(world.workload.pid) is None
    if isinstance(world.workload, ChildWorkload):
        world.workload.reap()
    with pytest.raises(TargetGoneError):
        source.snapshot()
