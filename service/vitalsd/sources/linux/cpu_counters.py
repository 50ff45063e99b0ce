"""
Read the CPU times and waits of the threads of a Linux process in one of three ways, and its CPU clock.

`ThreadClocks` is for our own process, `SchedstatFiles` for any other, and `StatFiles` for a kernel without schedstat.
`vitalsd.sources.linux.thread_times` uses them.
"""

import errno
import os
import resource
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import repeat
from typing import Any, Protocol

from vitalsd.sources.linux.procfs import parse_schedstats, parse_stat

__all__ = [
    "GONE",
    "KERNEL_TICK_NS",
    "USER_TICK_NS",
    "CommFiles",
    "Reading",
    "SchedstatFiles",
    "StatFiles",
    "ThreadClocks",
    "ThreadCounter",
    "counts_run_times",
    "first_reserved_fd",
    "process_clock",
    "read_file",
    "reread",
]

USER_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
"""Unit of utime, stime and start times in /proc, ns."""

KERNEL_TICK_NS = round(time.clock_getres(6) * 1e9)
"""Period of the scheduler's tick, ns: the resolution of CLOCK_MONOTONIC_COARSE (6 in linux/time.h)."""

FD_RESERVE = 64
"""Descriptors that are kept free for sockets and short-lived files, for any number of threads."""

GONE = (errno.ESRCH, errno.ENOENT, errno.EINVAL)
"""Errors of the kernel for a thread that has exited; EINVAL is that of a CPU clock."""


CONTENT_BYTES = 4096
"""Bytes of the first read: most files of /proc are shorter. A list of groups or a command line may be longer."""


def read_file(path: str, dir_fd: int) -> bytes:
    """Return the whole content of a procfs file, mostly with one read. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY, dir_fd=dir_fd)
    try:
        content = part = os.read(fd, CONTENT_BYTES)
        while part and len(content) >= CONTENT_BYTES:
            part = os.read(fd, 1 << 20)
            content += part
        return content
    finally:
        os.close(fd)


def reread(fd: int) -> bytes:
    """Return the whole content of an open procfs file. Raises `OSError`."""
    size = CONTENT_BYTES
    while len(content := os.pread(fd, size, 0)) == size:
        size *= 4
    return content


def first_reserved_fd() -> int:
    """Return the lowest descriptor that is not to stay open, because higher ones are kept free for other uses."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit - min(FD_RESERVE, limit // 4)


Reading = Any
"""Undecoded reading of a `ThreadCounter` for one thread; it is decoded only if it differs from the one before."""


class ThreadCounter(Protocol):
    """One way to read the CPU time and the waits of threads. A handle is the result of `open`."""

    source: str
    grain_ns: int
    """Step of the counter, ns; the sum of both steps for a counter that is a sum of two."""
    lag_ns: int
    """Most by which the counter of a running thread may be behind, ns."""
    truncation_ns: int
    """Most by which a reading is too low because the kernel rounds down, ns."""
    sums_to_process_clock: bool
    """Whether the process's CPU clock is the sum of these counters, to the nanosecond."""
    survives_tid_reuse: bool
    """Whether a handle never names another thread, even if the kernel reuses the tid."""
    counts_waits: bool
    """Whether the kernel counts for how long a thread waits for a CPU; if not, every wait is 0."""

    def open(self, tid: int) -> int:
        """Return a handle of a thread. Raises `OSError`."""
        ...

    def close(self, handle: int) -> None:
        """Release a handle."""
        ...

    def read(self, handles: Collection[int]) -> list[Reading]:
        """Return one reading of each thread. Raises `OSError` with an errno in `GONE` if any of them has exited."""
        ...

    def decode(self, handles: Iterable[int], readings: Sequence[Reading]) -> tuple[list[int], list[int]]:
        """
        Return the CPU time in each reading and the wait of its thread, ns; equal readings have the same times.

        Raises:
            OSError: with an errno in `GONE` if a thread has exited and its reading lacks the wait.
        """
        ...


class ThreadClocks:
    """
    The CPU clock of each thread of our own process: ns, as of the moment of the read.

    A clock does not show waits, so `decode` opens ``schedstat`` each time: descriptors of this process belong to the
    host program.

    Args:
        task_fd: descriptor of ``/proc/<pid>/task``.
        counts_waits: whether the kernel counts in ``schedstat``, see `counts_run_times`.
    """

    source = "clock_gettime"
    grain_ns = 1
    lag_ns = 0
    truncation_ns = 0
    sums_to_process_clock = False
    survives_tid_reuse = False

    def __init__(self, task_fd: int, *, counts_waits: bool) -> None:
        self._task_fd = task_fd
        self.counts_waits = counts_waits

    def open(self, tid: int) -> int:
        """Return the id of the thread's CPU clock; the kernel does not check it here."""
        return (~tid << 3) | 6  # CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED, linux/posix-timers_types.h

    def close(self, handle: int) -> None:
        """Do nothing: the id of a clock needs no release."""

    def read(self, handles: Collection[int]) -> list[Reading]:
        """Read each clock, ns. Raises `OSError` with EINVAL if a thread has exited."""
        return list(map(time.clock_gettime_ns, handles))

    def decode(self, handles: Iterable[int], readings: Sequence[Reading]) -> tuple[list[int], list[int]]:
        """Return the readings, which are in ns already, and read each wait. Raises `OSError`, `MalformedError`."""
        if not self.counts_waits:
            return list(readings), [0] * len(readings)
        files = [read_file(f"{~(handle >> 3)}/schedstat", self._task_fd) for handle in handles]
        return list(readings), parse_schedstats(files)[1]


