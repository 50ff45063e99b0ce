"""What both macOS sources read beside their counters, over the simulator: waits, children, the machine."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from support.darwin.simulator import SHORT_REPLY, Simulator
from support.sidecars import eventually
from support.workload import ChildWorkload
from vitalsd.snapshot import MEMORY_PRESSURE_LEVELS, Part, ProcessFigures, ProcessTree, Snapshot, measure
from vitalsd.sources.base import Source, TargetGoneError
from vitalsd.sources.darwin.apple_headers import PROC_PIDTASKALLINFO, RUSAGE_INFO_V2, RUSAGE_INFO_V4
from vitalsd.sources.darwin.children import ChildrenReader
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.darwin.mach_source import MachSource
from vitalsd.sources.process_tree import CHILDREN

assert sys.platform != "darwin" or not TYPE_CHECKING

MILLISECOND = 1_000_000
PAGE_BYTES = 16384
BURN = "import time; any(time.process_time() > 0.3 for _ in iter(int, 1)); print(flush=True); input()"
"""Code that uses 0.3 s of CPU time, and then prints a line and waits."""
TREE = Part.FIGURES | Part.CHILDREN


@pytest.fixture(params=["mach", "libproc"])
def open_own(request: pytest.FixtureRequest, simulator: Simulator) -> Callable[..., Source]:
    """Opens this process by either way."""
    if request.param == "mach":
        return lambda: MachSource(lib=simulator.lib)
    return lambda: LibprocSource(os.getpid(), lib=simulator.lib)


class Shell:
    """A process of Python that obeys lines of code, and has children by the names that the code gives them."""

    def __init__(self) -> None:
        code = "import os, subprocess, sys\nfor line in sys.stdin:\n    exec(line)\n    print(flush=True)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def run(self, code: str) -> str:
        """Run a line of code; return what it prints."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def spawn(self, name: str, code: str = "input()") -> int:
        """Start a child that runs `code`, after it has printed a line, and return its pid."""
        program = f"print(flush=True); {code}"
        self.run(
            f"{name} = subprocess.Popen([sys.executable, '-c', {program!r}], stdin=subprocess.PIPE,"
            " stdout=subprocess.PIPE)"
        )
        self.run(f"{name}.stdout.readline()")
        pid = int(self.run(f"print({name}.pid, end='')"))
        return pid

    def close(self) -> None:
        """Kill it and its children. A second call does nothing."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


def figures_of(snapshot: Snapshot) -> ProcessFigures:
    assert snapshot.figures is not None
    return snapshot.figures


def tree_of(source: Source) -> ProcessTree:
    tree = source.snapshot(parts=TREE).tree
    assert tree is not None
    return tree


class TestWaits:
    def test_wait_advances_by_the_wait_of_the_threads(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """And by what this machine makes the threads wait besides; only if the figures are requested."""
        source = open_own()
        first = source.snapshot(parts=Part.FIGURES)
        simulator.wait(os.getpid(), 10**12)
        last = source.snapshot(parts=Part.FIGURES)
        assert first.wait_ns is not None
        assert last.wait_ns is not None
        assert 10**12 - MILLISECOND <= last.wait_ns - first.wait_ns <= 10**12 + 60 * 10**9
        assert measure(first, last).wait_ns == last.wait_ns - first.wait_ns
        assert last.thread_wait_ns is None
        without = source.snapshot()
        assert (without.wait_ns, without.wait_error_ns) == (None, None)

    def test_wait_error_is_a_quantum_per_running_thread(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Ten runnable threads, of which no more run than there are cores."""
        simulator.hide_real_threads()
        simulator.add_thread(1 << 40, run_state=1)
        simulator.add_thread(2 << 40)
        source = open_own()
        assert source.snapshot(parts=Part.FIGURES).wait_error_ns == 10 * MILLISECOND
        for i in range(3, 12):
            simulator.add_thread(i << 40, run_state=1)
        cores = os.cpu_count() or 1
        snapshot = source.snapshot(parts=Part.FIGURES)
        assert snapshot.wait_error_ns == min(10, cores) * 10 * MILLISECOND
        assert snapshot.cpu_count == cores
        simulator.make_realtime(1 << 40)
        assert source.snapshot(parts=Part.FIGURES).wait_error_ns == min(10, cores) * 50 * MILLISECOND

    def test_runnable_time_behind_cpu_time_is_no_negative_wait(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Within its quantum a thread has CPU time that its runnable time lacks."""
        simulator.runnable_lag(10 * MILLISECOND)
        assert open_own().snapshot(parts=Part.FIGURES).wait_ns == 0

    def test_wait_of_a_kernel_without_the_counter_is_null(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Before xnu-6153 the field was there, and 0."""
        simulator.runnable_lag(10**15)
        snapshot = open_own().snapshot(parts=Part.FIGURES)
        assert (snapshot.wait_ns, snapshot.wait_error_ns) == (None, None)

    def test_wait_before_macos_13_comes_from_v4(self, simulator: Simulator, open_own: Callable[..., Source]) -> None:
        simulator.newest_rusage(RUSAGE_INFO_V4)
        assert open_own().snapshot(parts=Part.FIGURES).wait_ns is not None

    def test_cpu_count_of_a_kernel_that_hides_it_is_0(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Which means unknown."""
        simulator.hide_sysctl("hw.ncpu")
        assert open_own().snapshot().cpu_count == 0


class TestProcessFigures:
    def test_reaped_time_is_that_of_children_that_were_waited_for(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        source = open_own()
        before = figures_of(source.snapshot(parts=Part.FIGURES)).reaped_ns
        simulator.reap(os.getpid(), 250 * MILLISECOND)
        after = figures_of(source.snapshot(parts=Part.FIGURES)).reaped_ns
        assert before is not None
        assert after is not None
        assert abs(after - before - 250 * MILLISECOND) <= 1000
        figures = figures_of(source.snapshot(parts=Part.FIGURES))
        assert (figures.anonymous_bytes, figures.swap_bytes) == (None, None)

    def test_rusage_of_another_process_with_many_threads_is_skipped_with_a_warning(
        self, simulator: Simulator, child: ChildWorkload
    ) -> None:
        """The kernel would walk through all of them under a lock, once a second."""
        for i in range(4):
            child.start_thread(f"t{i}")
        source = LibprocSource(child.pid, lib=simulator.lib, walk_limit=3)
        simulator.fault("proc_pid_rusage", errno.EIO, every=1)
        snapshot = source.snapshot(parts=Part.FIGURES)
        figures = figures_of(snapshot)
        assert (figures.footprint_bytes, figures.reaped_ns, snapshot.wait_ns) == (None, None, None)
        assert figures.minor_faults is not None
        assert (
            "footprint, waits, wakeups, energy, children: not read of a process with more than 3 threads"
            in snapshot.warnings
        )


class TestMachine:
    def test_machine_has_cpu_load_memory_swap_and_pressure(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """And of what macOS does not have, null."""
        simulator.memory(free=1000, speculative=200, external=5000, purgeable=30)
        first, last = (open_own().snapshot(parts=Part.FIGURES) for _ in range(2))
        machine = last.machine
        assert machine is not None
        assert first.machine is not None
        assert machine.busy_ns is not None
        assert first.machine.busy_ns is not None
        assert machine.busy_ns >= first.machine.busy_ns > 0
        assert machine.busy_ns % 10_000_000 == 0
        assert machine.load_milli is not None
        assert machine.swap_used_bytes is not None
        # Speculative pages are free ones, and pages of files, and count once.
        assert machine.memory_available_bytes == (1000 + 5000 + 30) * PAGE_BYTES
        assert machine.memory_pressure_level == 0
        assert machine.in_container is False
        assert last.warnings == ()
        absent = ("cpu_pressure_ns", "memory_pressure_ns", "io_pressure_ns", "quota_throttled_ns", "thermal_level")
        assert {getattr(machine, name) for name in absent} == {None}

    def test_busy_time_is_that_of_the_processors(self, simulator: Simulator) -> None:
        """Between two readings of the kernel's own counters around it."""

        def busy() -> int:
            with open("/proc/stat", encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
            return (user + nice + system + irq + softirq) * 10_000_000

        before = busy()
        machine = MachSource(lib=simulator.lib).snapshot(parts=Part.FIGURES).machine
        assert machine is not None
        assert machine.busy_ns is not None
        rounding_ns = (os.cpu_count() or 1) * 5 * 10_000_000
        assert before - rounding_ns <= machine.busy_ns <= busy() + rounding_ns

    @pytest.mark.parametrize(("value", "level"), [(1, "normal"), (2, "warning"), (4, "critical")])
    def test_pressure_level_is_an_index(
        self, simulator: Simulator, open_own: Callable[..., Source], value: int, level: str
    ) -> None:
        simulator.pressure_level(value)
        machine = open_own().snapshot(parts=Part.FIGURES).machine
        assert machine is not None
        assert machine.memory_pressure_level == MEMORY_PRESSURE_LEVELS.index(level)

    def test_pressure_level_unknown_is_null_with_a_warning(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        simulator.pressure_level(3)
        snapshot = open_own().snapshot(parts=Part.FIGURES)
        assert snapshot.machine is not None
        assert snapshot.machine.memory_pressure_level is None
        assert snapshot.warnings == ("machine: memory pressure unknown: the kernel's level is 3, not 1, 2 or 4",)

    @pytest.mark.parametrize(
        ("name", "missing", "what"),
        [
            ("vm.loadavg", {"load_milli"}, "load"),
            ("vm.swapusage", {"swap_used_bytes", "memory_available_bytes"}, "swap and available memory"),
            ("kern.memorystatus_vm_pressure_level", {"memory_pressure_level"}, "memory pressure"),
        ],
    )
    def test_machine_without_a_sysctl_is_null_there_with_one_warning(
        self, simulator: Simulator, open_own: Callable[..., Source], name: str, missing: set[str], what: str
    ) -> None:
        """The other figures are read."""
        simulator.hide_sysctl(name)
        snapshot = open_own().snapshot(parts=Part.FIGURES)
        assert snapshot.machine is not None
        read = {"busy_ns", "load_milli", "memory_available_bytes", "swap_used_bytes", "memory_pressure_level"}
        assert {each for each in read if getattr(snapshot.machine, each) is None} == missing
        assert snapshot.warnings == (
            f"machine: {what} unknown: sysctlbyname({name}) failed: No such file or directory",
        )

    @pytest.mark.parametrize(
        ("function", "code", "missing", "text"),
        [
            ("host_processor_info", 5, "busy_ns", "CPU time unknown: host_processor_info failed: (os/kern) failure"),
            ("host_processor_info", SHORT_REPLY, "busy_ns", "CPU time unknown: host_processor_info answered"),
            ("host_statistics64", 5, "memory_available_bytes", "available memory unknown: host_statistics64 failed"),
            (
                "host_statistics64",
                SHORT_REPLY,
                "memory_available_bytes",
                "available memory unknown: host_statistics64(HOST_VM_INFO64) answered 37 words of 38",
            ),
        ],
    )
    def test_machine_after_a_failed_call_is_null_there_and_owes_nothing(
        self, simulator: Simulator, function: str, code: int, missing: str, text: str
    ) -> None:
        """The `simulator` fixture fails it if the host port or an array is not released."""
        source = MachSource(lib=simulator.lib)
        simulator.fault(function, code)
        snapshot = source.snapshot(parts=Part.FIGURES)
        assert getattr(snapshot.machine, missing) is None
        assert len(snapshot.warnings) == 1
        assert text in snapshot.warnings[0]
        assert source.snapshot(parts=Part.FIGURES).warnings == ()

    def test_machine_without_a_host_port_is_null_there(self, simulator: Simulator) -> None:
        """Whatever needs no port is read."""
        source = MachSource(lib=simulator.lib)
        simulator.fault("mach_host_self", 1, every=1)
        machine = source.snapshot(parts=Part.FIGURES).machine
        assert machine is not None
        assert (machine.busy_ns, machine.memory_available_bytes) == (None, None)
        assert None not in (machine.load_milli, machine.swap_used_bytes, machine.memory_pressure_level)


class TestChildren:
    def test_tree_has_descendants_with_name_memory_and_threads(self, simulator: Simulator, shell: Shell) -> None:
        """By ascending pid, grandchildren too; the target is counted and not listed."""
        first = shell.spawn("first")
        second = shell.spawn("second")
        code = (
            "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'print(flush=True); input()'],"
            " stdin=subprocess.PIPE, stdout=subprocess.PIPE); c.stdout.readline(); print(c.pid, flush=True); input()"
        )
        shell.spawn("parent", code)
        grandchild = int(shell.run("print(parent.stdout.readline().decode().strip(), end='')"))
        snapshot = LibprocSource(shell.pid, lib=simulator.lib).snapshot(parts=TREE)
        tree = snapshot.tree
        assert tree is not None
        assert [child.pid for child in tree.children] == sorted(child.pid for child in tree.children)
        assert {first, second, grandchild} < {child.pid for child in tree.children}
        assert (len(tree.children), tree.process_count) == (4, 5)
        for child in tree.children:
            assert child.name == snapshot_name(simulator, child.pid)
            assert child.thread_count == 1
            assert 0 < child.rss_bytes < tree.rss_bytes
            assert child.found_cpu_ns == child.cpu_ns > 0
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (0, 0, 0)
        assert snapshot.warnings == ()

    def test_child_born_between_two_readings_counts_from_its_birth(self, simulator: Simulator, shell: Shell) -> None:
        source = LibprocSource(shell.pid, lib=simulator.lib)
        tree_of(source)
        shell.spawn("child", BURN)
        shell.run("child.stdout.readline()")
        tree = tree_of(source)
        (child,) = tree.children
        assert child.found_cpu_ns == 0
        assert tree.cpu_ns >= child.cpu_ns >= 300 * MILLISECOND
        assert tree.gaps == 0

    def test_child_that_ended_counts_once(self, simulator: Simulator, shell: Shell) -> None:
        """As a zombie with its final CPU time, and not again when its parent waits for it."""
        source = LibprocSource(shell.pid, lib=simulator.lib)
        tree_of(source)
        pid = shell.spawn("child", BURN)
        shell.run("child.stdout.readline()")
        alive = tree_of(source)
        shell.run("child.kill(); os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)")
        dead = tree_of(source)
        assert pid not in [child.pid for child in dead.children]
        assert dead.process_count == 1
        shell.run("child.wait()")
        reaped = tree_of(source)
        # Linux, on which this runs, books ticks of 10 ms.
        assert alive.cpu_ns <= dead.cpu_ns <= reaped.cpu_ns <= dead.cpu_ns + 20 * MILLISECOND + _own_ns(shell)
        assert reaped.reaped_ns <= 20 * MILLISECOND

    def test_child_that_exits_while_it_is_read_is_no_error(self, simulator: Simulator, shell: Shell) -> None:
        """It is listed and no call finds it: its last row stays until the kernel shows it as a zombie or not at all."""
        source = LibprocSource(shell.pid, lib=simulator.lib)
        tree_of(source)
        pid = shell.spawn("child")
        (child,) = tree_of(source).children
        simulator.fault("proc_pid_rusage", errno.ESRCH, flavor=RUSAGE_INFO_V2, at=2)
        tree = tree_of(source)
        assert (tree.children, tree.gaps) == ((), 0)
        simulator.fault("proc_pidinfo", errno.ESRCH, flavor=PROC_PIDTASKALLINFO, at=3)
        assert tree_of(source).gaps == 0
        again = tree_of(source)
        assert [(each.pid, each.start_key) for each in again.children] == [(pid, child.start_key)]
        assert again.gaps == 0

    def test_storm_of_short_children_is_what_getrusage_says(self, simulator: Simulator, shell: Shell) -> None:
        """No reading sees any of them alive; Linux, on which this runs, books whole ticks of 10 ms."""
        code = (
            "import resource; u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, end='')"
        )
        source = LibprocSource(shell.pid, lib=simulator.lib)
        before, used_before = tree_of(source), float(shell.run(code))
        for _ in range(5):
            shell.run("[subprocess.run([sys.executable, '-S', '-c', '']) for _ in range(10)]")
            after = tree_of(source)
        used_ns = (float(shell.run(code)) - used_before) * 1e9
        assert used_ns > 100 * MILLISECOND
        assert abs(after.reaped_ns - before.reaped_ns - used_ns) <= 20 * MILLISECOND + used_ns / 10
        assert after.gaps == before.gaps + 5

    def test_unwatched_children_count_and_are_a_gap(self, simulator: Simulator, shell: Shell) -> None:
        """They were born and waited for between two readings."""
        source = LibprocSource(shell.pid, lib=simulator.lib)
        before = tree_of(source)
        simulator.reap(shell.pid, 300 * MILLISECOND)
        shell.run("import time; time.sleep(0.5)")  # so that the cores could have used that much
        after = tree_of(source)
        assert after.reaped_ns - before.reaped_ns >= 300 * MILLISECOND - 1000
        assert after.cpu_ns - before.cpu_ns >= 300 * MILLISECOND - 1000
        assert after.gaps == before.gaps + 1

    def test_child_of_another_user_is_a_gap_with_a_warning(self, simulator: Simulator, shell: Shell) -> None:
        """The others are read."""
        source = LibprocSource(shell.pid, lib=simulator.lib)
        shell.spawn("first")
        second = shell.spawn("second")
        simulator.fault("proc_pid_rusage", errno.EPERM, flavor=RUSAGE_INFO_V2, at=2)
        snapshot = source.snapshot(parts=TREE)
        assert snapshot.tree is not None
        assert [child.pid for child in snapshot.tree.children] == [second]
        assert snapshot.tree.gaps == 1
        assert snapshot.warnings == ("children: 1 could not be read, as those of another user are",)

    def test_reused_pid_of_a_child_is_another_child(self, simulator: Simulator, shell: Shell) -> None:
        source = LibprocSource(shell.pid, lib=simulator.lib)
        pid = shell.spawn("child")
        (first,) = tree_of(source).children
        simulator.reuse_pid(pid)
        (second,) = tree_of(source).children
        assert first.pid == second.pid == pid
        assert first.start_key != second.start_key

    def test_tree_of_a_target_that_exited_is_target_gone(self, simulator: Simulator, shell: Shell) -> None:
        source = LibprocSource(shell.pid, lib=simulator.lib)
        tree_of(source)
        shell.close()
        with pytest.raises(TargetGoneError):
            source.snapshot(parts=TREE)

    def test_tree_of_a_target_whose_pid_was_reused_is_no_tree(self, simulator: Simulator, shell: Shell) -> None:
        reader = ChildrenReader(simulator.lib, shell.pid, lambda ticks: ticks, 0)
        assert reader.read([]) is not None
        simulator.reuse_pid(shell.pid)
        with pytest.raises(ProcessLookupError):
            reader.read([])

    def test_tree_refused_is_null_with_a_warning(self, simulator: Simulator, open_own: Callable[..., Source]) -> None:
        """A sandbox may hide all processes."""
        source = open_own()
        simulator.fault("proc_listchildpids", errno.EPERM)
        snapshot = source.snapshot(parts=TREE)
        assert snapshot.tree is None
        assert snapshot.figures is not None
        assert snapshot.warnings == ("children unknown: proc_listchildpids failed: Operation not permitted",)
        assert source.snapshot(parts=TREE).tree is not None

    def test_descendant_whose_parent_ended_is_followed(self, simulator: Simulator, shell: Shell) -> None:
        """Launchd is its parent then, and the source knows it."""
        code = (
            "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'print(flush=True); input()'],"
            " stdin=0, stdout=subprocess.PIPE); c.stdout.readline(); print(c.pid, flush=True); input()"
        )
        parent = shell.spawn("parent", code)
        orphan = int(shell.run("print(parent.stdout.readline().decode().strip(), end='')"))
        source = LibprocSource(shell.pid, lib=simulator.lib)
        assert {child.pid for child in tree_of(source).children} == {parent, orphan}
        shell.run("parent.kill(); parent.wait()")
        for _ in range(2):
            assert [child.pid for child in tree_of(source).children] == [orphan]
        os.kill(orphan, 9)
        assert eventually(lambda: not tree_of(source).children)

    def test_more_children_than_the_limit_are_a_gap_with_a_warning(self, simulator: Simulator, shell: Shell) -> None:
        shell.run(f"many = [subprocess.Popen(['sleep', '1000']) for _ in range({CHILDREN + 1})]")
        snapshot = LibprocSource(shell.pid, lib=simulator.lib).snapshot(parts=TREE)
        shell.run("[each.kill() or each.wait() for each in many]")
        assert snapshot.tree is not None
        assert (len(snapshot.tree.children), snapshot.tree.gaps) == (CHILDREN, 1)
        assert snapshot.warnings == (f"children: there are more than {CHILDREN}; the others are not counted",)

    def test_tree_of_the_own_process_has_its_children(
        self, simulator: Simulator, open_own: Callable[..., Source], child: ChildWorkload
    ) -> None:
        assert child.pid in [each.pid for each in tree_of(open_own()).children]


def snapshot_name(simulator: Simulator, pid: int) -> str:
    """Return the name that a source of the process reads."""
    return LibprocSource(pid, lib=simulator.lib).identity().name


def _own_ns(shell: Shell) -> int:
    """Return an upper bound of the CPU time that the shell itself used to obey."""
    with open(f"/proc/{shell.pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[0])
