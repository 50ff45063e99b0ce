"""The two macOS sources over the simulator: what the contract suite, the same for all sources, cannot ask."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest

from support.darwin.simulator import SHORT_REPLY, Simulator
from support.sidecars import eventually
from support.target import OwnWorkload
from support.workload import ChildWorkload
from vitalsd.snapshot import Part, measure
from vitalsd.sources.base import (
    AccessDeniedError,
    KernelError,
    NoSuchProcessError,
    Source,
    TargetGoneError,
    UnsupportedError,
)
from vitalsd.sources.darwin.apple_headers import (
    MACH_TASK_BASIC_INFO,
    PROC_PIDLISTFDS,
    PROC_PIDTASKALLINFO,
    PROC_PIDTHREADID64INFO,
    PROC_PIDUNIQIDENTIFIERINFO,
    RUSAGE_INFO_V4,
    TASK_ABSOLUTETIME_INFO,
    TASK_VM_INFO,
    THREAD_EXTENDED_INFO,
)
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.darwin.libsystem import load
from vitalsd.sources.darwin.mach_source import MachSource
from vitalsd.sources.darwin.processes import list_processes, open_process
from vitalsd.sources.linux.processes import CLOCK_BOOTTIME
from vitalsd.sources.linux.source import LinuxSource
from vitalsd.sources.programs import program_digest

PROGRAM_OF = partial(program_digest, b"k" * 32)

assert sys.platform != "darwin" or not TYPE_CHECKING

KERN_FAILURE = 5
KERN_TERMINATED = 37
HOUR_NS = 3600 * 10**9


@pytest.fixture(params=["mach", "libproc"])
def open_own(request: pytest.FixtureRequest, simulator: Simulator) -> Callable[..., Source]:
    """Opens this process by either way."""
    if request.param == "mach":
        return lambda **arguments: MachSource(lib=simulator.lib, **arguments)
    return lambda **arguments: LibprocSource(os.getpid(), lib=simulator.lib, **arguments)


def executed(simulator: Simulator, child: subprocess.Popen[bytes]) -> None:
    """Popen returns while it is still inside exec. A Mac's kernel waits for that, Linux does not."""
    eventually(lambda: simulator.lib.proc.command_line(child.pid)[1][1:])


class TestOpening:
    def test_open_source_uses_mach_for_the_own_process_and_libproc_for_others(
        self, simulator: Simulator, child: ChildWorkload
    ) -> None:
        """By pid; none means this process."""
        assert isinstance(open_process(lib=simulator.lib), MachSource)
        assert isinstance(open_process(os.getpid(), lib=simulator.lib), MachSource)
        assert isinstance(open_process(child.pid, lib=simulator.lib), LibprocSource)

    @pytest.mark.parametrize("pid", [2**30, 0, -1, 2**31, 2**32 + 1, 2**64])
    def test_open_source_of_an_unused_pid_is_no_such_process(self, simulator: Simulator, pid: int) -> None:
        """Also one that 32 bits would turn into somebody's."""
        with pytest.raises(NoSuchProcessError, match=f"no process has pid {pid}"):
            open_process(pid, lib=simulator.lib)

    def test_open_source_of_another_users_process_is_access_denied(
        self, simulator: Simulator, child: ChildWorkload
    ) -> None:
        """`AccessDeniedError`, with the call and why."""
        simulator.caller_euid(os.geteuid() + 12345)
        simulator.fault("proc_pidinfo", 0)
        with pytest.raises(
            AccessDeniedError, match=rf"process {child.pid} belongs to another user.*PROC_PIDTASKALLINFO"
        ):
            open_process(child.pid, lib=simulator.lib)

    def test_open_source_of_a_zombie_is_target_gone(self, simulator: Simulator, child: ChildWorkload) -> None:
        """`TargetGoneError`, which says what it waits for."""
        child.kill()
        with pytest.raises(TargetGoneError, match="zombie"):
            open_process(child.pid, lib=simulator.lib)
        child.reap()
        with pytest.raises(NoSuchProcessError):
            open_process(child.pid, lib=simulator.lib)

    def test_open_source_without_the_flavor_is_unsupported(self, simulator: Simulator, child: ChildWorkload) -> None:
        """`UnsupportedError`, with the call and the errno."""
        simulator.fault("proc_pidinfo", errno.EINVAL, flavor=PROC_PIDTASKALLINFO)
        with pytest.raises(UnsupportedError, match=rf"proc_pidinfo\(PROC_PIDTASKALLINFO\).*\({errno.EINVAL}\)"):
            open_process(child.pid, lib=simulator.lib)


