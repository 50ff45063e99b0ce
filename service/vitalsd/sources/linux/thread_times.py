"""
How long the threads of one Linux process ran, read from few of them where that is proved to be enough.

Reading all of them costs a system call each. Most threads of most programs sleep, so `ThreadTimes`
can also read only those that ran lately and *prove* that no other did: the CPU clock of the process is
the sum of its threads, to the nanosecond, and no thread's time ever shrinks. If what was read, what is
remembered and what exited threads left add up to the clock, every remembered value is exact, and no thread
came or went: neither is done without running. Only a thread that has been created and has not run yet, not for a
nanosecond, is not seen by that; so once a second the threads are counted as well.
"""

from collections.abc import Callable, Iterable
from itertools import compress
from operator import ne, sub

from vitalsd.sources.linux.cpu_counters import GONE, Reading
from vitalsd.sources.linux.threads import ThreadList

__all__ = ["COUNT_EVERY_NS", "NAMES_EVERY_NS", "ThreadTimes"]

COUNT_EVERY_NS = 1_000_000_000
"""So often the threads are counted, however they are read."""
NAMES_EVERY_NS = 1_020_000_000
"""Names older than this are read though no caller asked for them. At one snapshot a second that is every other one."""
HOT_FOR = 8
"""A thread counts as hot until it has not run for so many readings, or for up to twice as many."""
HOT_PART = 8
"""With more than 1/8 of the threads hot, reading all of them is as cheap."""
MAX_PAUSE = 16
"""Readings without an attempt to prove, after one that failed again and again."""


class ThreadTimes:
    """
    The CPU times of the threads of a list, which it keeps up to date from one reading to the next.

    Args:
        threads: which threads there are; this object alone lists them anew.

    Raises:
        OSError: from any method, with an errno of `GONE` when the process has no thread any more.
    """

    def __init__(self, threads: ThreadList) -> None:
        self.threads = threads
        self.living_ns = 0
        """The CPU time of all of them as last read."""
        self.proved = 0
        """Readings that were proved instead of read in full."""
        self._counter = threads.counter
        self._exited_ns: int | None = None
        self._total_ns = -1
        self._pause = self._paused = 0
        self._counted_ns = 0
        self._named_ns = 0
        self._may_be_renamed = True
        """Whether any thread ran since the names were read: without running none renames itself or another."""
        self._begin()

    def read(self) -> list[int]:
        """
        Read the CPU time of each thread, ns, in the order of the roster.

        The last thing done is the reading itself, so that a total read next is read at the same time.
        """
        self._exited_ns = None
        threads = self.threads
        if not (threads.is_countable and threads.count() == len(self._handles) > 0 and self._read_all()):
            self._relist()
            self._read_all()
        return self._cpu_ns

    def read_hot(self, total_ns: int, clock: Callable[[], int]) -> tuple[list[int], int, int] | None:
        """
        Return the CPU time of each thread, ns, read from the hot ones and proved for the others.

        Args:
            total_ns: CPU time of the process, read just now.
            clock: reads it again.

        Returns:
            The times, the process's CPU time and that of its exited threads, all of one instant and
            exact; ``None`` if it cannot be proved this time and all must be read.
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
        burnt = list(map(sub, self._counter.cpu_ns(readings), map(self._cpu_ns.__getitem__, hot)))
        if self.living_ns + sum(burnt) + exited_ns != total_ns:
            self._pause = self._paused = min(MAX_PAUSE, 2 * self._pause or 1)
            return None
        self._pause = 0
        self._add(hot, burnt)
        self._total_ns = total_ns
        self.proved += 1
        return self._cpu_ns, total_ns, exited_ns

    def set_exited_total(self, total_ns: int, exited_ns: int) -> None:
        """Take over the exact totals that go with the last `read`: from now on `read_hot` can prove."""
        self._total_ns, self._exited_ns = total_ns, exited_ns

    def refresh_list(self, now_ns: int, *, names: bool) -> bool:
        """
        Read the names again, and once a second count the threads.

        Without `names` they are read if they are older than `NAMES_EVERY_NS`. They are read only if a thread ran, for
        a thread is renamed by itself or by another thread of its process.

        Returns:
            False if there are other threads than those that were read: read again.
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
        try:
            self.threads.relist()
        finally:  # After an error fewer are listed, and what is remembered has to be of those.
            self._begin()

    def _begin(self) -> None:
        """Remember the readings of the last listing, and nothing else."""
        rows = self.threads.rows
        self._handles = [thread.handle for thread in rows]
        self._readings: list[Reading] = [thread.reading for thread in rows]
        self._cpu_ns = [thread.cpu_ns for thread in rows]
        self.living_ns = sum(self._cpu_ns)
        self._exited_ns = None
        self._hot: dict[int, int] = {}
        """Handles of the threads that ran lately, by their places in the roster."""
        self._ran: set[int] = set()
        """Places of those that ran in the last `_age` readings: the hot ones from `HOT_FOR` on."""
        self._age = 0
        self._may_be_renamed = True
        self._unsure: set[int] = set()
        """Threads that ran since their births were read, if another thread may have their handles since."""

    def _read_all(self) -> bool:
        """Read every thread, and look closer at those whose reading is another; False if any has exited."""
        try:
            readings = self._counter.read(self._handles)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        changed = list(compress(range(len(readings)), map(ne, readings, self._readings)))
        times = self._counter.cpu_ns([readings[i] for i in changed])
        burnt = list(map(sub, times, map(self._cpu_ns.__getitem__, changed)))
        if not self._counter.bound and burnt and min(burnt) < 0:
            return False
        self._readings = readings
        self._add(changed, burnt)
        return True

    def _add(self, places: Iterable[int], burnt: list[int]) -> None:
        """Add what the threads at these places burnt, ns; a list that was handed out stays as it is."""
        if any(burnt):
            cpu_ns = self._cpu_ns = self._cpu_ns.copy()
            for i, ns in zip(places, burnt, strict=True):
                if ns:
                    cpu_ns[i] += ns
                    self._ran.add(i)
                    if not self._counter.bound:
                        self._unsure.add(i)
            self._may_be_renamed = True
            self.living_ns += sum(burnt)
        self._age += 1
        if self._age == HOT_FOR:
            self._set_hot(self._ran)
            self._ran, self._age = set(), 0
        elif not self._ran <= self._hot.keys():
            self._set_hot(self._ran | self._hot.keys())

    def _set_hot(self, hot: set[int]) -> None:
        self._hot = {i: self._handles[i] for i in sorted(hot)}
