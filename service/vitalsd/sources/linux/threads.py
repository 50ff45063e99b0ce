"""List the threads of one Linux process and read their names. `thread_times` reads their CPU times."""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from vitalsd.snapshot import ThreadRoster
from vitalsd.sources.linux.cpu_counters import GONE, CommFiles, Reading, ThreadCounter, read_file
from vitalsd.sources.linux.procfs import Stat, parse_stat
from vitalsd.sources.names import decode_name

__all__ = ["ListedThread", "ThreadList"]


@dataclass(slots=True, eq=False)
class ListedThread:
    """A thread in the list, with the handles through which it is read."""

    birth: int
    name: str
    handle: int
    """Handle of the counter of its CPU time."""
    name_handle: int | None = field(default=None, init=False)
    """Handle of the file of its name; ``None`` until that is opened."""
    reading: Reading
    """Reading of its counter when the threads were listed last."""
    cpu_ns: int
    """CPU time in `reading`, ns."""
    wait_ns: int
    """Time for which it had waited for a CPU then, ns."""


class ThreadList:
    """
    The threads below ``task/``, opened one by one, and distinguished from threads that get their ids later.

    `roster` stays the same object while no thread changes; its births are in clock ticks after boot. `rows` are in its
    order.

    Args:
        task_fd: descriptor of ``/proc/<pid>/task``.
        counter: reads the CPU times.
        names: the files of the threads' names.

    Raises:
        OSError: from any method, with an errno in `GONE` if the process has no thread left.
    """

    def __init__(self, task_fd: int, counter: ThreadCounter, names: CommFiles) -> None:
        self._task_fd = task_fd
        self._names = names
        self._threads: dict[int, ListedThread] = {}
        self._name_contents: list[bytes] = []
        """The bytes of the names as of the last read."""
        self.counter = counter
        self.rows: list[ListedThread] = []
        self.roster = ThreadRoster()
        try:
            self.relist()
            self.is_countable = self.count() == len(self.rows)
            """Whether `count` is correct on this kernel."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release every handle."""
        for thread in self._threads.values():
            self._release(thread)
        self._threads.clear()

    def count(self) -> int:
        """Return the present number of threads, from the number of links of ``task/``."""
        return os.fstat(self._task_fd).st_nlink - 2

    def relist(self) -> None:
        """
        List ``task/`` and read each thread; leave out one that exits meanwhile.

        After an error the list has only the threads read until then, so the next reading has to list again.
        """
        before, found = self._threads, dict[int, ListedThread]()
        try:
            for tid in sorted(map(int, os.listdir(self._task_fd))):
                thread = before.get(tid)
                if thread is not None and not self._advance(tid, thread):
                    self._release(before.pop(tid))
                    thread = None
                if thread is None:
                    thread = self._open(tid)
                if thread is not None:
                    found[tid] = thread
                    before.pop(tid, None)
        finally:
            for thread in before.values():
                self._release(thread)
            self._hold(found)
        if not found:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def read_names(self) -> None:
        """Read the names of all threads. A thread that has exited meanwhile keeps its last name."""
        try:
            for tid, thread in self._threads.items():
                if thread.name_handle is None:
                    thread.name_handle = self._names.open(tid)
            contents = self._names.read([thread.name_handle or 0 for thread in self.rows])
        except OSError as error:
            if error.errno not in GONE:
                raise
            self._name_contents = []
            names = tuple(self._name(tid, thread) for tid, thread in self._threads.items())
        else:
            if contents == self._name_contents:
                return
            self._name_contents = contents
            names = tuple(decode_name(content[:-1]) for content in contents)
        if names != self.roster.names:
            self.roster = replace(self.roster, names=names)
            for thread, name in zip(self.rows, names, strict=True):
                thread.name = name

    def have_births(self, places: Iterable[int]) -> bool:
        """Return whether the threads at these indexes of the roster are those that were listed, or have exited."""
        for i in places:
            stat = self._stat(self.roster.tids[i])
            if stat is not None and stat.start_ticks != self.roster.births[i]:
                return False
        return True

    def stats(self) -> list[Stat | None]:
        """Return the ``stat`` of each thread; ``None`` for one that has exited since."""
        stats = list(map(self._stat, self.roster.tids))
        if not any(stats):  # The process has ended, or /proc hides it now.
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        births = self.roster.births
        return [stat if stat and stat.start_ticks == birth else None for stat, birth in zip(stats, births, strict=True)]

    def _hold(self, found: dict[int, ListedThread]) -> None:
        self._threads = found
        self.rows = list(found.values())
        self.roster = ThreadRoster(
            tids=tuple(found),
            births=tuple(thread.birth for thread in self.rows),
            names=tuple(thread.name for thread in self.rows),
        ).sharing(self.roster)
        self._name_contents = []

    def _release(self, thread: ListedThread) -> None:
        self.counter.close(thread.handle)
        if thread.name_handle is not None:
            self._names.close(thread.name_handle)

    def _open(self, tid: int) -> ListedThread | None:
        """
        Open a thread; return ``None`` if it exits meanwhile.

        The ``stat`` is read after the counter is opened and before it is read: if a handle that survives the reuse of
        its tid can still be read, both are of one thread.
        """
        handle = None
        try:
            handle = self.counter.open(tid)
            stat = parse_stat(read_file(f"{tid}/stat", self._task_fd))
            (reading,) = self.counter.read((handle,))
            (cpu_ns,), (wait_ns,) = self.counter.decode((handle,), (reading,))
        except OSError as error:
            if handle is not None:
                self.counter.close(handle)
            if error.errno not in GONE:
                raise
            return None
        return ListedThread(stat.start_ticks, stat.name, handle, reading, cpu_ns, wait_ns)

    def _advance(self, tid: int, thread: ListedThread) -> bool:
        """
        Read a known thread; return False if its handle is not of this thread any more.

        If the thread has run, its ``stat`` is read, because it may have renamed itself, or be another thread with the
        same id.
        """
        try:
            (reading,) = self.counter.read((thread.handle,))
            (cpu_ns,), (wait_ns,) = self.counter.decode((thread.handle,), (reading,))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        if cpu_ns < thread.cpu_ns or wait_ns < thread.wait_ns:
            return False
        if cpu_ns > thread.cpu_ns:
            stat = self._stat(tid)
            if stat is None or stat.start_ticks != thread.birth:
                return False
            thread.name = stat.name
        thread.reading, thread.cpu_ns, thread.wait_ns = reading, cpu_ns, wait_ns
        return True

    def _name(self, tid: int, thread: ListedThread) -> str:
        try:
            if thread.name_handle is None:
                thread.name_handle = self._names.open(tid)
            return decode_name(self._names.read((thread.name_handle,))[0][:-1])
        except OSError as error:
            if error.errno not in GONE:
                raise
            return thread.name

    def _stat(self, tid: int) -> Stat | None:
        try:
            return parse_stat(read_file(f"{tid}/stat", self._task_fd))
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None
