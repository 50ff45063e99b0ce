"""
Detect when a Linux process executes another program, and read its state.

Facts about the kernel on which this module depends (v6.18; each has a test):

- At exec the calling thread gets the id and the start time of the main thread, and keeps its own run time.
- ``VmPeak`` in ``status`` never decreases during the life of a memory map, and an executed program gets a new map.
"""

import os
import time

from vitalsd.snapshot import Identity, ThreadRoster
from vitalsd.sources.base import SourceError
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS
from vitalsd.sources.linux.freezer import is_frozen
from vitalsd.sources.linux.process_files import MemoryPages, ProcessFiles
from vitalsd.sources.linux.process_identity import LinuxProcessIdentityReader, boottime_offset_ticks
from vitalsd.sources.linux.processes import CLOCK_BOOTTIME, PAGE_BYTES, PF_KTHREAD, running_command
from vitalsd.sources.linux.procfs import STATES
from vitalsd.sources.programs import Command, ProgramOf, no_program

__all__ = ["RunningProgram"]

STAT_INTERVAL_NS = 1_000_000_000
"""
Interval at which the ``stat`` of the main thread is read, ns. It is also read when the memory map or the set of threads
has changed.
"""


class RunningProgram:
    """
    The program that a process runs, and whether the process is stopped.

    Args:
        files: of the process.
        program_of: makes `Identity.program`; called now and after each exec.
        is_own: whether it is this process, which cannot be frozen while it runs this code.
    """

    def __init__(self, files: ProcessFiles, program_of: ProgramOf, *, is_own: bool) -> None:
        self._files = files
        self._program_of = program_of
        self._is_own = is_own
        self._seen_memory = -1, -1
        """Pages of address space and of text when the ``stat`` of the main thread was read last."""
        self._seen_threads = ThreadRoster()
        """The threads when the ``stat`` of the main thread was read last."""
        self._stat_read_ns = 0
        self._stat_cpu_ns = -1
        self._peak_pages = 0
        """Largest address space of the running program in any snapshot, pages."""
        self._addresses: tuple[int, ...] = ()
        self._text_pages = -1
        self._executions = 0
        self._named: ThreadRoster | None = None
        """The roster in which `follow_name` looked up the name of the main thread last."""
        self.image: tuple[int, ...] = ()
        """Value of `Snapshot.image`; the same object until the process executes another program."""
        self.state: str | None = None
        """Value of `Snapshot.state`."""
        self.start_ns = files.start_ticks * USER_TICK_NS
        """Start of the process on CLOCK_BOOTTIME, ns."""
        self.identity = Identity(
            platform="linux",
            pid=files.pid,
            name=files.first_name,
            boot_id=LinuxProcessIdentityReader(files.root).boot_id(),
            start_key=files.start_ticks - boottime_offset_ticks(),
            started_unix_ns=time.time_ns() - time.clock_gettime_ns(CLOCK_BOOTTIME) + self.start_ns,
            program=self._read_program(),
        )

    def look(self, roster: ThreadRoster, now_ns: int, cpu_ns: int, *, closely: bool) -> MemoryPages:
        """
        Return the pages in use, and find out whether the process was stopped or has executed a program.

        Args:
            roster: the threads that were read.
            now_ns: monotonic time, ns.
            cpu_ns: CPU time of the process; if it has grown since the last call, the process is not frozen.
            closely: read the ``stat`` of the main thread also if it is not due.

        Raises:
            OSError, MalformedError, TargetGoneError: a file of the process cannot be read.
        """
        memory = self._files.memory()
        # When another thread than the main one calls exec, all other threads end.
        replaced = not roster.has_same_threads(self._seen_threads)
        due = closely or replaced or now_ns - self._stat_read_ns >= STAT_INTERVAL_NS
        if due or not memory.vm or (memory.vm, memory.text) != self._seen_memory:
            stat = leader = self._files.leader_stat()
            if memory.vm or leader.flags & PF_KTHREAD:
                self._files.member = self._files.pid
            else:
                memory, stat = self._files.find_member()
            self.state = STATES.get(stat.state)
            may_be_frozen = stat.state in "SD" and (closely or cpu_ns == self._stat_cpu_ns) and not self._is_own
            if may_be_frozen and is_frozen(self._files, stat.state):
                self.state = "frozen"
            self._follow_exec(stat.image, memory, leader.name, replaced=replaced)
            self._seen_memory, self._seen_threads = (memory.vm, memory.text), roster
            self._stat_read_ns, self._stat_cpu_ns = now_ns, cpu_ns
        return memory

    def set_executed(self) -> None:
        """Count the program as another one from now on, so that no measurement spans this moment."""
        self._executions += 1
        self.image = self._executions, *self._addresses, self._text_pages

    def follow_name(self, roster: ThreadRoster) -> None:
        """Use the name of the main thread, which may rename itself, as the name of the process."""
        if self._named is roster:
            return
        self._named = roster
        if self.identity.pid in roster.tids:
            name = roster.names[roster.tids.index(self.identity.pid)]
            if name != self.identity.name:
                self.identity = self.identity._replace(name=name)

    def _follow_exec(self, addresses: tuple[int, ...], memory: MemoryPages, name: str, *, replaced: bool) -> None:
        """
        Find out whether the process runs another program now, and read its name.

        Addresses may be missing: a process can hide them, and has none as it dies and inside exec, when its command
        line is missing too. A program that executes itself may have the same addresses. Then a ``VmPeak`` below the
        largest size in an earlier snapshot shows that the memory map is new.

        Args:
            addresses: fixed at exec; empty: not shown.
            memory: pages in use.
            name: of the main thread.
            replaced: whether the threads are others than before.
        """
        known, known_text = self._addresses, self._text_pages
        self._addresses, self._text_pages = addresses or known, memory.text
        executed = memory.text != known_text or bool(addresses and known and addresses != known)
        changed = replaced or memory.vm != self._seen_memory[0]
        if changed and not executed and memory.vm < self._peak_pages:
            peak = self._files.status().get("VmPeak")
            executed = peak is not None and peak // PAGE_BYTES < self._peak_pages
        self._peak_pages = memory.vm if executed else max(self._peak_pages, memory.vm)
        if executed:
            self.set_executed()
        if executed or (addresses and not known):
            self.identity = self.identity._replace(name=name, program=self._read_program())

    def _read_program(self) -> str:
        if self._program_of is no_program:
            return ""
        try:
            command = self._files.of_member(_command)
        except (OSError, SourceError):
            return ""
        return self._program_of(command) if command is not None else ""


def _command(path: str, directory: int) -> Command | None:
    process = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        return running_command(process)
    finally:
        os.close(process)
