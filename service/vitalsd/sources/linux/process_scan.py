"""
Find the processes of Linux that were created since the last time.

Facts about the kernel on which this module depends (v6.18; each has a test):

- The last field of ``/proc/loadavg`` is the id that was given last in the pid namespace of the reader, to a process or
  a thread (fs/proc/loadavg.c). Ids ascend until they begin anew. While it stays, no process was created.
- A process has an id before ``/proc`` shows it, so an id that was not there is looked up once more.
"""

import os
from collections.abc import Container
from contextlib import suppress

from vitalsd.sources.linux.cpu_counters import read_file
from vitalsd.sources.linux.procfs import MalformedError, Stat, parse_stat
from vitalsd.sources.linux.system_text import parse_last_pid

__all__ = ["ProcessScan"]

SCAN_EVERY_NS = 5_000_000_000
"""Interval at which all processes of the procfs are looked at, ns."""
LOOKUPS_PER_PROCESS = 2
"""
Ids that are looked up one by one, for each process that there is. If more were given since the last time, all processes
are looked at, because that costs less.
"""
LOOKED_UP_AGAIN = 64
"""Ids that are looked up once more if they were not there: the newest ones."""


class ProcessScan:
    """
    Look for processes in one procfs.

    Args:
        procfs: descriptor of its directory.
        is_own_namespace: whether it is of our own pid namespace: ``/proc/loadavg`` shows the ids of that one.
    """

    def __init__(self, procfs: int, *, is_own_namespace: bool) -> None:
        self._procfs = procfs
        self._is_own_namespace = is_own_namespace
        self._newest: int | None = None
        """The id that was given last; ``None``: unknown."""
        self._absent: list[int] = []
        """Ids that had been given shortly before the last look, and did not exist then."""
        self._scanned_ns: int | None = None
        self._processes = 0
        """Number of processes when all were looked at."""
        self.is_full = False
        """Whether the last look was at all processes."""

    def look(self, now_ns: int, known: Container[int], *, closely: bool) -> dict[int, Stat]:
        """
        Return what may be new, by id: of processes, and of threads that have an id of their own.

        What is hidden or has ended is left out.

        Args:
            now_ns: monotonic time.
            known: ids to leave out.
            closely: look at all processes, if the kernel does not show whether any was created.
        """
        last, newest = self._newest, self._read_newest() if self._is_own_namespace else None
        self._newest = newest
        self.is_full = self._scanned_ns is None or now_ns - self._scanned_ns >= SCAN_EVERY_NS
        first, ids = 1, []
        if newest is None:
            self.is_full = self.is_full or closely
        elif last is not None and 0 <= newest - last <= LOOKUPS_PER_PROCESS * self._processes:
            first, ids = last + 1, [*self._absent, *range(last + 1, newest + 1)]
        else:
            self.is_full = True
        if self.is_full:
            self._scanned_ns = now_ns
            ids = [int(name) for name in os.listdir(self._procfs) if name.isdecimal()]
            self._processes = len(ids)
        found = {}
        for pid in ids:
            if pid not in known:
                with suppress(OSError, MalformedError):
                    found[pid] = parse_stat(read_file(f"{pid}/stat", self._procfs))
        if newest is not None:
            recent = range(max(first, newest - LOOKED_UP_AGAIN + 1), newest + 1)
            self._absent = [pid for pid in recent if pid not in found and pid not in known]
        return found

    def _read_newest(self) -> int | None:
        with suppress(OSError):
            return parse_last_pid(read_file("loadavg", self._procfs))
        return None
