"""
The threads of one Linux process: who is there, what they are called, how long they ran.

`ThreadTable` keeps the set; one of three counters reads the CPU time: `ThreadClocks` (our own
process), `SchedstatFiles` (any other), `StatFiles` (a kernel without schedstat).
"""

import errno
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import lt
from typing import Protocol

from vitalsd.sources.procfs import Stat, decode_name, parse_run_times, parse_stat

__all__ = ["KERNEL_TICK_NS", "USER_TICK_NS", "SchedstatFiles", "StatFiles", "ThreadClocks", "ThreadTable", "read_file"]

USER_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
"""Unit of utime, stime and start times in /proc, ns."""

KERNEL_TICK_NS = round(time.clock_getres(6) * 1e9)
"""Period of the scheduler's tick, ns: the resolution of CLOCK_MONOTONIC_COARSE (6 in linux/time.h)."""

NAMES_PER_SWEEP = 8
"""Names re-read per snapshot though their threads did not run: another thread may have renamed them."""

FD_RESERVE = 64
"""Descriptors left to sockets and to files that are opened for a moment, however many threads the targets have."""

GONE = (errno.ESRCH, errno.ENOENT, errno.EINVAL)
"""How the kernel says that a thread has exited; EINVAL is the CPU clock's way."""


def read_file(path: str, dir_fd: int) -> bytes:
    """The whole of a small procfs file, in one read: a second one could see another state."""
    fd = os.open(path, os.O_RDONLY, dir_fd=dir_fd)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


class ThreadCounter(Protocol):
    """One way to read the CPU time of threads. A handle is whatever `open` returned."""

    source: str
    grain_ns: int
    """Step of the counter."""
    lag_ns: int
    """How far behind the counter of a running thread may be."""
    cut_ns: int
    """How much a reading may be too low because the kernel rounds down."""
    bound: bool
    """A handle can never name another thread, even if the tid is given away again."""

    def open(self, tid: int) -> int: ...
    def close(self, handle: int) -> None: ...
    def read(self, handles: Sequence[int]) -> list[int]:
        """CPU time of each, ns. Raises `OSError` with an errno of `GONE` if any of them has exited."""
        ...


class ThreadClocks:
    """The CPU clock of each thread of our own process: ns, and settled to now by the reading."""

    source = "clock_gettime"
    grain_ns = 1
    lag_ns = 0
    cut_ns = 0
    bound = False

    def open(self, tid: int) -> int:
        return (~tid << 3) | 6  # CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED, linux/posix-timers_types.h

    def close(self, handle: int) -> None:
        pass

    def read(self, handles: Sequence[int]) -> list[int]:
        return list(map(time.clock_gettime_ns, handles))


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

    def contents(self, handles: Sequence[int], size: int) -> list[bytes]:
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

    def read(self, handles: Sequence[int]) -> list[int]:
        return parse_run_times(self.contents(handles, 64))


