"""
Three ways to read how long the threads of a Linux process ran, and its own clock.

`ThreadClocks` for our own process, `SchedstatFiles` for any other, `StatFiles` on a kernel without
schedstat. `vitalsd.sources.linux.thread_times` reads by them.
"""

import errno
import os
import resource
import time
from collections.abc import Callable, Collection, Sequence
from itertools import repeat
from typing import Any, Protocol

from vitalsd.sources.linux.procfs import parse_run_times, parse_stat

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
    "process_clock",
    "read_file",
    "reread",
]

USER_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
"""Unit of utime, stime and start times in /proc, ns."""

KERNEL_TICK_NS = round(time.clock_getres(6) * 1e9)
"""Period of the scheduler's tick, ns: the resolution of CLOCK_MONOTONIC_COARSE (6 in linux/time.h)."""

FD_RESERVE = 64
"""Descriptors left to sockets and to files that are opened for a moment, however many threads the targets have."""

GONE = (errno.ESRCH, errno.ENOENT, errno.EINVAL)
"""How the kernel says that a thread has exited; EINVAL is the CPU clock's way."""


CONTENT_BYTES = 4096
"""More than most files of /proc have. A list of groups or a command line may be longer."""


def read_file(path: str, dir_fd: int) -> bytes:
    """Return the whole of a procfs file; most are read at once. Raises `OSError`."""
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
    """Return the whole of a procfs file that is held open. Raises `OSError`."""
    size = CONTENT_BYTES
    while len(content := os.pread(fd, size, 0)) == size:
        size *= 4
    return content


Reading = Any
"""What a `ThreadCounter` read of a thread: compared with the one before, and only looked into if it is another."""


class ThreadCounter(Protocol):
    """One way to read the CPU time of threads. A handle is whatever `open` returned."""

    source: str
    grain_ns: int
    """Step of the counter; of one that is the sum of two, of both."""
    lag_ns: int
    """How far behind the counter of a running thread may be."""
    cut_ns: int
    """How much a reading may be too low because the kernel rounds down."""
    provable: bool
    """Equal, to the nanosecond, to what the process's CPU clock sums up."""
    bound: bool
    """A handle can never name another thread, even if the tid is given away again."""

    def open(self, tid: int) -> int: ...
    def close(self, handle: int) -> None: ...

    def read(self, handles: Collection[int]) -> list[Reading]:
        """One reading of each. Raises `OSError` with an errno of `GONE` if any of them has exited."""
        ...

    def cpu_ns(self, readings: Sequence[Reading]) -> list[int]:
        """The CPU time in each, ns. Equal readings of a thread: the same time."""
        ...


class ThreadClocks:
    """The CPU clock of each thread of our own process: ns, and settled to now by the reading."""

    source = "clock_gettime"
    grain_ns = 1
    lag_ns = 0
    cut_ns = 0
    provable = False
    bound = False

    def open(self, tid: int) -> int:
        return (~tid << 3) | 6  # CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED, linux/posix-timers_types.h

    def close(self, handle: int) -> None:
        pass

    def read(self, handles: Collection[int]) -> list[Reading]:
        return list(map(time.clock_gettime_ns, handles))

    def cpu_ns(self, readings: Sequence[Reading]) -> list[int]:
        return list(readings)


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

    One that does not has no such file, or "0 0 0" for every thread, while the process has used CPU time. A thread
    that has run once has more than 0.

    Args:
        task_fd: ``/proc/<pid>/task``.
        total_ns: reads the CPU time of the process, ns.

    Raises:
        OSError: a file cannot be read, and not because its thread has exited.
    """
    found = False
    for tid in os.listdir(task_fd):
        try:
            if parse_run_times([read_file(f"{tid}/schedstat", task_fd)])[0]:
                return True
            found = True
        except OSError as error:
            if error.errno not in GONE:
                raise
    return found and total_ns() == 0


class _Files:
    """One file per thread, held open up to a budget; a handle below 0 is a tid opened at each read."""

    file: str
    bound = True

    def __init__(self, task_fd: int, budget: int) -> None:
        self._task_fd = task_fd
        self._budget = budget
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._highest = limit - min(FD_RESERVE, limit // 4)
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
                # The kernel gives the lowest free number, so a high one means that few are left.
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
    """``schedstat`` of each thread: ns, as fresh as the last scheduler tick."""

    source = file = "schedstat"
    grain_ns = 1
    lag_ns = KERNEL_TICK_NS
    cut_ns = 0
    provable = True

    def read(self, handles: Collection[int]) -> list[Reading]:
        return self.contents(handles, 64)

    def cpu_ns(self, readings: Sequence[Reading]) -> list[int]:
        return parse_run_times(readings)


class StatFiles(_Files):
    """``stat`` of each thread: user and system time, each cut to a tick of 10 ms."""

    source = file = "stat"
    grain_ns = 2 * USER_TICK_NS
    lag_ns = KERNEL_TICK_NS
    cut_ns = 2 * USER_TICK_NS
    provable = False

    def read(self, handles: Collection[int]) -> list[Reading]:
        stats = map(parse_stat, self.contents(handles, CONTENT_BYTES))
        return [(stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS for stat in stats]

    def cpu_ns(self, readings: Sequence[Reading]) -> list[int]:
        return list(readings)


class CommFiles(_Files):
    """``comm`` of each thread: its name, which any thread of the process may change."""

    file = "comm"

    def read(self, handles: Collection[int]) -> list[bytes]:
        """Return the names as the kernel has them. Raises `OSError` with an errno of `GONE` if a thread has exited."""
        return self.contents(handles, 64)