class TestFailures:
    """No call may fail unnoticed: an error with its name and code, and nothing that is owed."""

    @pytest.mark.parametrize(
        ("function", "flavor", "code", "text"),
        [
            ("task_threads", -1, 6, "task_threads failed: (os/kern) resource shortage (0x6)"),
            (
                "task_info",
                TASK_ABSOLUTETIME_INFO,
                4,
                "TASK_ABSOLUTETIME_INFO: task_info failed: (os/kern) invalid argument",
            ),
            (
                "task_info",
                TASK_ABSOLUTETIME_INFO,
                SHORT_REPLY,
                "TASK_ABSOLUTETIME_INFO: task_info answered 7 words of 8",
            ),
            ("task_info", MACH_TASK_BASIC_INFO, 5, "MACH_TASK_BASIC_INFO: task_info failed: (os/kern) failure (0x5)"),
            ("task_info", MACH_TASK_BASIC_INFO, SHORT_REPLY, "task_info answered 11 words of 12"),
            (
                "thread_info",
                THREAD_EXTENDED_INFO,
                5,
                "thread_info(THREAD_EXTENDED_INFO) failed: (os/kern) failure (0x5)",
            ),
            (
                "thread_info",
                THREAD_EXTENDED_INFO,
                SHORT_REPLY,
                "thread_info(THREAD_EXTENDED_INFO) answered 27 words of 28",
            ),
        ],
    )
    def test_mach_source_after_a_failed_call_recovers(
        self, simulator: Simulator, function: str, flavor: int, code: int, text: str
    ) -> None:
        """Our own process; the next snapshot is whole again."""
        source = MachSource(lib=simulator.lib)
        simulator.fault(function, code, flavor=flavor)
        with pytest.raises(KernelError, match=re.escape(text)):
            source.snapshot()
        assert os.getpid() in source.snapshot().roster.tids

    @pytest.mark.parametrize(
        ("flavor", "code", "error", "text"),
        [
            (28, errno.EINVAL, UnsupportedError, "proc_pidinfo(PROC_PIDLISTTHREADIDS) failed: Invalid argument"),
            (28, errno.EPERM, AccessDeniedError, "proc_pidinfo(PROC_PIDLISTTHREADIDS) failed: Operation not permitted"),
            (28, errno.ESRCH, TargetGoneError, "has exited"),
            (
                PROC_PIDTASKALLINFO,
                SHORT_REPLY,
                KernelError,
                "proc_pidinfo(PROC_PIDTASKALLINFO) answered 228 bytes of 232",
            ),
            (
                PROC_PIDTASKALLINFO,
                errno.ENOMEM,
                KernelError,
                "proc_pidinfo(PROC_PIDTASKALLINFO) failed: Cannot allocate",
            ),
            (
                PROC_PIDTHREADID64INFO,
                SHORT_REPLY,
                KernelError,
                "proc_pidinfo(PROC_PIDTHREADID64INFO) answered 108 bytes",
            ),
            (PROC_PIDTHREADID64INFO, errno.EPERM, AccessDeniedError, "proc_pidinfo(PROC_PIDTHREADID64INFO) failed"),
            (PROC_PIDUNIQIDENTIFIERINFO, errno.ESRCH, TargetGoneError, "has exited"),
        ],
    )
    def test_libproc_source_after_a_failed_call_recovers(
        self, simulator: Simulator, child: ChildWorkload, flavor: int, code: int, error: type[Exception], text: str
    ) -> None:
        """Another process; the next snapshot is whole again."""
        source = LibprocSource(child.pid, lib=simulator.lib)
        simulator.fault("proc_pidinfo", code, flavor=flavor, every=1)
        with pytest.raises(error, match=re.escape(text)):
            source.snapshot()
        simulator.clear_faults()
        assert child.pid in source.snapshot().roster.tids

    def test_snapshot_with_an_empty_thread_list_reads_it_again(self, simulator: Simulator) -> None:
        """Whoever asks is alive, so the list is made again, and such an answer is not given in the end."""
        simulator.hide_real_threads()
        simulator.add_thread(1 << 40)
        source = MachSource(lib=simulator.lib)
        simulator.fault("thread_info", KERN_TERMINATED)
        assert source.snapshot().roster.tids == (1 << 40,)
        simulator.fault("thread_info", KERN_TERMINATED, every=1)
        with pytest.raises(KernelError, match="none of its threads alive"):
            source.snapshot()

    def test_mach_source_in_a_forked_child_is_refused(self, simulator: Simulator) -> None:
        """The task port names whoever asks, so the numbers would be the child's."""
        source = MachSource(lib=simulator.lib)
        child = os.fork()
        if child == 0:
            try:
                source.snapshot()
            except TargetGoneError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert source.snapshot().roster.tids