class StatFiles(_Files):
    """``stat`` of each thread: user and system time, each cut to a tick of 10 ms."""

    source = file = "stat"
    grain_ns = USER_TICK_NS
    lag_ns = KERNEL_TICK_NS + USER_TICK_NS
    cut_ns = 2 * USER_TICK_NS

    def read(self, handles: Sequence[int]) -> list[int]:
        stats = map(parse_stat, self.contents(handles, 1024))
        return [(stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS for stat in stats]


@dataclass(slots=True)
class _Thread:
    birth: int
    name: str
    handle: int
    cpu_ns: int


class ThreadTable:
    """
    The threads below ``task/``, kept up to date from one `read` to the next.

    `tids`, `births` (clock ticks after boot) and `names` are parallel, by ascending tid, and stay
    the same objects while nothing changes.

    Raises:
        OSError: from any method, with an errno of `GONE` when the process has no thread any more.
    """

    def __init__(self, task_fd: int, counter: ThreadCounter) -> None:
        self._task_fd = task_fd
        self._counter = counter
        self._threads: dict[int, _Thread] = {}
        self._handles: list[int] = []
        self._cpu_ns: list[int] = []
        self._sweep = 0
        self._links_count_threads = False
        self.tids: tuple[int, ...] = ()
        self.births: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()
        self._relist()
        self._links_count_threads = self._links() == len(self.tids)

    def read(self) -> list[int]:
        """CPU time of each thread, ns, in the order of `tids`."""
        if self._links_count_threads and self._links() == len(self.tids):
            try:
                cpu_ns = self._counter.read(self._handles)
            except OSError as error:
                if error.errno not in GONE:
                    raise
            else:
                if (self._counter.bound or not any(map(lt, cpu_ns, self._cpu_ns))) and self._rename(cpu_ns):
                    self._cpu_ns = cpu_ns
                    return cpu_ns
        self._relist()
        return self._cpu_ns

    def stats(self) -> list[Stat | None]:
        """The ``stat`` of each thread, which also renames it; ``None`` for one that exited just now."""
        stats = [self._stat(tid) for tid in self.tids]
        names = tuple(new.name if new else old for new, old in zip(stats, self.names, strict=True))
        if names != self.names:
            self.names = names
        return stats

    def close(self) -> None:
        for thread in self._threads.values():
            self._counter.close(thread.handle)
        self._threads.clear()

    def _links(self) -> int:
        return os.fstat(self._task_fd).st_nlink - 2

    def _stat(self, tid: int) -> Stat | None:
        try:
            return parse_stat(read_file(f"{tid}/stat", self._task_fd))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None

    def _relist(self) -> None:
        """List ``task/`` and read thread by thread; one that exits meanwhile is left out."""
        before, self._threads = self._threads, {}
        try:
            for tid in sorted(map(int, os.listdir(self._task_fd))):
                thread = before.pop(tid, None)
                if thread is None or not self._advance(tid, thread):
                    if thread is not None:
                        self._counter.close(thread.handle)
                    thread = self._open(tid)
                if thread is not None:
                    self._threads[tid] = thread
        finally:
            for thread in before.values():
                self._counter.close(thread.handle)
        if not self._threads:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        threads = self._threads.values()
        self.tids = tuple(self._threads)
        self.births = tuple(thread.birth for thread in threads)
        self.names = tuple(thread.name for thread in threads)
        self._handles = [thread.handle for thread in threads]
        self._cpu_ns = [thread.cpu_ns for thread in threads]

    def _advance(self, tid: int, thread: _Thread) -> bool:
        """
        Read a known thread; False if its handle names it no longer.

        One that ran may have renamed itself, or be another that got its number: its stat tells.
        """
        try:
            (cpu_ns,) = self._counter.read((thread.handle,))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        if cpu_ns < thread.cpu_ns:
            return False
        if cpu_ns > thread.cpu_ns:
            stat = self._stat(tid)
            if stat is None or stat.start_ticks != thread.birth:
                return False
            thread.name = stat.name
        thread.cpu_ns = cpu_ns
        return True

    def _open(self, tid: int) -> _Thread | None:
        """
        Open a thread, or ``None`` if it exits meanwhile.

        The stat is read between opening and reading the counter: a handle that is bound and still
        answers proves that both are of one thread.
        """
        handle = None
        try:
            handle = self._counter.open(tid)
            stat = parse_stat(read_file(f"{tid}/stat", self._task_fd))
            (cpu_ns,) = self._counter.read((handle,))
        except OSError as error:
            if handle is not None:
                self._counter.close(handle)
            if error.errno not in GONE:
                raise
            return None
        return _Thread(stat.start_ticks, stat.name, handle, cpu_ns)

    def _rename(self, cpu_ns: Sequence[int]) -> bool:
        """
        Read again the names of the threads that ran, and of a few others in turn.

        A thread that names itself has run, so its new name is never missed. So has one that got the
        number of a dead one: where the handle cannot tell, its birth does, and the answer is False.
        """
        count = len(cpu_ns)
        stale = {i % count for i in range(self._sweep, self._sweep + NAMES_PER_SWEEP)}
        self._sweep = (self._sweep + NAMES_PER_SWEEP) % count
        if cpu_ns != self._cpu_ns:
            stale.update(i for i, (new, old) in enumerate(zip(cpu_ns, self._cpu_ns, strict=True)) if new != old)
        names = list(self.names)
        for i in stale:
            if not self._counter.bound:
                stat = self._stat(self.tids[i])
                if stat is not None and stat.start_ticks != self.births[i]:
                    return False
                names[i] = stat.name if stat else names[i]
                continue
            try:
                names[i] = decode_name(read_file(f"{self.tids[i]}/comm", self._task_fd)[:-1])
            except OSError as error:
                if error.errno not in GONE:
                    raise
        if tuple(names) != self.names:
            self.names = tuple(names)
            for thread, name in zip(self._threads.values(), names, strict=True):
                thread.name = name
        return True
