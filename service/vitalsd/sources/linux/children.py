"""
Find the descendants of a Linux process, and read their CPU time and memory.

Facts about the kernel on which this module depends (v6.18; each has a test):

- A zombie has its ``stat`` and its CPU clock until its parent has waited for it. The parent is charged before that
  ``stat`` disappears (kernel/exit.c, wait_task_zombie).
- A process without a parent goes to an ancestor that is a subreaper, or to init. It stays a member if it was one.
- The threads of a process have ids below ``/proc`` that a listing does not show; their ``stat`` has the parent of the
  process.
"""

import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass

from vitalsd.snapshot import ProcessTree
from vitalsd.sources.linux.application_group import application_group, pids_in
from vitalsd.sources.linux.cpu_counters import (
    CONTENT_BYTES,
    GONE,
    USER_TICK_NS,
    StatFiles,
    process_clock,
    read_file,
)
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.process_scan import ProcessScan
from vitalsd.sources.linux.processes import PAGE_BYTES, hides_processes, pages_of_sibling
from vitalsd.sources.linux.procfs import MalformedError, Stat, parse_stat, parse_statm, parse_tgid
from vitalsd.sources.process_tree import CHILDREN, Member, ProcessLedger

__all__ = ["Descendants"]

ATTEMPTS = 4
"""Attempts to read all members while none of them is charged for a child that ends."""
GRAIN_NS = 2 * USER_TICK_NS
"""Most that is cut off from the CPU time of children, ns: user and system time are each rounded down to a tick."""


@dataclass(slots=True, eq=False)
class _Descendant:
    """A living descendant, and how it is read."""

    row: Member
    clock: int | None
    handle: int = 0
    content: bytes = b""
    """Its ``stat``."""