def process_clock(pid: int) -> int | None:
    """
    Return the id of the CPU clock of a process for `time.clock_gettime_ns`; ``None`` if it cannot be read.

    Args:
        pid: in the pid namespace of this process.
    """
    clock_id = (~pid << 3) | 2  # CPUCLOCK_SCHED of a process, linux/posix-timers_types.h
    try:
        time.clock_gettime_ns(clock_id)
    except OSError:
        return None
    return clock_id


def counts_run_times(task_fd: int, total_ns: Callable[[], int]) -> bool:
    """
    Return whether the kernel counts run times in ``schedstat``.

    A kernel that does not has no such file, or "0 0 0" for every thread although the process has used CPU time. A
    thread that has run has more than 0.

    Args:
        task_fd: descriptor of ``/proc/<pid>/task``.
        total_ns: reads the CPU time of the process, ns.

    Raises:
        OSError: a file cannot be read for another reason than the exit of its thread.
    """
    found = False
    for tid in os.listdir(task_fd):
        try:
            if parse_schedstats([read_file(f"{tid}/schedstat", task_fd)])[0][0]:
                return True
            found = True
        except OSError as error:
            if error.errno not in GONE:
                raise
    return found and total_ns() == 0


class _Files:
    """One file per thread, kept open up to a budget; a handle below 0 is -tid, and its file is opened at each read."""

    file: str
    survives_tid_reuse = True

    def __init__(self, task_fd: int, budget: int) -> None:
        self._task_fd = task_fd
        self._budget = budget
        self._highest = first_reserved_fd()
        self._opened_each_time = 0

    def open(self, tid: int) -> int:
        if self._budget > 0:
            try:
                handle = os.open(f"{tid}/{self.file}", os.O_RDONLY, dir_fd=self._task_fd)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._budget = 0
            else:
                # The kernel returns the lowest free descriptor, so a high one means that few are left.
                if handle < self._highest:
                    self._budget -= 1
                    return handle
                os.close(handle)
                self._budget = 0
        self._opened_each_time += 1
        return -tid

    def close(self, handle: int) -> None:
        if handle < 0:
            self._opened_each_time -= 1
        else:
            os.close(handle)
            self._budget += 1

    def contents(self, handles: Collection[int], size: int) -> list[bytes]:
        if not self._opened_each_time:
            return list(map(os.pread, handles, repeat(size), repeat(0)))
        return [
            os.pread(handle, size, 0) if handle >= 0 else read_file(f"{-handle}/{self.file}", self._task_fd)
            for handle in handles
        ]


class SchedstatFiles(_Files):
    """The ``schedstat`` of each thread: ns, as of the last tick of the scheduler."""

    source = file = "schedstat"
    grain_ns = 1
    lag_ns = KERNEL_TICK_NS
    truncation_ns = 0
    sums_to_process_clock = True
    counts_waits = True

    def read(self, handles: Collection[int]) -> list[Reading]:
        """Return the content of each file."""
        return self.contents(handles, 64)

    def decode(self, handles: Iterable[int], readings: Sequence[Reading]) -> tuple[list[int], list[int]]:
        """Return the run time and the wait in each content, ns. Raises `MalformedError`."""
        return parse_schedstats(readings)


class StatFiles(_Files):
    """The ``stat`` of each thread: user and system time, each rounded down to a tick, mostly 10 ms."""

    source = file = "stat"
    grain_ns = 2 * USER_TICK_NS
    lag_ns = KERNEL_TICK_NS
    truncation_ns = 2 * USER_TICK_NS
    sums_to_process_clock = False
    counts_waits = False

    def read(self, handles: Collection[int]) -> list[Reading]:
        """Return user and system time of each thread, added, ns. Raises `MalformedError`."""
        stats = map(parse_stat, self.contents(handles, CONTENT_BYTES))
        return [(stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS for stat in stats]

    def decode(self, handles: Iterable[int], readings: Sequence[Reading]) -> tuple[list[int], list[int]]:
        """Return the readings, which are in ns already, and no waits."""
        return list(readings), [0] * len(readings)


class CommFiles(_Files):
    """The ``comm`` of each thread: its name, which any thread of the process may change."""

    file = "comm"

    def read(self, handles: Collection[int]) -> list[bytes]:
        """Return the contents of the files. Raises `OSError` with an errno in `GONE` if a thread has exited."""
        return self.contents(handles, 64)
