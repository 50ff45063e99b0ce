"""
Read another process of macOS through libproc, which needs no task port and no privilege.

Facts about the kernel (xnu-11417; each has a test over the simulator):

- One reply of ``PROC_PIDTASKALLINFO`` contains the start time and the totals, so a reused pid is detected in the same
  reply.
- The kernel silently cuts the list of threads at the end of the buffer, and at 10 more than the number of threads
  before it made the list.
- The kernel finds each thread by a walk through the list of all: N threads cost N²/2 steps under the lock that the
  start and the exit of a thread need too.
- A thread that has ended is listed until it is reaped, with its final times and TH_STATE_HALTED.
- Zombies are not found, and a process of another effective user cannot be read.
- A process that exits is not found from the moment its teardown begins. NOTE_EXIT comes after the teardown, which
  frees memory and descriptors (exit1 and proc_exit, bsd/kern/kern_exit.c). PROC_PIDT_SHORTBSDINFO with arg 1 finds
  such a process.
- During exec the calls wait, and afterwards all thread ids are new.
"""

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from ctypes import c_uint64
from operator import add

from vitalsd.snapshot import Identity, Part, Snapshot
from vitalsd.sources.base import ExitStatus, KernelError, TargetGoneError, ThreadLook
from vitalsd.sources.darwin.apple_headers import (
    PROC_FLAG_INEXIT,
    SSTOP,
    SZOMB,
    proc_bsdshortinfo,
    proc_taskallinfo,
    proc_uniqidentifierinfo,
)
from vitalsd.sources.darwin.exit_status import ExitWatch
from vitalsd.sources.darwin.figures import FigureReader, TaskCounts
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem, load
from vitalsd.sources.darwin.task import Instant, OpenedProcess, Totals, process_name, translated_errors
from vitalsd.sources.darwin.thread_rows import ThreadRows
from vitalsd.sources.darwin.threads import ATTEMPTS, THREAD_GRAIN_NS, Living, RosterReader, living_threads, thread_look
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["WALK_LIMIT", "LibprocSource"]

EXIT_STEP_S = 0.05
"""Time limit of one wait for NOTE_EXIT, s; after it the state of the target is read again."""
EXIT_WAIT_S = 0.5
"""
Time that one snapshot waits for NOTE_EXIT, s: less than the 1 s that a sidecar has to close a target. Only the thread
that samples this target waits, and only after the target cannot be sampled any more.
"""
EXIT_LIMIT_S = 30.0
"""Time that an exit may take before its status counts as unknown, s."""

WALK_LIMIT = 2048
"""Most threads that a snapshot after the first looks up: 2 million steps in the kernel."""


