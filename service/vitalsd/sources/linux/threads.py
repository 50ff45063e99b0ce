"""
The threads of one Linux process: who is there, what they are called, how long they ran.

Reading all of them costs a system call each. Most threads of most programs sleep, so `ThreadTable`
can also read only those that ran lately and *prove* that no other did: the CPU clock of the process is
the sum of its threads, to the nanosecond, and no thread's time ever shrinks. If what was read, what is
remembered and what exited threads left add up to the clock, every remembered value is exact, and nobody
came or went: neither is done without running. Only who has been created and has not run yet, not for a
nanosecond, is not seen by that; so once a second the threads are counted as well.
"""

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import compress
from operator import ne, sub

from vitalsd.snapshot import ThreadRoster
from vitalsd.sources.linux.cpu_counters import GONE, Reading, ThreadCounter, ThreadNames, read_file
from vitalsd.sources.linux.procfs import Stat, parse_stat
from vitalsd.sources.names import decode_name

__all__ = ["LOOK_EVERY_NS", "NAMES_EVERY_NS", "ThreadTable"]

LOOK_EVERY_NS = 1_000_000_000
"""So often the threads are counted, however they are read."""
NAMES_EVERY_NS = 1_020_000_000
"""Names older than this are read though no caller asked for them. At one snapshot a second that is every other one."""
HOT_FOR = 8
"""A thread counts as hot until it has not run for so many readings, or for up to twice as many."""
HOT_PART = 8
"""With more than 1/8 of the threads hot, reading all of them is as cheap."""
MAX_PAUSE = 16
"""Readings without an attempt to prove, after one that failed again and again."""


@dataclass(slots=True, eq=False)
class _Thread:
    birth: int
    name: str
    handle: int
    name_handle: int | None = field(default=None, init=False)
    reading: Reading
    """As of the last listing, as is `cpu_ns`."""
    cpu_ns: int


