"""Targets of unusual kinds, which no report names: each gets numbers that hold, and none is taken for dead."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from support import tools
from support.paths import SUPPORT
from support.sidecars import eventually
from vitalsd.snapshot import Measurement, Part, measure
from vitalsd.sources.linux.cpu_counters import KERNEL_TICK_NS
from vitalsd.sources.linux.procfs import parse_stat
from vitalsd.sources.linux.source import LinuxSource

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MS = 1_000_000

Begin = Callable[..., tuple["subprocess.Popen[bytes]", int, int]]


@pytest.fixture(scope="module")
def program(module_path: Path) -> Path:
    built = module_path / "odd_target"
    source = SUPPORT / "programs" / "odd_target.c"
    subprocess.run([tools.program("cc", package="gcc"), "-O1", "-pthread", "-o", built, source], check=True)
    return built


@pytest.fixture
def begin(program: Path) -> Iterator[Begin]:
    """Starts a target; returns it, its pid, and the other number that it prints."""
    with ExitStack() as stack:

        def started(*arguments: str) -> tuple["subprocess.Popen[bytes]", int, int]:
            # A session of its own, so that children end with it.
            process = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            stack.callback(ended, process)
            assert process.stdout is not None
            pid, other = map(int, process.stdout.readline().split())
            return process, pid, other

        yield started


def ended(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()


def holds(m: Measurement) -> None:
    """Assert what must hold in each window of any target."""
    assert m.cpu_ns == m.living_ns + m.exited_ns + m.unattributed_ns
    for i, ns in enumerate(m.thread_cpu_ns):
        assert ns - m.thread_error_ns(i) <= m.cpu_ns + m.cpu_error_ns


def windows(source: LinuxSource, count: int) -> Iterator[Measurement]:
    last = source.snapshot()
    for number in range(count):
        first, last = last, source.snapshot(parts=Part.DETAIL if number % 3 == 0 else Part.NONE, names=number % 2 == 0)
        m = measure(first, last)
        holds(m)
        yield m


def test_parent_in_vfork_is_idle_and_its_child_is_another_process(begin: Begin) -> None:
    """The kernel holds the one that made the child; it is neither stopped nor frozen."""
    _, pid, _ = begin("vfork")
    eventually(lambda: parse_stat(Path(f"/proc/{pid}/stat").read_bytes()).state == "D")
    with closing(LinuxSource(pid)) as source:
        found = list(windows(source, 5))[1:]
    assert {(m.last.state, m.warnings) for m in found} == {("uninterruptible", ())}
    assert all(m.cpu_ns < MS for m in found)  # It may have been falling asleep at the first snapshot.


def test_process_that_shares_its_memory_is_counted_by_itself(begin: Begin) -> None:
    """Made by clone without CLONE_THREAD: the child uses CPU time, and its parent none."""
    _, parent, child = begin("shared")
    eventually(lambda: parse_stat(Path(f"/proc/{child}/stat").read_bytes()).state == "R")
    with closing(LinuxSource(parent)) as idle, closing(LinuxSource(child)) as busy:
        first, begun = idle.snapshot(), busy.snapshot()
        eventually(lambda: busy.snapshot().cpu_ns - begun.cpu_ns > 50 * MS)
        quiet, used = measure(first, idle.snapshot()), measure(begun, busy.snapshot())
    assert quiet.cpu_ns < MS  # It may have been falling asleep at the first snapshot.
    assert quiet.unknown == frozenset()
    assert used.thread_cpu_ns[0] == pytest.approx(used.cpu_ns, abs=2 * KERNEL_TICK_NS)


def test_ten_thousand_short_threads_are_in_the_cpu_accounting(begin: Begin) -> None:
    """None lives long enough to be read; their CPU time is in that of exited threads."""
    process, pid, _ = begin("short")
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    with closing(LinuxSource(pid)) as source:
        first = source.snapshot()
        process.stdin.write(b"\n")
        while process.stdout.read() is None:
            for m in windows(source, 20):
                assert m.contradiction is None
        whole = measure(first, source.snapshot())
    holds(whole)
    assert whole.unknown == set()
    assert whole.exited_ns > 0
    assert abs(whole.unattributed_ns) <= 0.02 * whole.cpu_ns + 2 * KERNEL_TICK_NS


def test_exec_storm_from_other_threads_is_never_reported_as_exited(begin: Begin) -> None:
    """While a thread executes a program, all others are ended and the main one is a zombie for a moment."""
    _, pid, _ = begin("storm")
    with closing(LinuxSource(pid)) as source:
        executed = sum(len(m.unknown) > 0 for m in windows(source, 1500))
    assert executed > 20


def test_zombie_children_leave_the_figures_unchanged(begin: Begin) -> None:
    """Fifty that their parent does not collect."""
    _, pid, _ = begin("zombies")
    with closing(LinuxSource(pid)) as source:
        for m in windows(source, 5):
            assert m.unknown == set()
            assert len(m.last.roster) == 1


def test_exec_of_a_process_without_a_main_thread_is_null(begin: Begin) -> None:
    """It has a main thread again, with the CPU time of the one that called exec."""
    process, pid, _ = begin("headless", "300")
    assert process.stdin is not None
    assert process.stdout is not None
    with closing(LinuxSource(pid)) as source:
        first = source.snapshot()
        assert len(first.roster) == 2
        process.stdin.write(b"\n")
        assert process.stdout.readline()
        m = measure(first, source.snapshot(parts=Part.DETAIL))
    holds(m)
    assert m.unknown == {0}
    assert m.cpu_ns < 100 * MS
    assert m.last.thread_cpu_ns[0] >= 300 * MS