class TestBooks:
    @pytest.mark.parametrize("reap_delay", [0, 1, 3])
    def test_cpu_accounting_balances_during_late_reaping(
        self, simulator: Simulator, open_own: Callable[..., Source], threads: OwnWorkload, reap_delay: int
    ) -> None:
        """
        A thread's whole life is counted once, in the window it was lived in.

        Not when the kernel gets to reap it: a thread that burnt a lot earlier must not appear as burnt now.
        """
        simulator.reap_delay(reap_delay)
        source = open_own()
        for _ in range(4):
            tid = threads.start_thread("brief")
            threads.burn(tid, 80_000_000)
            first = source.snapshot()
            used_ns = threads.burn(tid, 20_000_000)
            threads.end_thread(tid)
            last = source.snapshot()
            m = measure(first, last)
            assert tid not in last.roster.tids
            assert used_ns - 5_000_000 <= m.exited_ns <= used_ns + 25_000_000
            assert abs(m.unattributed_ns) <= 25_000_000
            for _ in range(4):
                first, last = last, source.snapshot()
                m = measure(first, last)
                assert m.exited_ns <= 10_000_000
                assert not any("backwards" in warning for warning in m.warnings)

    def test_exited_cpu_time_without_dying_threads_is_exact(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """One call tells the total and the living, so both bounds are one number."""
        low, high = open_own().snapshot().exited_cpu_ns
        assert low == high

    def test_snapshot_of_a_busy_process_includes_living_threads(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """What MACH_TASK_BASIC_INFO would say: its times leave living threads out."""
        source = open_own()
        first = source.snapshot()
        begun = time.thread_time_ns()
        while time.thread_time_ns() - begun < 50_000_000:
            pass
        assert measure(first, source.snapshot()).cpu_ns >= 50_000_000

    def test_snapshot_excludes_dying_threads_of_every_kind(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """However they are shown: no port, a dead one, inactive, detached, or halted."""
        simulator.reap_delay(100)
        for shown_as in range(4):
            simulator.add_thread((shown_as + 1) << 40, user_ns=1_000_000)
            simulator.end_thread((shown_as + 1) << 40, shown_as=shown_as)
        simulator.add_thread(9 << 40, user_ns=1_000_000)
        snapshot = open_own().snapshot()
        assert [tid for tid in snapshot.roster.tids if tid >> 40] == [9 << 40]


class TestThreads:
    def test_snapshot_thread_ids_are_64_bits_and_sorted(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """The kernel lists threads in no promised order."""
        for tid in (2**63 + 5, 2**40, 2**52 + 1):
            simulator.add_thread(tid, user_ns=tid % 1000 * 1000, name=str(tid).encode())
        snapshot = open_own().snapshot()
        assert snapshot.roster.tids[-3:] == (2**40, 2**52 + 1, 2**63 + 5)
        assert snapshot.roster.names[-3:] == (str(2**40), str(2**52 + 1), str(2**63 + 5))
        assert snapshot.thread_cpu_ns[-1] == (2**63 + 5) % 1000 * 1000

    @pytest.mark.parametrize(
        ("raw", "name"),
        [
            (b"", ""),
            (b"com.apple.main-thread", "com.apple.main-thread"),
            ("décodeur vidéo".encode(), "décodeur vidéo"),
            (b"x" * 63, "x" * 63),
            # A name of Python is cut to 63 bytes, in the middle of a character if need be.
            (b"x" * 62 + "é".encode()[:1], "x" * 62 + "\\xc3"),
            (b"\xff\xfe", "\\xff\\xfe"),
        ],
    )
    def test_thread_names_with_invalid_utf8_stay_distinct(
        self, simulator: Simulator, open_own: Callable[..., Source], raw: bytes, name: str
    ) -> None:
        """As UTF-8; other bytes as they are, so that no two names fall together."""
        simulator.hide_real_threads()
        simulator.add_thread(1 << 40, name=raw)
        assert open_own().snapshot().roster.names == (name,)

    def test_snapshot_thread_id_equals_the_native_id(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """threading.get_native_id()."""
        assert threading.get_native_id() in open_own().snapshot().roster.tids

    def test_thread_state_unknown_is_null(self, simulator: Simulator, open_own: Callable[..., Source]) -> None:
        """And one that no header names is null, not a number."""
        for i, state in enumerate((1, 2, 3, 4, 77)):
            simulator.add_thread((i + 1) << 40, run_state=state)
        snapshot = open_own().snapshot(parts=Part.DETAIL)
        assert snapshot.thread_figures is not None
        assert snapshot.thread_figures.states[-5:] == ["running", "stopped", "waiting", "uninterruptible", None]

    def test_snapshot_lag_with_a_realtime_thread_is_50_ms(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """10 ms, and 50 ms as soon as one thread has a time constraint policy."""
        simulator.add_thread(1 << 40)
        source = open_own()
        assert source.snapshot().thread_lag_ns == 10_000_000
        simulator.make_realtime(1 << 40)
        assert source.snapshot().thread_lag_ns == 50_000_000

    def test_snapshot_of_more_threads_than_the_buffer_grows_it(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Buffers grow; columns stay aligned."""
        source = open_own()
        source.snapshot()
        simulator.hide_real_threads()
        for number in (50, 500, 1500):
            for i in range(number):
                simulator.add_thread((number << 32) + i, user_ns=i * 1000, name=f"t{i}".encode())
            # The kernel gives at most ten more than there were when it was last asked.
            source.snapshot()
            snapshot = source.snapshot()
            at = snapshot.roster.tids.index((number << 32) + 49)
            assert (snapshot.roster.names[at], snapshot.thread_cpu_ns[at]) == ("t49", 49_000)
        assert len(snapshot.roster) == 2050 + sum(tid < 2**32 for tid in snapshot.roster.tids)

    def test_snapshot_beyond_2048_threads_reads_a_part_with_a_warning(self, simulator: Simulator) -> None:
        """Those that run are read each time, the others in turn, and the answer says so."""
        simulator.hide_real_threads()
        tids = [(1 << 40) + i for i in range(100)]
        for tid in tids:
            simulator.add_thread(tid, user_ns=1000)
        simulator.fault("proc_pidinfo", 0, flavor=PROC_PIDTHREADID64INFO)
        source = LibprocSource(os.getpid(), lib=simulator.lib, walk_limit=20)
        first = source.snapshot()
        assert list(first.roster.tids) == tids
        busy, late = tids[50], tids[90]
        seen_late = 0
        for i in range(1, 12):
            simulator.advance_thread(busy, user_ns=1_000_000)
            if i == 1:
                simulator.advance_thread(late, user_ns=7_000_000)
            snapshot = source.snapshot()
            assert list(snapshot.roster.tids) == tids
            assert any(text.startswith("threads: 100 of them; 20 are read per snapshot") for text in snapshot.warnings)
            if i > 6:
                # By then its turn has come once, and a thread that runs is read in every snapshot.
                assert snapshot.thread_cpu_ns[50] == 1000 + i * 1_000_000
            seen_late += snapshot.thread_cpu_ns[90] == 7_001_000
        assert seen_late >= 5
        simulator.end_thread(tids[3], shown_as=0)
        simulator.add_thread(tids[-1] + 1, user_ns=2000)
        snapshot = source.snapshot()
        snapshot = source.snapshot()
        assert list(snapshot.roster.tids) == sorted({*tids, tids[-1] + 1} - {tids[3]})

    def test_snapshot_up_to_2048_threads_has_no_warning(self, simulator: Simulator) -> None:
        """Every thread is read."""
        assert LibprocSource(os.getpid(), lib=simulator.lib).snapshot().warnings == ()


class TestIdentity:
    def test_snapshot_of_a_reused_pid_is_target_gone(self, simulator: Simulator, child: ChildWorkload) -> None:
        """The start time in the very reply that has the numbers differs."""
        source = LibprocSource(child.pid, lib=simulator.lib)
        source.snapshot()
        simulator.reuse_pid(child.pid)
        for _ in range(2):
            with pytest.raises(TargetGoneError, match="its pid belongs to another process now"):
                source.snapshot()
        assert LibprocSource(child.pid, lib=simulator.lib).identity().start_id != source.identity().start_id

    def test_snapshot_after_exec_has_another_identity_version(self, simulator: Simulator, child: ChildWorkload) -> None:
        """By the version of the identity; the process stays the same."""
        source = LibprocSource(child.pid, lib=simulator.lib)
        first = source.snapshot()
        simulator.exec(child.pid)
        last = source.snapshot()
        assert first.image != last.image
        assert any("executed another program" in text for text in measure(first, last).warnings)

    def test_snapshot_after_exec_of_a_real_program_has_its_name(self, simulator: Simulator) -> None:
        """And what was read from then on is of the new one."""
        code = "import os; os.read(0, 1); os.execv('/bin/cat', ['cat'])"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            source = LibprocSource(child.pid, lib=simulator.lib)
            first = source.snapshot()
            child.stdin.write(b"\nhello\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"hello\n"
            last = source.snapshot()
            assert first.image != last.image
            assert last.roster.names == ("",)  # no program names its main thread by itself
            assert source.identity().name == "cat"
            child.stdin.close()

    def test_program_of_two_scripts_of_one_interpreter_differs(self, simulator: Simulator) -> None:
        """As Linux tells them, from the process itself and from another one."""
        pid = os.getpid()
        own = MachSource(lib=simulator.lib, program_of=PROGRAM_OF).identity().program
        assert own == LibprocSource(pid, lib=simulator.lib, program_of=PROGRAM_OF).identity().program
        assert own == LinuxSource(program_of=PROGRAM_OF).identity().program != ""
        with subprocess.Popen([sys.executable, "-c", "input()", "x"], stdin=subprocess.PIPE) as child:
            executed(simulator, child)
            assert LibprocSource(child.pid, lib=simulator.lib, program_of=PROGRAM_OF).identity().program not in (
                "",
                own,
            )
            child.kill()

    def test_program_after_exec_of_another_script_differs(self, simulator: Simulator) -> None:
        """After exec the name is the same and the script is not; one that was not told at once is asked for again."""
        code = "import os, sys; sys.stdin.readline(); os.execv(sys.executable, [sys.executable, '-c', 'input()'])"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
            assert child.stdin is not None
            executed(simulator, child)
            source = LibprocSource(child.pid, lib=simulator.lib, program_of=PROGRAM_OF)
            image, before = source.snapshot().image, source.identity()
            simulator.fault("sysctl", errno.EINVAL)
            child.stdin.write(b"\n")
            child.stdin.flush()
            eventually(lambda: source.snapshot().image != image)
            assert source.identity() == before._replace(program="")
            source.snapshot()
            after = source.identity()
            assert after == before._replace(program=after.program)
            assert after.program not in ("", before.program)
            child.kill()

    def test_exec_without_identity_versions_is_detected_by_name(
        self, simulator: Simulator, child: ChildWorkload
    ) -> None:
        """The flavor is private: without it the name has to tell one program from the next."""
        source = LibprocSource(child.pid, lib=simulator.lib)
        simulator.fault("proc_pidinfo", errno.EINVAL, flavor=PROC_PIDUNIQIDENTIFIERINFO)
        first, last = source.snapshot(), source.snapshot()
        assert first.image == last.image == (source.identity().name,)

    def test_snapshot_inside_exec_lists_threads_again(self, simulator: Simulator, child: ChildWorkload) -> None:
        """All threads of a list made just before it are gone: the list is made again."""
        source = LibprocSource(child.pid, lib=simulator.lib)
        simulator.fault("proc_pidinfo", errno.ESRCH, flavor=PROC_PIDTHREADID64INFO)
        assert source.snapshot().roster.tids == (child.pid,)
        simulator.clear_faults()
        simulator.fault("proc_pidinfo", errno.ESRCH, flavor=PROC_PIDTHREADID64INFO, every=1)
        with pytest.raises(KernelError, match="none of its threads could be read"):
            source.snapshot()


class TestClocks:
    def test_uptime_equals_the_age_of_the_process(self, simulator: Simulator, child: ChildWorkload) -> None:
        """To the tick of 10 ms to which Linux, behind the simulator, knows the start."""
        with open(f"/proc/{child.pid}/stat", encoding="utf-8") as file:
            start_ns = int(file.read().rpartition(")")[2].split()[19]) * 10_000_000
        before = time.clock_gettime_ns(CLOCK_BOOTTIME) - start_ns
        uptime_ns = LibprocSource(child.pid, lib=simulator.lib).snapshot().uptime_ns
        after = time.clock_gettime_ns(CLOCK_BOOTTIME) - start_ns
        assert before - 1_000_000 <= uptime_ns <= after + 1_000_000

    @pytest.mark.parametrize("step_ns", [HOUR_NS, -HOUR_NS, 10 * 365 * 24 * HOUR_NS])
    def test_uptime_after_a_wall_clock_step_is_unchanged(
        self, simulator: Simulator, open_own: Callable[..., Source], step_ns: int
    ) -> None:
        """Neither before the source is opened, nor while it is open."""
        true_ns = open_own().snapshot().uptime_ns
        clock = [0]
        source = open_own(wall_clock=lambda: time.time_ns() + clock[0])
        first = source.snapshot()
        clock[0] = step_ns
        last = source.snapshot()
        assert true_ns <= first.uptime_ns <= last.uptime_ns <= true_ns + 60 * 10**9
        opened_later = open_own(wall_clock=lambda: time.time_ns() + clock[0]).snapshot()
        assert last.uptime_ns - 1_000_000 <= opened_later.uptime_ns <= true_ns + 60 * 10**9

    def test_uptime_without_rusage_comes_from_the_wall_clock(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """A sandbox may hide it. Nobody is older than the machine is up, whatever the clock says."""
        true_ns = open_own().snapshot().uptime_ns
        simulator.fault("proc_pid_rusage", errno.EPERM, every=1)
        assert true_ns <= open_own().snapshot().uptime_ns <= true_ns + 60 * 10**9
        oldest = open_own(wall_clock=lambda: time.time_ns() + 10**6 * HOUR_NS).snapshot()
        assert oldest.uptime_ns <= oldest.boottime_ns

    def test_uptime_includes_sleep_and_the_rate_does_not(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """It is in the uptime and not in the rate: the window is the time awake."""
        source = open_own()
        first = source.snapshot()
        simulator.sleep(HOUR_NS)
        last = source.snapshot()
        assert last.uptime_ns - first.uptime_ns >= HOUR_NS
        m = measure(first, last)
        assert abs(m.suspended_ns - HOUR_NS) < 10**9
        assert m.elapsed_ns < 60 * 10**9

    def test_uptime_includes_sleep_before_opening(self, simulator: Simulator, open_own: Callable[..., Source]) -> None:
        """The wall clock tells how much of it came after the start, as far as the machine did sleep."""
        before_ns = open_own().snapshot().uptime_ns
        simulator.sleep(HOUR_NS)
        uptime_ns = open_own(wall_clock=lambda: time.time_ns() + HOUR_NS).snapshot().uptime_ns
        assert before_ns + HOUR_NS <= uptime_ns <= before_ns + HOUR_NS + 60 * 10**9
        too_far = open_own(wall_clock=lambda: time.time_ns() + 5 * HOUR_NS).snapshot().uptime_ns
        assert before_ns + HOUR_NS <= too_far <= before_ns + HOUR_NS + 60 * 10**9


class TestTicks:
    def test_cpu_time_under_rosetta_uses_native_ticks(self, simulator: Simulator) -> None:
        """A translated process is told a timebase of 1/1 while the kernel's ticks stay: 41.67 times too low."""
        simulator.rosetta()
        translated = load(simulator.path)
        source = MachSource(lib=translated)
        before = time.process_time_ns()
        snapshot = source.snapshot()
        assert before - 1000 <= snapshot.cpu_ns <= time.process_time_ns()
        assert snapshot.warnings == ()
        assert abs(snapshot.boottime_ns - time.clock_gettime_ns(CLOCK_BOOTTIME)) < 10**9
        assert snapshot.uptime_ns < 24 * HOUR_NS

    def test_tick_frequency_that_disagrees_with_getrusage_is_replaced_with_a_warning(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """getrusage, converted by the kernel, disagrees by 41.67: the other scale is taken, and said."""
        simulator.state_tick_frequency(1_000_000_000)
        before = time.process_time_ns()
        snapshot = open_own().snapshot()
        assert before - 1000 <= snapshot.cpu_ns <= time.process_time_ns()
        assert snapshot.warnings == (
            "hw.tbfrequency says 1000000000 and getrusage agrees with 24000000 ticks per second",
        )

    def test_tick_frequency_of_nonsense_is_replaced(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Zero or nonsense: the scale that getrusage agrees with."""
        simulator.state_tick_frequency(3)
        assert "24000000" in open_own().snapshot().warnings[0]

    def test_tick_frequency_missing_is_unsupported(self, simulator: Simulator, open_own: Callable[..., Source]) -> None:
        """`UnsupportedError`, with the name of the variable."""
        simulator.state_tick_frequency(0)
        with pytest.raises(UnsupportedError, match=r"sysctlbyname\(hw\.tbfrequency\)"):
            open_own()


class TestProcessFigures:
    def test_extras_on_macos_have_footprint_and_energy_and_no_swap(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Footprint, wakeups, energy and time on performance cores; no swap, which is Linux's."""
        figures = open_own().snapshot(parts=Part.DETAIL).figures
        assert figures is not None
        assert figures.footprint_bytes
        assert figures.energy_nj
        assert figures.user_ns is not None
        assert figures.system_ns is not None
        assert figures.p_core_ns is not None
        assert 0 < figures.p_core_ns <= figures.user_ns + figures.system_ns
        assert None not in (figures.idle_wakeups, figures.interrupt_wakeups, figures.minor_faults, figures.major_faults)
        assert figures.swap_bytes is None
        assert figures.open_fds == len(os.listdir("/proc/self/fd"))

    def test_performance_core_share_with_one_core_level_is_null(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """An Intel Mac has one level; null, not 0."""
        simulator.perf_levels(1)
        figures = open_own().snapshot(parts=Part.DETAIL).figures
        assert figures is not None
        assert figures.p_core_ns is None

    def test_extras_before_macos_13_use_rusage_v4(self, simulator: Simulator, open_own: Callable[..., Source]) -> None:
        """Before macOS 13 there is no V6: what V4 has is there, the rest null."""
        simulator.newest_rusage(RUSAGE_INFO_V4)
        figures = open_own().snapshot(parts=Part.DETAIL).figures
        assert figures is not None
        assert figures.footprint_bytes
        assert figures.interrupt_wakeups is not None
        assert (figures.energy_nj, figures.p_core_ns) == (None, None)

    def test_footprint_without_vm_info_comes_from_rusage_or_is_null(self, simulator: Simulator) -> None:
        """TASK_VM_INFO may fail: the same ledger is in proc_pid_rusage; without either it is null, and said."""
        source = MachSource(lib=simulator.lib)
        simulator.fault("task_info", KERN_FAILURE, flavor=TASK_VM_INFO, every=1)
        figures = source.snapshot(parts=Part.DETAIL).figures
        assert figures is not None
        assert figures.footprint_bytes
        simulator.fault("proc_pid_rusage", errno.EPERM, every=1)
        snapshot = source.snapshot(parts=Part.DETAIL)
        assert snapshot.figures is not None
        assert (snapshot.figures.footprint_bytes, snapshot.figures.interrupt_wakeups) == (None, None)
        assert snapshot.warnings == (
            "footprint, waits, wakeups, energy, children: proc_pid_rusage failed: Operation not permitted",
        )
        assert snapshot.rss_bytes > 0

    def test_open_descriptors_refused_are_null_with_a_warning(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """Null, and said."""
        source = open_own()
        simulator.fault("proc_pidinfo", errno.EPERM, flavor=PROC_PIDLISTFDS)
        snapshot = source.snapshot(parts=Part.DETAIL)
        assert snapshot.figures is not None
        assert snapshot.figures.open_fds is None
        assert snapshot.warnings == ("open_fds: proc_pidinfo(PROC_PIDLISTFDS) failed: Operation not permitted",)

    def test_open_descriptors_beyond_the_buffer_are_counted(
        self, simulator: Simulator, open_own: Callable[..., Source]
    ) -> None:
        """A buffer that comes back full is not believed."""
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
        try:
            figures = open_own().snapshot(parts=Part.DETAIL).figures
            assert figures is not None
            assert figures.open_fds == len(os.listdir("/proc/self/fd"))
        finally:
            for fd in held:
                os.close(fd)


class TestProcessList:
    def test_process_list_has_name_start_cpu_memory_and_threads(
        self, simulator: Simulator, child: ChildWorkload
    ) -> None:
        """Each with its name, start, CPU time, memory and threads, by ascending pid."""
        tid = child.start_thread("worker")
        used_ns = child.burn(tid, 30_000_000)
        entries = list(list_processes(simulator.lib))
        assert [entry.pid for entry in entries] == sorted(entry.pid for entry in entries)
        (entry,) = (entry for entry in entries if entry.pid == child.pid)
        source = LibprocSource(child.pid, lib=simulator.lib)
        assert (entry.name, entry.started_unix_ns) == (source.identity().name, source.identity().started_unix_ns)
        assert entry.name in entry.names
        assert entry.cpu_ns >= used_ns - 10_000_000
        assert entry.rss_bytes > 0
        assert entry.thread_count == 2
        assert entry.uids == {os.geteuid()}

    def test_process_list_excludes_other_users_and_zombies(self, simulator: Simulator, child: ChildWorkload) -> None:
        """They cannot be sampled; the list goes on."""
        child.kill()
        assert child.pid not in [entry.pid for entry in list_processes(simulator.lib)]
        simulator.caller_euid(os.geteuid())
        assert os.getpid() in [entry.pid for entry in list_processes(simulator.lib)]