class ThreadTable:
    """
    The threads below ``task/``, kept up to date from one `read` to the next.

    `roster`, with starts in clock ticks after boot, stays the same object while nothing changes.

    Raises:
        OSError: from any method, with an errno of `GONE` when the process has no thread any more.
    """

    def __init__(self, task_fd: int, counter: ThreadCounter, names: ThreadNames) -> None:
        self._task_fd = task_fd
        self._counter = counter
        self._names = names
        self._threads: dict[int, _Thread] = {}
        self._rows: list[_Thread] = []
        self._handles: list[int] = []
        self._readings: list[Reading] = []
        self._cpu_ns: list[int] = []
        self._hot: dict[int, int] = {}
        """Who ran lately, by index, and its handle."""
        self._ran: set[int] = set()
        """Who ran in the last `_age` readings: the hot ones from `HOT_FOR` on."""
        self._age = 0
        self._renamed = True
        """Whether any thread ran since the names were read: without running none renames itself or another."""
        self._contents: list[bytes] = []
        """The names as they were read."""
        self._named_ns = 0
        self._unsure: set[int] = set()
        """Threads that ran since their births were read, if another thread may have their handles since."""
        self._looked_ns = 0
        self._links_count_threads = False
        self._exited_ns: int | None = None
        self._total_ns = -1
        self._pause = self._paused = 0
        self.roster = ThreadRoster()
        self.living_ns = 0
        """The CPU time of all of them as last read."""
        self.proved = 0
        """Readings that were proved instead of read in full."""
        try:
            self._relist()
            self._links_count_threads = self._links() == len(self._rows)
        except BaseException:
            self.close()
            raise

    def read(self) -> list[int]:
        """
        CPU time of each thread, ns, in the order of the roster.

        The last thing done is the reading itself, so that a total read next is read at the same time.
        """
        self._exited_ns = None
        if self._links_count_threads and self._links() == len(self._rows) > 0 and self._read_all():
            return self._cpu_ns
        self._relist()
        self._read_all()
        return self._cpu_ns

    def read_proved(self, total_ns: int, clock: Callable[[], int]) -> tuple[list[int], int, int] | None:
        """
        The CPU time of each thread, ns, read from the hot ones and proved for the others.

        Args:
            total_ns: CPU time of the process, read just now.
            clock: reads it again.

        Returns:
            The times, the process's CPU time and that of its exited threads, all of one instant and
            exact; ``None`` if it cannot be proved this time and all must be read.
        """
        exited_ns, count = self._exited_ns, len(self._rows)
        if exited_ns is None or not self._links_count_threads:
            return None
        if total_ns == self._total_ns:
            self.proved += 1
            return self._cpu_ns, total_ns, exited_ns
        hot = self._hot
        if self._paused > 0 or len(hot) * HOT_PART > count:
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
        self._move(hot, burnt)
        self._total_ns = total_ns
        self.proved += 1
        return self._cpu_ns, total_ns, exited_ns

    def calibrate(self, total_ns: int, exited_ns: int) -> None:
        """Tell the exact totals that go with the last `read`: from now on `read_proved` can prove."""
        self._total_ns, self._exited_ns = total_ns, exited_ns

    def look_around(self, now_ns: int, *, names: bool) -> bool:
        """
        Read again the names, and once a second count the threads.

        Without `names` they are read if they are older than `NAMES_EVERY_NS`. They are read only if a thread ran, for
        a thread is renamed by itself or by another thread of its process.

        Returns:
            False if there are other threads than those that were read: read again.
        """
        due = now_ns - self._looked_ns >= LOOK_EVERY_NS
        if (self._unsure and (due or names)) and not self._prove_births():
            return False
        if self._renamed and (names or now_ns - self._named_ns >= NAMES_EVERY_NS):
            self._read_names()
            self._renamed, self._named_ns = False, now_ns
        if due:
            self._looked_ns = now_ns
            if self._links_count_threads and self._links() != len(self._rows):
                self._exited_ns = None
                return False
        return True

    def stats(self) -> list[Stat | None]:
        """The ``stat`` of each thread; ``None`` for one that exited just now."""
        roster = self.roster
        stats = [self._stat(tid) for tid in roster.tids]
        return [stat if stat and stat.start_ticks == b else None for stat, b in zip(stats, roster.births, strict=True)]

    def close(self) -> None:
        """Release every handle."""
        for thread in self._threads.values():
            self._let_go(thread)
        self._threads.clear()

    def _let_go(self, thread: _Thread) -> None:
        self._counter.close(thread.handle)
        if thread.name_handle is not None:
            self._names.close(thread.name_handle)

    def _links(self) -> int:
        return os.fstat(self._task_fd).st_nlink - 2

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
        self._move(changed, burnt)
        return True

    def _move(self, looked_at: Iterable[int], burnt: list[int]) -> None:
        """Add what those that were looked at burnt; a list that was handed out stays as it is."""
        if any(burnt):
            cpu_ns = self._cpu_ns = self._cpu_ns.copy()
            for i, ns in zip(looked_at, burnt, strict=True):
                if ns:
                    cpu_ns[i] += ns
                    self._ran.add(i)
                    if not self._counter.bound:
                        self._unsure.add(i)
            self._renamed = True
            self.living_ns += sum(burnt)
        self._age += 1
        if self._age == HOT_FOR:
            self._heat(self._ran)
            self._ran, self._age = set(), 0
        elif not self._ran <= self._hot.keys():
            self._heat(self._ran | self._hot.keys())

    def _heat(self, hot: set[int]) -> None:
        self._hot = {i: self._handles[i] for i in sorted(hot)}

    def _read_names(self) -> None:
        """A thread that has exited meanwhile keeps the name it had."""
        try:
            for tid, thread in self._threads.items():
                if thread.name_handle is None:
                    thread.name_handle = self._names.open(tid)
            contents = self._names.read([thread.name_handle or 0 for thread in self._rows])
        except OSError as error:
            if error.errno not in GONE:
                raise
            self._contents = []
            names = tuple(self._name(tid, thread) for tid, thread in self._threads.items())
        else:
            if contents == self._contents:
                return
            self._contents = contents
            names = tuple(decode_name(content[:-1]) for content in contents)
        if names != self.roster.names:
            self.roster = replace(self.roster, names=names)
            for thread, name in zip(self._rows, names, strict=True):
                thread.name = name

    def _name(self, tid: int, thread: _Thread) -> str:
        try:
            if thread.name_handle is None:
                thread.name_handle = self._names.open(tid)
            return decode_name(self._names.read((thread.name_handle,))[0][:-1])
        except OSError as error:
            if error.errno not in GONE:
                raise
            return thread.name

    def _prove_births(self) -> bool:
        """False, and listed anew, if the number of a thread that ran is another thread's by now."""
        for i in self._unsure:
            stat = self._stat(self.roster.tids[i])
            if stat is not None and stat.start_ticks != self.roster.births[i]:
                self._relist()
                return False
        self._unsure.clear()
        return True

    def _stat(self, tid: int) -> Stat | None:
        try:
            return parse_stat(read_file(f"{tid}/stat", self._task_fd))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None

    def _relist(self) -> None:
        """
        List ``task/`` and read thread by thread; one that exits meanwhile is left out.

        After an error those are held that had been reached: too few, so that the next `read` lists again.
        """
        self._exited_ns = None
        before, found = self._threads, dict[int, _Thread]()
        try:
            for tid in sorted(map(int, os.listdir(self._task_fd))):
                thread = before.get(tid)
                if thread is not None and not self._advance(tid, thread):
                    self._let_go(before.pop(tid))
                    thread = None
                if thread is None:
                    thread = self._open(tid)
                if thread is not None:
                    found[tid] = thread
                    before.pop(tid, None)
        finally:
            for thread in before.values():
                self._let_go(thread)
            self._hold(found)
        if not found:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _hold(self, found: dict[int, _Thread]) -> None:
        threads = self._rows = list(found.values())
        self._threads = found
        self.roster = ThreadRoster(
            tids=tuple(found),
            births=tuple(thread.birth for thread in threads),
            names=tuple(thread.name for thread in threads),
        ).sharing(self.roster)
        self._handles = [thread.handle for thread in threads]
        self._readings = [thread.reading for thread in threads]
        self._cpu_ns = [thread.cpu_ns for thread in threads]
        self.living_ns = sum(self._cpu_ns)
        self._hot = {}
        self._ran.clear()
        self._age = 0
        self._renamed = True
        self._contents = []
        self._unsure.clear()

    def _advance(self, tid: int, thread: _Thread) -> bool:
        """
        Read a known thread; False if its handle names it no longer.

        One that ran may have renamed itself, or be another that got its number: its stat tells.
        """
        try:
            (reading,) = self._counter.read((thread.handle,))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        (cpu_ns,) = self._counter.cpu_ns((reading,))
        if cpu_ns < thread.cpu_ns:
            return False
        if cpu_ns > thread.cpu_ns:
            stat = self._stat(tid)
            if stat is None or stat.start_ticks != thread.birth:
                return False
            thread.name = stat.name
        thread.reading, thread.cpu_ns = reading, cpu_ns
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
            (reading,) = self._counter.read((handle,))
        except OSError as error:
            if handle is not None:
                self._counter.close(handle)
            if error.errno not in GONE:
                raise
            return None
        return _Thread(stat.start_ticks, stat.name, handle, reading, *self._counter.cpu_ns((reading,)))
