"""
Read one process of Linux from ``/proc`` and its CPU clocks.

Facts about the kernel on which this module depends (v6.18; each has a test):

- ``schedstat`` is the run time in ns; for a running thread it is as of the last tick of the scheduler.
  ``clock_gettime`` on the clock of a thread of the calling process brings it up to date first.
- Its second field is the time for which the thread was runnable and did not run. The kernel adds a wait when the thread
  gets a CPU, or is moved to another CPU or control group while it waits. Throttling by a CPU quota counts as waiting.
- The CPU clock of a process is the sum of the run times of its living and its exited threads. Any user may read it for
  any pid in our pid namespace.
- ``st_nlink`` of ``task/`` is 2 + the number of threads. If that is the number of threads held open, and all of them
  can then be read, no thread has started or exited.
"""

import os
import resource
import time
from typing import NamedTuple

from vitalsd.snapshot import Identity, Part, Snapshot
from vitalsd.sources.base import ThreadLook, UnsupportedError
from vitalsd.sources.linux.children import Descendants
from vitalsd.sources.linux.cpu_counters import (
    USER_TICK_NS,
    CommFiles,
    SchedstatFiles,
    StatFiles,
    ThreadClocks,
    ThreadCounter,
    counts_run_times,
    process_clock,
)
from vitalsd.sources.linux.figures import read_figures, read_thread_figures
from vitalsd.sources.linux.machine import MachineReader
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.processes import CLOCK_BOOTTIME, PAGE_BYTES
from vitalsd.sources.linux.procfs import MalformedError
from vitalsd.sources.linux.running_program import RunningProgram
from vitalsd.sources.linux.thread_look import ThreadLooks
from vitalsd.sources.linux.thread_times import ThreadTimes
from vitalsd.sources.linux.threads import ThreadList
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["LinuxSource"]

DECIDE_EVERY_NS = 60_000_000_000
"""
Interval at which the counter is chosen again, ns, because a running kernel may begin to count run times
(kernel.task_delayacct).
"""
ATTEMPTS = 8
"""Attempts to read a snapshot during which the target does not execute a program."""
KEPT_NAMES = 1024
"""Descriptors that stay open for names; a limit, because the kernel holds a page for each."""


class _CpuTimes(NamedTuple):
    """CPU times of one snapshot, ns; they are read one after the other."""

    instant: tuple[int, int, int]
    """Monotonic time, time since boot and wall clock just after the process's clock was read."""
    threads: list[int]
    total_ns: int
    exited_ns: tuple[int, int]
    """Lower and upper bound."""
    waits: list[int] | None
    """Time for which each thread waited for a CPU; ``None``: the kernel does not count it."""
    waited_ns: int
    """Sum of what they grew by since the source was opened."""


