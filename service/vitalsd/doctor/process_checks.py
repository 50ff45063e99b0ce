"""Check what is read of a process besides CPU time: memory, age and threads; and that reading it leaks nothing."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

from vitalsd.doctor.cpu_load import CpuLoadProcess, allocate_touched, name_this_thread
from vitalsd.doctor.finding import BUG, Finding, between, make_finding, not_here
from vitalsd.snapshot import Measurement, Part, Snapshot, measure
from vitalsd.sources.base import Source
from vitalsd.sources.platform import Platform

__all__ = ["age", "check_leaks", "held_resources", "memory", "threads"]

MIB = 1 << 20
ALLOCATED_BYTES = 32 * MIB
"""Memory that a process allocates, touches and frees for the check, bytes."""
STRAY_BYTES = 4 * MIB
"""A process may grow or shrink by this much for other reasons between two snapshots, bytes."""
CLOCK_ALLOWANCE_S = 0.05
"""The age of a process may miss the bounds by this much, s: ticks of the kernel, and two clocks read in turn."""
WORK_NS = 60_000_000
"""CPU time that each thread burns between the two snapshots, ns."""
EXIT_NS = 5_000_000
"""CPU time that a thread may use before it first reads its own clock and after it last does, ns."""
SNAPSHOTS = 200
"""Number of snapshots after which nothing may be left behind."""
THREAD_EXIT_TIMEOUT_S = 5.0
"""The kernel has this long to remove threads that have ended, s."""
ALLOWED = {"ports": 4, "references": 4}
"""Number that the libraries of macOS may acquire by themselves. A leak in one snapshot of 50 would exceed it."""


def memory(platform: Platform) -> Iterator[Finding]:
    """Compare resident memory with an allocation of known size that is touched and freed."""
    with closing(platform.open_source(None)) as source:
        before = source.snapshot().rss_bytes
        block = allocate_touched(ALLOCATED_BYTES)
        with_it = source.snapshot().rss_bytes
        block.close()
        yield _memory("rss.own", "resident memory, in process", before, with_it, source.snapshot().rss_bytes)
    with CpuLoadProcess(()) as other, closing(platform.open_source(other.pid)) as source:
        before = source.snapshot().rss_bytes
        other.hold(ALLOCATED_BYTES)
        with_it = source.snapshot().rss_bytes
        other.hold(0)
        yield _memory("rss.other", "resident memory, another process", before, with_it, source.snapshot().rss_bytes)


def _memory(check: str, what: str, before: int, with_it: int, after: int) -> Finding:
    grown, shrunk = with_it - before, with_it - after
    return make_finding(
        check,
        what,
        f"+{ALLOCATED_BYTES / MIB:.1f} MiB and back, ± {STRAY_BYTES / MIB:.0f}",
        f"+{grown / MIB:.1f} MiB, then -{shrunk / MIB:.1f}",
        abs(grown - ALLOCATED_BYTES) <= STRAY_BYTES and abs(shrunk - ALLOCATED_BYTES) <= STRAY_BYTES,
        f"1024 times too much or too little is a wrong unit; a machine that swaps shows less: try again; {BUG}",
    )


def age(platform: Platform) -> Iterator[Finding]:
    """Compare the age of a process that was just started, and its growth, with the monotonic clock."""
    with CpuLoadProcess(()) as other, closing(platform.open_source(other.pid)) as source:
        first = source.snapshot()
        time.sleep(0.2)
        last = source.snapshot()
    low, high = ((first.monotonic_ns - ns) / 1e9 for ns in (other.started_ns, other.begun_ns))
    read = first.uptime_ns / 1e9
    yield make_finding(
        "uptime.age",
        "age of a process just started",
        f"{between(low, high, 's', 3)} ± {CLOCK_ALLOWANCE_S}",
        f"{read:.3f} s",
        low - CLOCK_ALLOWANCE_S <= read <= high + CLOCK_ALLOWANCE_S,
        f"the start of processes is read in another unit or of another clock; {BUG}",
    )
    passed = (last.boottime_ns - first.boottime_ns) / 1e9
    advance = (last.uptime_ns - first.uptime_ns) / 1e9
    yield make_finding(
        "uptime.advance",
        "age across two samples",
        f"+{passed:.3f} s ± {CLOCK_ALLOWANCE_S}",
        f"+{advance:.3f} s",
        abs(advance - passed) <= CLOCK_ALLOWANCE_S,
        f"the clock of the age is not the one of the machine; {BUG}",
    )


class _Worker(threading.Thread):
    """Burn a known CPU time on command, then wait for the order to end, or end at once."""

    def __init__(self, name: str, *, lives: bool) -> None:
        super().__init__(name=name, daemon=True)
        self._lives = lives
        self.named, self.go, self.done, self.leave = (threading.Event() for _ in range(4))
        self.waited_ns = self.cpu_ns = 0
        """CPU time before it burns, and in all, by its own clock, ns."""

    def run(self) -> None:
        name_this_thread(self.name)
        self.named.set()
        self.go.wait()
        self.waited_ns = time.thread_time_ns()
        while time.thread_time_ns() - self.waited_ns < WORK_NS:
            pass
        self.cpu_ns = time.thread_time_ns()
        self.done.set()
        if self._lives:
            self.leave.wait()


class _Cast(NamedTuple):
    """Group threads of this process by the snapshots, of two, in which they live."""

    old: list[_Worker]
    """Alive in the first snapshot alone."""
    young: list[_Worker]
    """Alive in the last snapshot alone."""
    brief: _Worker
    """Born and ended between the two."""

    @property
    def everyone(self) -> list[_Worker]:
        return [*self.old, *self.young, self.brief]


def threads(platform: Platform) -> Iterator[Finding]:
    """Compare ids and names with `threading`, births and deaths, and the CPU time of each thread with its own clock."""
    cast = _Cast(
        old=[_Worker(f"old-{i}", lives=False) for i in range(2)],
        young=[_Worker(f"young-{i}", lives=True) for i in range(2)],
        brief=_Worker("brief", lives=False),
    )
    try:
        with closing(platform.open_source(None)) as source:
            first, last = _snapshots_around(cast, source)
    finally:
        for thread in cast.everyone:
            thread.go.set()
            thread.leave.set()
    yield _known(cast, last)
    measured = measure(first, last)
    yield _births(cast, measured)
    yield from _books(cast, measured)


def _snapshots_around(cast: _Cast, source: Source) -> tuple[Snapshot, Snapshot]:
    """Run the threads, and return a snapshot from before the young ones and one from after the end of the others."""
    ending = [*cast.old, cast.brief]
    for thread in cast.old:
        thread.start()
        thread.named.wait()
    first = source.snapshot()
    for thread in (*cast.young, cast.brief):
        thread.start()
        thread.named.wait()
    for thread in cast.everyone:
        thread.go.set()
        thread.done.wait()
    for thread in ending:
        thread.join()
    last = source.snapshot()
    deadline = time.monotonic() + THREAD_EXIT_TIMEOUT_S
    # `join` returns a little before the kernel has removed the thread.
    while {thread.native_id for thread in ending} & set(last.roster.tids) and time.monotonic() < deadline:
        time.sleep(0.005)
        last = source.snapshot()
    return first, last


def _known(cast: _Cast, last: Snapshot) -> Finding:
    listed = dict(zip(last.roster.tids, last.roster.names, strict=True))
    python = {thread.native_id for thread in threading.enumerate() if thread not in cast.everyone} | {
        thread.native_id for thread in cast.young
    }
    missing = len(python - set(listed))
    wrong = sum(listed.get(thread.native_id or 0) not in (thread.name, None) for thread in cast.young)
    return make_finding(
        "threads.known",
        "ids and names, by threading",
        f"all {len(python)}, those named by their names",
        f"{len(python) - missing} listed, {wrong} under another name",
        not missing and not wrong,
        f"vitalsd omits threads that the kernel lists; {BUG}",
    )


def _births(cast: _Cast, measured: Measurement) -> Finding:
    first, last = measured.first, measured.last
    born = {last.roster.tids[i] for i in measured.born}
    dead = set(first.roster.tids) - set(last.roster.tids)
    right = (
        born >= {thread.native_id for thread in cast.young}
        and dead >= {thread.native_id for thread in cast.old}
        and cast.brief.native_id not in last.roster.tids
    )
    return make_finding(
        "threads.births",
        "threads born and dead in a window",
        f"{len(cast.young)} born, {len(cast.old)} dead, {len(first.roster)} before and after",
        f"{len(born)} born, {len(dead)} dead, {len(first.roster)} before, {len(last.roster)} after",
        right and len(first.roster) + len(born) - len(dead) == len(last.roster),
        f"the difference of two snapshots has missing or extra threads; {BUG}",
    )


def _books(cast: _Cast, measured: Measurement) -> Iterator[Finding]:
    exited = sum(thread.cpu_ns - thread.waited_ns for thread in cast.old) + cast.brief.cpu_ns
    slack = measured.cpu_error_ns + EXIT_NS * 3
    yield make_finding(
        "books.exited",
        "CPU time of threads that ended",
        f"{exited / 1e6:.0f} ms ± {slack / 1e6:.0f}",
        f"{measured.exited_ns / 1e6:.0f} ms",
        abs(measured.exited_ns - exited) <= slack,
        f"the total omits ended threads, or counts in another unit than the threads; {BUG}",
    )
    yield make_finding(
        "books.balance",
        "process = living + exited + rest",
        f"rest 0 ± {slack / 1e6:.0f} ms",
        f"{measured.cpu_ns / 1e6:.0f} = {measured.living_ns / 1e6:.0f} + {measured.exited_ns / 1e6:.0f}"
        f" + {round(measured.unattributed_ns / 1e6)} ms",
        abs(measured.unattributed_ns) <= slack,
        f"total and threads do not count the same; {BUG}",
    )


def held_resources(platform: Platform) -> dict[str, int]:
    """Count what this process may leak: descriptors, threads and, on macOS, ports and references."""
    return {
        "descriptors": len(os.listdir("/dev/fd")),
        "threads": threading.active_count(),
        **platform.holdings(),
    }


def check_leaks(platform: Platform, timeout_s: float = THREAD_EXIT_TIMEOUT_S) -> Iterator[Finding]:
    """
    Check that snapshots of this and another process leave nothing behind, while threads are born and end here.

    Args:
        platform: opens the processes.
        timeout_s: the kernel has this long to remove threads that have ended, s.
    """
    before = held_resources(platform)
    with (
        CpuLoadProcess(()) as other,
        closing(platform.open_source(None)) as own,
        closing(platform.open_source(other.pid)) as foreign,
    ):
        sources: tuple[Source, Source] = own, foreign
        for i in range(SNAPSHOTS):
            passing = threading.Thread(target=time.sleep, args=(0.0003,))
            passing.start()
            sources[i % 2].snapshot(parts=Part.DETAIL if i % 8 < 2 else Part.NONE)
            passing.join()
    deadline = time.monotonic() + timeout_s
    while _grown(before, after := held_resources(platform)) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel removes threads some time after their end
        with closing(platform.open_source(None)) as source:
            source.snapshot()
    for kind in ("descriptors", "threads", "ports", "references"):
        check, what = f"left.{kind}", f"{kind} after {SNAPSHOTS} snapshots"
        if kind not in before:
            yield not_here(check, what, "exists on macOS only")
            continue
        yield make_finding(
            check,
            what,
            f"at most {before[kind]}, as before" + (f", or {ALLOWED[kind]} more" if kind in ALLOWED else ""),
            str(after[kind]),
            kind not in _grown(before, after),
            f"each snapshot leaves something behind: watch it by `vitalsd doctor --soak 60`; {BUG}",
        )


def _grown(before: Mapping[str, int], after: Mapping[str, int]) -> set[str]:
    return {kind for kind, number in after.items() if number > before[kind] + ALLOWED.get(kind, 0)}
