"""
Read a process of macOS and its descendants.

Facts about the kernel (xnu-11417; each has a test over the simulator):

- ``proc_listchildpids`` lists zombies and processes of other users, and each call walks through all processes.
- ``proc_pid_rusage`` answers for a zombie with its final CPU time. The kernel adds that to ``ri_child_*`` of the parent
  when the parent waits for it, and at once if the parent ignores SIGCHLD (bsd/kern/kern_exit.c).
- Between its exit and its state as a zombie a process is listed, and no call finds it.
- If a parent ends, its child becomes a child of launchd. A source that has seen it before follows it.

Helpers that launchd starts for an application (XPC services) are children of launchd from the beginning, so they are
not descendants and are not read.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vitalsd.snapshot import ProcessTree
from vitalsd.sources.darwin.apple_headers import RUSAGE_INFO_V2, proc_taskallinfo, rusage_info_v2
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.task import process_name
from vitalsd.sources.process_tree import CHILDREN, Member, ProcessLedger

__all__ = ["ChildrenReader"]


@dataclass
class _Reading:
    """Hold what one walk through the tree has found."""

    rows: dict[int, Member] = field(default_factory=dict)
    """By pid, a parent before its children."""
    passed: set[int] = field(default_factory=lambda: {os.getpid()})
    """Pids that need no look; this process may be a sidecar that the target has started, and is left out."""
    unreadable: int = 0
    is_cut: bool = False
    """Whether there are more than `CHILDREN`."""


class ChildrenReader:
    """
    Read the tree of one process; its counters begin at 0 with the first reading.

    Args:
        lib: libSystem.
        pid: target.
        ns: converts kernel ticks to ns.
        cpu_count: cores of the machine; 0: unknown.
    """

    def __init__(self, lib: LibSystem, pid: int, ns: Callable[[int], int], cpu_count: int) -> None:
        self._lib = lib
        self._pid = pid
        self._ns = ns
        self._ledger = ProcessLedger(cpu_count)
        self._begun_ns = 0
        """When the reading before began, on the clock of the starts of processes, ns."""
        self._usage = rusage_info_v2()
        self._info = proc_taskallinfo()

    def read(self, warnings: list[str]) -> ProcessTree | None:
        """
        Read the tree. It is ``None`` if the kernel does not show the target or its children.

        Args:
            warnings: gets the reason why the tree, or a part of it, is missing.

        Raises:
            ProcessLookupError: the target has exited.
        """
        begun_ns = self._lib.host.absolute_ns()
        try:
            reading = self._walk()
        except ProcessLookupError:
            raise
        except (OSError, MachError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            warnings.append(f"children unknown: {reason}")
            return None
        if reading.unreadable:
            warnings.append(f"children: {reading.unreadable} could not be read, as those of another user are")
        if reading.is_cut:
            warnings.append(f"children: there are more than {CHILDREN}; the others are not counted")
        elapsed_ns, self._begun_ns = begun_ns - self._begun_ns, begun_ns
        missed = bool(reading.unreadable) or reading.is_cut
        return self._ledger.read(list(reading.rows.values()), elapsed_ns, missed=missed)

    def _walk(self) -> _Reading:
        """Return the target and its descendants, and those that were so in the reading before and still live."""
        reading = _Reading()
        reading.rows[self._pid] = self._row(self._pid, 0)
        self._descend(reading, self._pid)
        for key in self._ledger.members:
            if key[0] not in reading.passed and not reading.is_cut:
                self._follow(reading, key[0])
        return reading

    def _descend(self, reading: _Reading, root: int) -> None:
        """Add the descendants of a process."""
        known = {key[0]: row for key, row in self._ledger.members.items()}
        reading.passed.add(root)
        parents = deque([root])
        while parents:
            parent = parents.popleft()
            for pid in self._lib.proc.children(parent):
                if pid in reading.passed:
                    continue
                if len(reading.rows) > CHILDREN:
                    reading.is_cut = True
                    return
                reading.passed.add(pid)
                parents.append(pid)
                try:
                    reading.rows[pid] = self._row(pid, parent)
                except ProcessLookupError:
                    # It is exiting, or its parent has just waited for it, as the next reading of the parent shows.
                    if pid in known:
                        reading.rows[pid] = known[pid]._replace(is_young=False, is_living=False)
                except (OSError, MachError):
                    reading.unreadable += 1

    def _follow(self, reading: _Reading, pid: int) -> None:
        """Add a process of the reading before if it lives and its parent has ended, with its descendants."""
        try:
            row = self._row(pid, 0)
        except (OSError, MachError):
            return
        if row.key in self._ledger.members and row.is_living:
            reading.rows[pid] = row
            self._descend(reading, pid)

    def _row(self, pid: int, parent: int) -> Member:
        """
        Read one process.

        Raises:
            ProcessLookupError: there is no such process; or it is the target, and has exited.
            OSError: it cannot be read, with the errno.
            MachError: a reply is short.
        """
        usage = self._usage
        self._lib.proc.rusage(pid, usage, RUSAGE_INFO_V2)
        key = (pid, int(usage.ri_proc_start_abstime))
        known = self._ledger.members.get(key)
        name, thread_count, is_living = known.name if known else "", 0, False
        if not usage.ri_proc_exit_abstime:
            try:
                self._lib.proc.info(pid, self._info)
                name = process_name(self._info.pbsd)
                thread_count, is_living = max(1, self._info.ptinfo.pti_threadnum), True
            except ProcessLookupError:  # it has just exited
                pass
        if pid == self._pid and (not is_living or (self._ledger.members and not known)):
            raise ProcessLookupError
        return Member(
            key=key,
            parent=parent,
            name=name,
            cpu_ns=self._ns(usage.ri_user_time + usage.ri_system_time),
            reaped_ns=self._ns(usage.ri_child_user_time + usage.ri_child_system_time),
            rss_bytes=int(usage.ri_resident_size),
            thread_count=thread_count,
            is_young=self._ns(usage.ri_proc_start_abstime) >= self._begun_ns,
            is_living=is_living,
        )
