"""
Read our own process on macOS, through Mach calls on its own task port.

Facts about the kernel (xnu-11417; each has a test over the simulator):

- ``MACH_TASK_BASIC_INFO`` counts the CPU time of *terminated* threads only, so it is 0 for a busy process without
  terminated threads. ``TASK_ABSOLUTETIME_INFO`` has the total and the part of living threads, both of one instant;
  their difference is exactly the time of exited threads.
- The kernel counts a thread that has ended as terminated only after the reaper has handled it. Until then the thread
  is listed, with a port that is null, dead or answers one of three codes.
- One reply has the name and both times of a thread, another one its id.
"""

import os
import time
from collections.abc import Callable
from operator import add

from vitalsd.snapshot import Identity, Part, Snapshot
from vitalsd.sources.base import KernelError, TargetGoneError, ThreadLook
from vitalsd.sources.darwin.apple_headers import (
    mach_task_basic_info,
    task_absolutetime_info,
    task_events_info,
    task_vm_info,
)
from vitalsd.sources.darwin.figures import FigureReader, Figures, TaskCounts
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem, load
from vitalsd.sources.darwin.task import Instant, OpenedProcess, Totals, translated_errors
from vitalsd.sources.darwin.thread_rows import ThreadRows
from vitalsd.sources.darwin.threads import ATTEMPTS, THREAD_GRAIN_NS, Living, RosterReader, living_threads, thread_look
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["MachSource"]


class MachSource:
    """
    The source of this process on macOS, which needs no privilege; see `vitalsd.sources.base.Source`.

    Args:
        lib: libSystem; default: that of the system is loaded.
        wall_clock: returns the Unix time, ns.
        program_of: makes `Identity.program` from the command of the process.

    Raises:
        SourceError: `UnsupportedError` or `KernelError`.
    """

    def __init__(
        self,
        *,
        lib: LibSystem | None = None,
        wall_clock: Callable[[], int] = time.time_ns,
        program_of: ProgramOf = no_program,
    ) -> None:
        self._lib = lib or load()
        self._pid = os.getpid()
        self._target = OpenedProcess(self._lib, self._pid, self._pid, wall_clock, program_of)
        self._figures = FigureReader(self._lib, self._target)
        self._basic = mach_task_basic_info()
        self._times = task_absolutetime_info()
        self._events = task_events_info()
        self._vm = task_vm_info()
        self._rows = ThreadRows()
        self._rosters = RosterReader()
        self._closed = False

    def identity(self) -> Identity:
        """Return the identity, which does not change."""
        return self._target.identity

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """Look at one thread. It reads all threads, because only their ports name them, so `closely` adds nothing."""
        if self._closed:
            raise ValueError("the source is closed")
        if os.getpid() != self._pid:
            return None
        with translated_errors(self._pid), self._lib.mach.thread_ports() as ports:
            living = living_threads(self._lib.mach.thread_infos(ports, self._rows), self._rows)
        return thread_look(living, tid)

    def restart(self) -> None:
        """Do nothing, because only names are kept from one snapshot to the next."""

    def close(self) -> None:
        """Refuse further snapshots; no resource is held between snapshots."""
        self._closed = True

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        """Read the counters. Raises `TargetGoneError` in a forked child; see `Source.snapshot`."""
        # The reply with the times of a thread has its name too, so `names` is not needed.
        if self._closed:
            raise ValueError("the source is closed")
        if os.getpid() != self._pid:
            raise TargetGoneError(
                f"target {self._pid} is the parent of this process, and a task port names only oneself"
            )
        with translated_errors(self._pid):
            return self._snapshot(parts)

    def _snapshot(self, parts: Part) -> Snapshot:
        lib, target = self._lib, self._target
        warnings = list(target.warnings)
        begun_ns = time.monotonic_ns()
        living, before, after, instant = self._read()
        thread_cpu_ns = list(map(add, living.user_ns, living.system_ns))
        lib.mach.task_info(self._basic)
        roster = self._rosters.read(living.tids, living.names)
        ended_ns = time.monotonic_ns()
        figures = self._read_figures(parts, after, living, warnings)
        return Snapshot(
            monotonic_ns=instant.monotonic_ns,
            boottime_ns=instant.boottime_ns,
            wall_ns=instant.wall_ns,
            uptime_ns=instant.uptime_ns,
            skew_ns=ended_ns - begun_ns,
            cpu_ns=target.ns(after.user + after.system),
            cpu_grain_ns=target.tick_ns,
            exited_cpu_ns=target.exited_ns(before, after, sum(thread_cpu_ns)),
            rss_bytes=self._basic.resident_size,
            vm_bytes=self._basic.virtual_size,
            state=living.main_state,
            image=None,
            roster=roster,
            thread_cpu_ns=thread_cpu_ns,
            thread_grain_ns=THREAD_GRAIN_NS,
            thread_lag_ns=living.lag_ns,
            wait_ns=figures.wait_ns,
            wait_error_ns=figures.wait_error_ns,
            cpu_count=target.cpu_count,
            source="thread_info",
            figures=figures.process,
            machine=figures.machine,
            tree=figures.tree,
            thread_figures=target.thread_figures(living) if Part.THREADS in parts else None,
            warnings=tuple(warnings),
        )

    def _read(self) -> tuple[Living, Totals, Totals, Instant]:
        """
        Return the threads, the totals before and after, and the instant of the totals.

        The totals after the threads are read only if a thread has ended; otherwise they are those before.
        """
        for _ in range(ATTEMPTS):
            # Listed before the total is read, so that a thread that is reaped between the two is found missing.
            with self._lib.mach.thread_ports() as ports:
                before = after = self._totals()
                instant = self._target.now()
                thread_ids = self._lib.mach.thread_infos(ports, self._rows)
            living = living_threads(thread_ids, self._rows)
            if len(living.tids) < len(ports):
                after, instant = self._totals(), self._target.now()
            if living.tids:
                return living, before, after, instant
        raise KernelError(f"process {self._pid}: thread_info finds none of its threads alive, though one is asking")

    def _totals(self) -> Totals:
        times = self._times
        self._lib.mach.task_info(times)
        return Totals(times.total_user, times.total_system, times.threads_user + times.threads_system)

    def _read_figures(self, parts: Part, totals: Totals, living: Living, warnings: list[str]) -> Figures:
        if not parts & (Part.FIGURES | Part.CHILDREN):
            return Figures()
        self._lib.mach.task_info(self._events)
        counts = TaskCounts(
            totals,
            living,
            faults=self._events.faults,
            pageins=self._events.pageins,
            peak_rss_bytes=self._basic.resident_size_max,
            footprint_bytes=self._footprint_bytes(),
        )
        return self._figures.read(parts, counts, warnings)

    def _footprint_bytes(self) -> int | None:
        """
        Return the footprint; ``None`` if TASK_VM_INFO fails. The reply of ``proc_pid_rusage`` has the same ledger.

        The call may wait for the lock of our own memory map, without the interpreter lock, and no longer than any
        thread waits for it at its next page fault.
        """
        try:
            self._lib.mach.task_info(self._vm)
        except MachError:
            return None
        return int(self._vm.phys_footprint)
