"""
Read the CPU times and waits of the threads of one Linux process, from few of them if that is proved to be enough.

To read all of them costs a system call for each. Most threads of most programs sleep, so `ThreadTimes` can also read
only those that ran lately, the hot ones, and *prove* that no other thread ran: the CPU clock of the process is the sum
of its threads, to the nanosecond, and the time of a thread never decreases. If the times just read, the remembered
times and the time of exited threads add up to the clock, every remembered time is exact, and no thread has started or
exited, because both take CPU time. The proof does not see a thread that was created and has not run yet, so the threads
are also counted once a second.

The kernel adds a wait for a CPU when the thread gets one; then the thread runs, and is read once the clock advances, at
a tick of the scheduler. It also adds a wait when it moves a waiting thread to another CPU. The proof does not show that
move, so the wait of a thread that did not run may be missing until the next full reading.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import compress
from operator import ne, sub

from vitalsd.sources.linux.cpu_counters import GONE, Reading
from vitalsd.sources.linux.threads import ThreadList

__all__ = ["COUNT_EVERY_NS", "NAMES_EVERY_NS", "ThreadTimes"]

COUNT_EVERY_NS = 1_000_000_000
"""Interval at which the threads are counted, ns."""
NAMES_EVERY_NS = 1_020_000_000
"""
Age from which on names are read although the caller does not need them, ns. At one snapshot a second they are read with
every other one.
"""
HOT_FOR = 8
"""Readings without CPU time after which a thread is not hot any more; it may take up to twice as many."""
HOT_PART = 8
"""If more than 1/8 of the threads are hot, all are read, which then costs as much as a proof."""
MAX_PAUSE = 16
"""Most readings without an attempt to prove, after repeated failures."""


class ThreadTimes:
    """
    The CPU times and waits of the threads in a list, and what is remembered of them from one reading to the next.

    Args:
        threads: the list; only this object may list them anew.
        waited_ns: what the threads of the process had waited in readings before this object was made, ns.

    Raises:
        OSError: from any method, with an errno in `GONE` if the process has no thread left.
    """

    def __init__(self, threads: ThreadList, waited_ns: int = 0) -> None:
        self.threads = threads
        self.waited_ns = waited_ns
        """
        Sum of what the waits of the threads grew by, ns; it never decreases. A thread that exits loses what it waited
        after its last reading.
        """
        self.living_ns = 0
        """Sum of the CPU times of the threads as of the last reading, ns."""
        self.proved = 0
        """Number of readings that were proved instead of read in full."""
        self._counter = threads.counter
        self._exited_ns: int | None = None
        self._total_ns = -1
        self._pause = self._paused = 0
        self._counted_ns = 0
        self._named_ns = 0
        self._may_be_renamed = True
        """Whether any thread ran since the names were read: only a running thread can rename itself or another."""
        self._is_whole = True
        """Whether the last listing succeeded: if not, a thread that is found next may be an old one."""
        self._begin()

    @property
    def wait_ns(self) -> list[int] | None:
        """The wait of each thread as of the last reading, ns; ``None``: the kernel does not count it."""
        return self._wait_ns if self._counter.counts_waits else None

    def read(self, clock: Callable[[], int]) -> tuple[list[int], int]:
        """
        Return the CPU time of each thread, ns, in the order of the roster, and that of the process.

        Args:
            clock: reads the CPU time of the process; called just after the counters are read.
        """
        self._exited_ns = None
        threads, total_ns = self.threads, None
        if threads.is_countable and threads.count() == len(self._handles) > 0:
            total_ns = self._read_all(clock)
        if total_ns is None:
            self._relist()
            total_ns = self._read_all(clock)
        return self._cpu_ns, clock() if total_ns is None else total_ns

    def read_hot(self, total_ns: int, clock: Callable[[], int]) -> tuple[list[int], int, int] | None:
        """
        Return the CPU time of each thread, ns: read for the hot threads and proved for the others.

        Args:
            total_ns: CPU time of the process, read just before.
            clock: reads it again.

        Returns:
            The times, the process's CPU time and that of its exited threads, exact and all of one instant; ``None``
            if the proof fails and all threads must be read.
        """
        exited_ns = self._exited_ns
        if exited_ns is None or not self.threads.is_countable:
            return None
        if total_ns == self._total_ns:
            self.proved += 1
            return self._cpu_ns, total_ns, exited_ns
        hot = self._hot
        if self._paused > 0 or len(hot) * HOT_PART > len(self._handles):
            self._paused -= 1
            return None
        try:
            readings = self._counter.read(hot.values())
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None
        total_ns = clock()
        used_ns, waited = self._grown(hot, readings)
        if self.living_ns + sum(used_ns) + exited_ns != total_ns:
            self._pause = self._paused = min(MAX_PAUSE, 2 * self._pause or 1)
            return None
        self._pause = 0
        self._add(hot, used_ns, waited)
        self._total_ns = total_ns
        self.proved += 1
        return self._cpu_ns, total_ns, exited_ns

    def set_exited_total(self, total_ns: int, exited_ns: int) -> None:
        """Store the exact totals that belong to the last `read`, which `read_hot` needs for its proof."""
        self._total_ns, self._exited_ns = total_ns, exited_ns

    def refresh_list(self, now_ns: int, *, names: bool) -> bool:
        """
        Read the names again, and count the threads once a second.

        If `names` is False, names are read only if they are older than `NAMES_EVERY_NS`. They are read only if a thread
        has run, because only threads of the process can rename a thread.

        Args:
            now_ns: monotonic time, ns.
            names: whether the caller needs the present names.

        Returns:
            False if the threads are not those that were read: read again.
        """
        threads = self.threads
        due = now_ns - self._counted_ns >= COUNT_EVERY_NS
        if self._unsure and (due or names):
            if not threads.have_births(self._unsure):
                self._relist()
                return False
            self._unsure.clear()
        if self._may_be_renamed and (names or now_ns - self._named_ns >= NAMES_EVERY_NS):
            threads.read_names()
            self._may_be_renamed, self._named_ns = False, now_ns
        if due:
            self._counted_ns = now_ns
            if threads.is_countable and threads.count() != len(self._handles):
                self._exited_ns = None
                return False
        return True

    def _relist(self) -> None:
        """List the threads, and count what they have waited since they were read; new ones, since they started."""
        threads, was_whole = self.threads, self._is_whole
        waited = dict(zip(threads.rows, self._wait_ns, strict=True))
        known = set(zip(threads.roster.tids, threads.roster.births, strict=True))
        self._is_whole = False
        try:
            threads.relist()
            self._is_whole = True
        finally:  # After an error the list is shorter, and the remembered times must match it.
            self._begin()
            for thread, tid in zip(threads.rows, threads.roster.tids, strict=True):
                # At exec a thread gets the id and the birth of the main thread, and keeps its wait.
                is_new = was_whole and (tid, thread.birth) not in known
                self.waited_ns += max(0, thread.wait_ns - waited.get(thread, 0 if is_new else thread.wait_ns))

    def _begin(self) -> None:
        """Remember only the readings of the last listing."""
        rows = self.threads.rows
        self._handles = [thread.handle for thread in rows]
        self._readings: list[Reading] = [thread.reading for thread in rows]
        self._cpu_ns = [thread.cpu_ns for thread in rows]
        self._wait_ns = [thread.wait_ns for thread in rows]
        self.living_ns = sum(self._cpu_ns)
        self._exited_ns = None
        self._hot: dict[int, int] = {}
        """Handles of the hot threads, by their indexes in the roster."""
        self._ran: set[int] = set()
        """Indexes of the threads that ran in the last `_age` readings; they become the hot ones at `HOT_FOR`."""
        self._age = 0
        self._may_be_renamed = True
        self._unsure: set[int] = set()
        """Indexes of threads that ran since their births were read, if their handles may be of other threads now."""

    def _read_all(self, clock: Callable[[], int]) -> int | None:
        """
        Read every thread and the process, and decode the readings that have changed.

        Returns:
            The CPU time of the process, ns; ``None`` if any thread has exited.
        """
        try:
            readings = self._counter.read(self._handles)
            total_ns = clock()
            changed = list(compress(range(len(readings)), map(ne, readings, self._readings)))
            used_ns, waited = self._grown(changed, [readings[i] for i in changed])
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None
        if not self._counter.survives_tid_reuse and changed and min(min(used_ns), min(waited)) < 0:
            return None
        self._readings = readings
        self._add(changed, used_ns, waited)
        return total_ns

    def _grown(self, places: Collection[int], readings: list[Reading]) -> tuple[list[int], list[int]]:
        """Return what the threads at these indexes ran and waited since their last readings, ns."""
        cpu_ns, wait_ns = self._counter.decode(map(self._handles.__getitem__, places), readings)
        used_ns = map(sub, cpu_ns, map(self._cpu_ns.__getitem__, places))
        return list(used_ns), list(map(sub, wait_ns, map(self._wait_ns.__getitem__, places)))

    def _add(self, places: Collection[int], used_ns: list[int], waited: list[int]) -> None:
        """
        Add what the threads at these indexes ran and waited, ns.

        At exec a counter may decrease, because another thread gets the id of the main one; the sum of waits does not.
        """
        if any(waited):
            self._wait_ns = _increased(self._wait_ns, places, waited)
            self.waited_ns += sum(waited) if min(waited) >= 0 else sum(ns for ns in waited if ns > 0)
        if any(used_ns):
            self._cpu_ns = _increased(self._cpu_ns, places, used_ns)
            self._ran.update(compress(places, used_ns))
            if not self._counter.survives_tid_reuse:
                self._unsure.update(compress(places, used_ns))
            self._may_be_renamed = True
            self.living_ns += sum(used_ns)
        self._age += 1
        if self._age == HOT_FOR:
            self._set_hot(self._ran)
            self._ran, self._age = set(), 0
        elif not self._ran <= self._hot.keys():
            self._set_hot(self._ran | self._hot.keys())

    def _set_hot(self, hot: set[int]) -> None:
        self._hot = {i: self._handles[i] for i in sorted(hot)}


def _increased(column: list[int], places: Iterable[int], growth: Iterable[int]) -> list[int]:
    """Return a copy, because a caller may have the list; values that do not grow are the same objects in both."""
    column = column.copy()
    for i, ns in zip(places, growth, strict=True):
        if ns:
            column[i] += ns
    return column