class Descendants:
    """
    The descendants of one process, with what they used since the first reading.

    This process may be a sidecar that the target has started, and is left out. In a procfs of another pid namespace its
    pid is the number of another process.

    Args:
        files: of the process.
        has_clocks: whether pids in the procfs are those of our own pid namespace.
        fd_budget: descriptors that may stay open for descendants; the files of others are opened at each reading.
    """

    def __init__(self, files: ProcessFiles, *, has_clocks: bool, fd_budget: int) -> None:
        self._files = files
        self._has_clocks = has_clocks
        self._fd_budget = fd_budget
        self._procfs = -1
        self._target = Member((files.pid, files.start_ticks), 0, "", 0, 0, 0, 1, is_young=False)
        self._members: dict[int, _Descendant] = {}
        """By pid; each after its parent."""
        self._left_out = {files.pid, os.getpid()} if has_clocks else {files.pid}
        """Pids that are left out: of the target, and of this process."""
        self._ledger = ProcessLedger(os.cpu_count() or 0, GRAIN_NS)
        self._read_at: tuple[int, int] | None = None
        """Monotonic time and time since boot at the last reading; ``None``: there was none."""
        self._too_many = False
        """Whether there were more than `CHILDREN` when all processes were looked at."""
        self._group: str | None = None
        """Control group of the application; ``None``: it has none of its own."""
        self._warnings: list[str] = []

    def close(self) -> None:
        """Release every descriptor. A second call does nothing."""
        while self._members:
            self._stats.close(self._members.popitem()[1].handle)
        if self._procfs >= 0:
            os.close(self._procfs)
            self._procfs = -1

    def read(
        self, cpu_ns: int, rss_bytes: int, at: tuple[int, int], warnings: list[str], *, closely: bool
    ) -> ProcessTree:
        """
        Read the tree.

        Args:
            cpu_ns: CPU time of the process itself.
            rss_bytes: its resident memory.
            at: monotonic time and time since boot, ns.
            warnings: gets a sentence if the procfs hides processes.
            closely: look at all processes, if the kernel does not show whether any was created.

        Raises:
            OSError, MalformedError: a file of the process itself cannot be read.
        """
        if self._procfs < 0:
            self._open()
        warnings += self._warnings
        is_settled, missed = self._read_members()
        missed |= self._find_new(at[0], closely=closely)
        self._target = self._target._replace(cpu_ns=cpu_ns, rss_bytes=rss_bytes)
        rows = [self._target, *(member.row for member in self._members.values())]
        elapsed_ns = at[0] - self._read_at[0] if self._read_at else 0
        self._read_at = at
        return self._ledger.read(rows, elapsed_ns, missed=missed, is_settled=is_settled)

    def _open(self) -> None:
        root = self._files.root
        self._procfs = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self._stats = StatFiles(self._procfs, self._fd_budget)
        self._scan = ProcessScan(self._procfs, is_own_namespace=self._has_clocks)
        if os.geteuid() != 0 and hides_processes(root):
            self._warnings.append(f"children: {root} hides the processes of other users (hidepid); one may be missing")

    # Known members

    def _read_members(self) -> tuple[bool, bool]:
        """
        Read all members, and forget those that have ended.

        If a member ends while others are read, its parent may have been read before it was charged: read all again.

        Returns:
            Whether the ancestors of those that have ended were read after they were charged; whether a member could not
            be read.
        """
        unreadable = False
        for _ in range(ATTEMPTS):
            self._target = self._target._replace(reaped_ns=self._files.leader_stat().reaped_ticks * USER_TICK_NS)
            count, unreadable = len(self._members), False
            for pid, member in list(self._members.items()):
                try:
                    self._read_member(member)
                except (OSError, MalformedError) as error:
                    if isinstance(error, OSError) and error.errno in GONE:
                        self._stats.close(self._members.pop(pid).handle)
                    else:
                        unreadable = True
            if len(self._members) == count or self._are_charged():
                return True, unreadable
        return False, unreadable

    def _are_charged(self) -> bool:
        """Return whether the living ancestors of members that have ended were read after they were charged."""
        living = {member.row.key: member for member in self._members.values()}
        for heir in set(self._ledger.heirs({self._target.key, *living}).values()):
            if heir is None:
                continue
            member = living.get(heir)
            try:
                stat = parse_stat(self._content(member)) if member else self._files.leader_stat()
            except (OSError, MalformedError):  # It has ended, too.
                return False
            if stat.reaped_ticks * USER_TICK_NS != (member.row if member else self._target).reaped_ns:
                return False
        return True

    def _content(self, member: _Descendant) -> bytes:
        return self._stats.contents((member.handle,), CONTENT_BYTES)[0]

    def _read_member(self, member: _Descendant) -> None:
        """
        Read a member. Raises `OSError` with an errno in `GONE` if it has ended.

        The clock goes by the pid. The ``stat`` that is read after it shows that the process still had that pid.
        """
        row = member.row
        cpu_ns = row.cpu_ns
        if member.clock is not None:
            with suppress(OSError):  # It has ended.
                cpu_ns = time.clock_gettime_ns(member.clock)
        content = self._content(member)
        if content != member.content:
            stat = parse_stat(content)
            pid, start_ticks = row.key
            if stat.start_ticks != start_ticks:
                raise ProcessLookupError(errno.ESRCH, "the pid is another process's")
            member.content = content
            if member.clock is None:
                cpu_ns = (stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS
            member.row = Member(
                key=row.key,
                parent=stat.parent,
                name=stat.name,
                cpu_ns=cpu_ns,
                reaped_ns=stat.reaped_ticks * USER_TICK_NS,
                rss_bytes=self._rss_bytes(pid, stat.thread_count),
                thread_count=stat.thread_count,
                is_young=row.is_young,
            )
        elif cpu_ns != row.cpu_ns:
            member.row = row._replace(cpu_ns=cpu_ns)

    def _rss_bytes(self, pid: int, thread_count: int) -> int:
        """Return the resident memory by ``statm``, because ``stat`` is only about right; 0 if it has ended."""
        try:
            pages = parse_statm(read_file(f"{pid}/statm", self._procfs))[1]
            if pages or thread_count <= 1:
                return pages * PAGE_BYTES
            directory = os.open(str(pid), os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._procfs)
            try:  # Its main thread has exited.
                return pages_of_sibling(directory)[0][1] * PAGE_BYTES
            finally:
                os.close(directory)
        except (OSError, MalformedError):
            return 0

    # New members

    def _find_new(self, now_ns: int, *, closely: bool) -> bool:
        """Add processes that have become descendants; return whether the reading lacks something."""
        found = self._scan.look(now_ns, self._members.keys() | self._left_out, closely=closely)
        if self._scan.is_full:
            self._too_many = False
            self._group = application_group(self._files) if self._has_clocks else None
        missed = False
        for pid in self._relatives(found):
            if len(self._members) >= CHILDREN:
                self._too_many = True
                break
            missed |= not self._add(pid, found[pid])
        return missed or self._too_many

    def _relatives(self, found: dict[int, Stat]) -> list[int]:
        """Return which of these processes are descendants, each after its parent; also ids of their threads."""
        by_parent: dict[int, list[int]] = {}
        for pid, stat in found.items():
            by_parent.setdefault(stat.parent, []).append(pid)
        family = [self._files.pid, *self._members]
        known = len(family)
        for pid in family:
            family += by_parent.pop(pid, ())
        if self._group is not None:
            daemons = (pids_in(self._group) & found.keys()).difference(family)
            if any(found[pid].start_ticks <= self._files.start_ticks for pid in daemons):
                self._group = None  # The target is not the first process of the group: it is another application's.
            else:
                family += sorted(daemons)
        return family[known:]

    def _add(self, pid: int, seen: Stat) -> bool:
        """
        Add a descendant, unless it has ended; return whether it was readable.

        Args:
            pid: of it, or the id of a thread, which is not added.
            seen: its ``stat``.
        """
        is_young = self._read_at is not None and seen.start_ticks >= self._read_at[1] // USER_TICK_NS
        clock = process_clock(pid) if self._has_clocks else None
        member = _Descendant(Member((pid, seen.start_ticks), 0, "", 0, 0, 0, 1, is_young), clock)
        try:
            if seen.thread_count > 1 and parse_tgid(read_file(f"{pid}/status", self._procfs)) not in (pid, None):
                return True
            member.handle = self._stats.open(pid)
            try:
                self._read_member(member)
            except BaseException:
                self._stats.close(member.handle)
                raise
        except (OSError, MalformedError) as error:
            return isinstance(error, OSError) and error.errno in GONE
        self._members[pid] = member
        return True