class LibprocSource:
    """
    The source of any process of our effective user on macOS; see `vitalsd.sources.base.Source`.

    Args:
        pid: target.
        lib: libSystem; default: that of the system is loaded.
        wall_clock: returns the Unix time, ns.
        walk_limit: most threads that a snapshot looks up, besides new ones. Of more threads it looks up those that ran
            lately and those with the oldest readings, and shows the last reading of the others. Of more threads it
            does not call ``proc_pid_rusage`` either, for which the kernel walks through all of them under a lock.
        program_of: makes `Identity.program` from the command of the process; called when the source is opened and
            after each exec.

    Raises:
        SourceError: `NoSuchProcessError`, `AccessDeniedError`, `TargetGoneError` (a zombie), `UnsupportedError` or
            `KernelError`.
    """

    def __init__(
        self,
        pid: int,
        *,
        lib: LibSystem | None = None,
        wall_clock: Callable[[], int] = time.time_ns,
        walk_limit: int = WALK_LIMIT,
        program_of: ProgramOf = no_program,
    ) -> None:
        self._lib = lib or load()
        self._exit = ExitWatch(pid)
        try:
            self._target = OpenedProcess(self._lib, pid, os.getpid(), wall_clock, program_of)
            self._exit.drop_if_fired()
        except BaseException:
            self._exit.close()
            raise
        self._exit_status: ExitStatus | None = None
        self._exit_seen = 0.0
        """Monotonic time at which the target was first not found, s; 0: it was found so far."""
        self._walk_limit = walk_limit
        self._figures = FigureReader(self._lib, self._target, walk_limit)
        self._ids = (c_uint64 * 64)()
        self._rows = ThreadRows()
        self._rosters = RosterReader()
        self._unique: proc_uniqidentifierinfo | None = proc_uniqidentifierinfo()
        self._program: tuple[int | str, ...] = ()
        """The image for which `Identity.program` was determined."""
        self._turns: dict[int, tuple[int, ...]] = {}
        """Last reading of each thread by its id, the oldest reading first; empty if all threads are looked up."""
        self._active: frozenset[int] = frozenset()
        """Ids of the threads that were new, or had used CPU time, when they were looked up last."""
        self._closed = False

    def identity(self) -> Identity:
        """Return the identity as of the last snapshot."""
        return self._target.identity

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """Look at one thread; one call reads all of it, so `closely` adds whether SIGSTOP stops the process."""
        if self._closed:
            raise ValueError("the source is closed")
        try:
            with translated_errors(self._target.pid):
                look = thread_look(self._look_up((tid,)))
                if look is None or not closely:
                    return look
                stopped = self._target.refresh().pbsd.pbi_status == SSTOP
        except TargetGoneError:
            return None
        return look._replace(state="stopped") if stopped else look

    def restart(self) -> None:
        """Look every thread up again with the next snapshot."""
        self._turns.clear()

    def close(self) -> None:
        """Close the queue of the exit status. A second call does nothing."""
        self._closed = True
        self._exit.close()

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        """Read the counters; wait up to `EXIT_WAIT_S` if the target is exiting. See `Source.snapshot`."""
        # The reply with the times of a thread has its name too, so `names` is not needed.
        if self._closed:
            raise ValueError("the source is closed")
        try:
            with translated_errors(self._target.pid):
                return self._snapshot(parts)
        except TargetGoneError as error:
            error.exit_status = self._await_exit_status()
            raise

    def _await_exit_status(self) -> ExitStatus | None:
        """
        Return how the target ended; wait up to `EXIT_WAIT_S` for the end of its teardown.

        Raises:
            KernelError: the teardown takes longer; call again. After `EXIT_LIMIT_S` the exit status counts as unknown.
        """
        if self._exit_status is None:
            self._exit_seen = self._exit_seen or time.monotonic()
            until = time.monotonic() + EXIT_WAIT_S
            # The kernel sends the note before it makes the process a zombie, so read the state first and then the note.
            while True:
                exiting = self._exit.is_expected and self._is_exiting()
                waits = exiting and time.monotonic() < until
                self._exit_status = self._exit.exit_status(EXIT_STEP_S if waits else 0)
                if self._exit_status is not None or not waits:
                    break
            if self._exit_status is None and exiting and time.monotonic() < self._exit_seen + EXIT_LIMIT_S:
                raise KernelError(
                    f"target {self._target.pid} is exiting: the kernel still frees its memory and files; ask again"
                ) from None
        return self._exit_status

    def _is_exiting(self) -> bool:
        """Return whether the kernel is between the target's exit(2) and its NOTE_EXIT."""
        info = proc_bsdshortinfo()
        try:
            self._lib.proc.info(self._target.pid, info, 1)
        except (OSError, MachError):
            return False
        return bool(info.pbsi_flags & PROC_FLAG_INEXIT) and info.pbsi_status != SZOMB

    def _snapshot(self, parts: Part) -> Snapshot:
        target = self._target
        warnings = list(target.warnings)
        begun_ns = time.monotonic_ns()
        living, before, after, instant = self._read(warnings)
        thread_cpu_ns = list(map(add, living.user_ns, living.system_ns))
        roster = self._rosters.read(living.tids, living.names)
        image = self._image()
        if image != self._program and target.read_program():
            self._program = image
        ended_ns = time.monotonic_ns()
        task = target.info.ptinfo
        counts = TaskCounts(after, living, faults=task.pti_faults, pageins=task.pti_pageins)
        figures = self._figures.read(parts, counts, warnings)
        return Snapshot(
            monotonic_ns=instant.monotonic_ns,
            boottime_ns=instant.boottime_ns,
            wall_ns=instant.wall_ns,
            uptime_ns=instant.uptime_ns,
            skew_ns=ended_ns - begun_ns,
            cpu_ns=target.ns(after.user + after.system),
            cpu_grain_ns=target.tick_ns,
            exited_cpu_ns=target.exited_ns(before, after, sum(thread_cpu_ns)),
            rss_bytes=task.pti_resident_size,
            vm_bytes=task.pti_virtual_size,
            # SIGSTOP suspends the task and leaves its threads waiting: only p_stat reports it (bsd/kern/kern_sig.c).
            state="stopped" if target.info.pbsd.pbi_status == SSTOP else living.main_state,
            image=image,
            roster=roster,
            thread_cpu_ns=thread_cpu_ns,
            thread_grain_ns=THREAD_GRAIN_NS,
            thread_lag_ns=living.lag_ns,
            wait_ns=figures.wait_ns,
            wait_error_ns=figures.wait_error_ns,
            cpu_count=target.cpu_count,
            source="proc_pidinfo",
            figures=figures.process,
            machine=figures.machine,
            tree=figures.tree,
            thread_figures=target.thread_figures(living) if Part.THREADS in parts else None,
            warnings=tuple(warnings),
        )

    def _read(self, warnings: list[str]) -> tuple[Living, Totals, Totals, Instant]:
        """
        Return the threads, the totals before and after, and the instant of the totals.

        The totals after the threads are read only if a thread has ended; otherwise they are those before.
        """
        target = self._target
        for _ in range(ATTEMPTS):
            # Listed before the total is read, so that a thread that is reaped between the two is found missing.
            thread_ids = self._list()
            info, instant = target.refresh(), target.now()
            if info.ptinfo.pti_threadnum > len(thread_ids):
                thread_ids = self._list()
            before = after = _totals(info)
            living, ended = self._walk(thread_ids, warnings)
            if ended:
                after, instant = _totals(target.refresh()), target.now()
            if living.tids:
                return living, before, after, instant
        raise KernelError(f"process {target.pid}: none of its threads could be read; it may be executing a program")

    def _list(self) -> list[int]:
        while True:
            buffer = self._ids
            number = self._lib.proc.list_of(self._target.pid, "PROC_PIDLISTTHREADIDS", buffer) // ctypes.sizeof(
                c_uint64
            )
            if number < len(buffer):
                return sorted(buffer[:number])
            self._ids = (c_uint64 * (2 * len(buffer)))()

    def _walk(self, thread_ids: Sequence[int], warnings: list[str]) -> tuple[Living, int]:
        """Return the living threads, and how many of those that were looked up had ended."""
        if len(thread_ids) <= self._walk_limit:
            self._turns.clear()
            living = self._look_up(thread_ids)
            return living, len(thread_ids) - len(living.tids)
        chosen = self._choose(thread_ids)
        read = self._look_up(chosen)
        listed = set(thread_ids)
        known = {tid: row for tid, row in self._turns.items() if tid in listed}
        active = set()
        for tid in chosen:
            known.pop(tid, None)
        for row in zip(*read, strict=True):
            if (old := self._turns.get(row[0])) is None or old[1:3] != row[1:3]:
                active.add(row[0])
            known[row[0]] = row
        self._turns, self._active = known, frozenset(active)
        warnings.append(
            f"threads: {len(thread_ids)} of them; {self._walk_limit} are read per snapshot, those that ran"
            " lately and the others in turn, so a thread that just woke up may show an older reading"
        )
        return Living(*zip(*(known[tid] for tid in sorted(known)), strict=True)), len(chosen) - len(read.tids)

    def _choose(self, thread_ids: Sequence[int]) -> list[int]:
        """Choose new threads, then active ones, then those with the oldest readings, which are first in `_turns`."""
        listed = set(thread_ids)
        chosen = [tid for tid in thread_ids if tid not in self._turns]
        active = dict.fromkeys(sorted(self._active & listed)[: self._walk_limit // 2])
        waiting = [tid for tid in self._turns if tid in listed and tid not in active]
        room = max(0, self._walk_limit - len(chosen))
        return sorted(chosen + [*active, *waiting][:room])

    def _look_up(self, thread_ids: Sequence[int]) -> Living:
        return living_threads(self._lib.proc.thread_infos(self._target.pid, thread_ids, self._rows), self._rows)

    def _image(self) -> tuple[int | str, ...]:
        """Return a value that changes at exec: a version from the private flavor, or without that only the name."""
        if self._unique is not None:
            try:
                self._lib.proc.info(self._target.pid, self._unique)
            except ProcessLookupError:
                raise
            except (OSError, MachError):
                self._unique = None
            else:
                return (self._unique.p_idversion,)
        return (process_name(self._target.info.pbsd),)


def _totals(info: proc_taskallinfo) -> Totals:
    task = info.ptinfo
    return Totals(task.pti_total_user, task.pti_total_system, task.pti_threads_user + task.pti_threads_system)