class LinuxSource:
    """
    The source of one process on Linux; see `vitalsd.sources.base.Source`.

    Args:
        pid: target; ``None``: this process.
        root: mount point of procfs. One of another pid namespace (a container's ``/host/proc``) is
            read without CPU clocks, because those take pids of our own namespace. ``/proc`` itself must be of our
            own namespace, because a pid would name another process there.
        fd_budget: descriptors that may stay open for threads of another process; the files of other threads are
            opened at each read, which takes three times as long. Default: half of the soft limit.
        program_of: makes `Identity.program`; called when the source is opened and after each exec.

    Raises:
        SourceError: `NoSuchProcessError`, `AccessDeniedError`, `TargetGoneError`, `UnsupportedError` or `KernelError`.
    """

    def __init__(
        self,
        pid: int | None = None,
        *,
        root: str = "/proc",
        fd_budget: int | None = None,
        program_of: ProgramOf = no_program,
    ) -> None:
        own = _own_pid(root)
        same_namespace = own == os.getpid()
        if pid is not None and own and not same_namespace and root == "/proc":
            raise UnsupportedError(
                "/proc is of another pid namespace, where this number is another process's; mount a procfs of our own"
                " there (unshare --mount-proc), or name that one by another path with --proc-root"
            )
        self._pid = pid if pid is not None else own or os.getpid()
        self._is_own = same_namespace and self._pid == os.getpid()
        self._fd_budget = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 if fd_budget is None else fd_budget
        self._times: ThreadTimes | None = None
        self._waited_ns = 0
        """Value of `Snapshot.wait_ns` when `_times` was opened."""
        self._cpu_count = os.cpu_count() or 0  # Not at each snapshot: the C library reads a file of /sys.
        self._decided_ns = 0
        self._files = ProcessFiles(self._pid, root, has_pidfd=same_namespace and not self._is_own)
        # Descriptors of this process belong to the host program: none stays open for a child.
        kept = 0 if self._is_own else self._fd_budget // 4
        self._descendants = Descendants(self._files, has_clocks=same_namespace, fd_budget=kept)
        self._machine = MachineReader(root)
        self._looks = ThreadLooks(self._files.task)
        try:
            self._clock = process_clock(self._pid) if same_namespace else None
            self._process_truncation_ns = 0 if self._clock else 2 * USER_TICK_NS
            self._open_threads()
            self._program = RunningProgram(self._files, program_of, is_own=self._is_own)
        except BaseException:
            self.close()
            raise

    def identity(self) -> Identity:
        """Return the identity as of the last snapshot."""
        return self._program.identity

    def close(self) -> None:
        """Close all files. A second call does nothing."""
        if self._times is not None:
            self._times.threads.close()
        self._descendants.close()
        self._machine.close()
        self._looks.close()
        self._files.close()

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        """Read the counters in up to `ATTEMPTS` attempts; see `vitalsd.sources.base.Source.snapshot`."""
        if self._files.is_closed:
            raise ValueError("the source is closed")
        try:
            for _ in range(ATTEMPTS):
                taken = self._snapshot(parts, names)
                if taken is not None:
                    return taken
            # The target executes one program after the other: the figures are of several, so no measurement spans them.
            self._program.set_executed()
            taken = self._snapshot(parts, names, torn=True)
            self._program.set_executed()
            assert taken is not None
            return taken
        except (OSError, MalformedError) as error:
            raise self._files.translated(error) from None

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """Look at one thread; see `vitalsd.sources.base.Source.look_at`."""
        if self._files.is_closed:
            raise ValueError("the source is closed")
        try:
            return self._looks.look_at(tid, closely=closely)
        except (OSError, MalformedError) as error:
            raise self._files.translated(error) from None

    def restart(self) -> None:
        """Choose the counter again and read all threads. Raises `SourceError`."""
        self._open_threads()

    def _snapshot(self, parts: Part, names: bool, *, torn: bool = False) -> Snapshot | None:
        """Return ``None`` if the threads or the program changed during the reads, unless `torn` allows that."""
        times, program = self._times or self._open_threads(), self._program
        begun_ns = time.monotonic_ns()
        cpu = self._read_times(times)
        monotonic_ns, boottime_ns, wall_ns = cpu.instant

        # Read last: if the descriptor can still be read, pid and clock belonged to the target during all reads.
        image = program.image
        memory = program.look(times.threads.roster, monotonic_ns, cpu.total_ns, closely=Part.THREADS in parts)
        if not times.refresh_list(monotonic_ns, names=names) and not torn:
            return None
        if program.image is not image and not torn:
            return None  # Another thread may have become the main thread since it was read.
        if self._is_miscounted(times, cpu.total_ns, monotonic_ns):
            self._open_threads()
            if not torn:
                return None
        threads, counter = times.threads, times.threads.counter
        program.follow_name(threads.roster)

        warnings: list[str] = []
        if cpu.waits is None:
            warnings.append(
                "wait_percent: this kernel does not count how long a thread waits for a CPU (schedstat): null"
            )
        # First, because what follows may take long, and a rate of the machine is over the time of this snapshot.
        machine = self._machine.read(self._files, monotonic_ns, warnings) if Part.FIGURES in parts else None
        figures = read_figures(self._files, warnings, is_own=self._is_own) if Part.FIGURES in parts else None
        thread_figures = read_thread_figures(threads.stats()) if Part.THREADS in parts else None
        tree = None
        if Part.CHILDREN in parts:
            at, closely = (monotonic_ns, boottime_ns), Part.THREADS in parts
            tree = self._descendants.read(cpu.total_ns, memory.rss * PAGE_BYTES, at, warnings, closely=closely)
        return Snapshot(
            monotonic_ns=monotonic_ns,
            boottime_ns=boottime_ns,
            wall_ns=wall_ns,
            uptime_ns=max(0, boottime_ns - program.start_ns),
            skew_ns=monotonic_ns - begun_ns,
            cpu_ns=cpu.total_ns,
            cpu_grain_ns=self._process_truncation_ns or 1,
            exited_cpu_ns=cpu.exited_ns,
            rss_bytes=memory.rss * PAGE_BYTES,
            vm_bytes=memory.vm * PAGE_BYTES,
            state=program.state,
            image=program.image,
            roster=threads.roster,
            thread_cpu_ns=cpu.threads,
            thread_grain_ns=counter.grain_ns,
            thread_lag_ns=counter.lag_ns,
            thread_wait_ns=cpu.waits,
            wait_ns=None if cpu.waits is None else cpu.waited_ns,
            cpu_count=self._cpu_count,
            source=counter.source,
            figures=figures,
            thread_figures=thread_figures,
            machine=machine,
            tree=tree,
            warnings=tuple(warnings),
        )

    def _read_times(self, times: ThreadTimes) -> _CpuTimes:
        """Read the process's clock and its threads; only the hot ones if that proves the times of the others."""
        instant = 0, 0, 0

        def clock() -> int:
            nonlocal instant
            total_ns = self._total_ns()
            instant = time.monotonic_ns(), time.clock_gettime_ns(CLOCK_BOOTTIME), time.time_ns()
            return total_ns

        counter = times.threads.counter
        before_ns = clock()
        proved = times.read_hot(before_ns, clock) if counter.sums_to_process_clock and self._clock else None
        if proved is not None:
            thread_cpu_ns, total_ns, exited_ns = proved
            return _CpuTimes(instant, thread_cpu_ns, total_ns, (exited_ns, exited_ns), times.wait_ns, times.waited_ns)
        thread_cpu_ns, total_ns = times.read(clock)
        least_ns = before_ns - times.living_ns - len(thread_cpu_ns) * counter.truncation_ns
        most_ns = total_ns - times.living_ns + self._process_truncation_ns
        if least_ns == most_ns:
            times.set_exited_total(total_ns, least_ns)
        return _CpuTimes(instant, thread_cpu_ns, total_ns, (least_ns, most_ns), times.wait_ns, times.waited_ns)

    def _total_ns(self) -> int:
        """Read the CPU time of living and exited threads, ns."""
        if self._clock is None:
            stat = self._files.process_stat()
            return (stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS
        try:
            return time.clock_gettime_ns(self._clock)
        except OSError:  # EINVAL: no such process
            raise ProcessLookupError from None

    def _open_threads(self) -> ThreadTimes:
        """Choose the counter and read all threads with it. Raises `SourceError`."""
        before, self._times = self._times, None
        if before is not None:
            self._waited_ns = before.waited_ns
            before.threads.close()
        self._decided_ns = time.monotonic_ns()
        task = self._files.task
        kept = (
            0 if self._is_own else min(KEPT_NAMES, self._fd_budget // 2)
        )  # Descriptors of this process belong to the host program.
        try:
            threads = ThreadList(task, self._choose_counter(), CommFiles(task, kept))
            self._times = ThreadTimes(threads, self._waited_ns)
        except (OSError, MalformedError) as error:
            raise self._files.translated(error) from None
        return self._times

    def _choose_counter(self) -> ThreadCounter:
        counted = counts_run_times(self._files.task, self._total_ns)
        if self._is_own:
            return ThreadClocks(self._files.task, counts_waits=counted)
        return (SchedstatFiles if counted else StatFiles)(self._files.task, self._fd_budget)

    def _is_miscounted(self, times: ThreadTimes, cpu_ns: int, now_ns: int) -> bool:
        """Return whether to choose the counter again: the kernel stopped or began to count in ``schedstat``."""
        source = times.threads.counter.source
        if source == "schedstat":
            idle = times.living_ns == 0 < cpu_ns
            return idle and not counts_run_times(self._files.task, self._total_ns)
        if source == "stat" and now_ns - self._decided_ns >= DECIDE_EVERY_NS:
            self._decided_ns = now_ns
            return counts_run_times(self._files.task, self._total_ns)
        return False


def _own_pid(root: str) -> int:
    """Return the pid of this process in the pid namespace of the procfs; 0 if it does not exist there."""
    try:
        return int(os.readlink(f"{root}/self"))
    except (OSError, ValueError):
        return 0
