"""
The Linux source: ``/proc`` and the CPU clocks.

Some facts about the kernel on which the design rests (v6.18; each has a test):

- A descriptor of ``/proc/<pid>`` or of a file below it stays bound to that process or thread: after
  its exit every read fails with ESRCH, even when the number has been given away again.
- ``schedstat`` is the run time in ns, but of a thread that is running now it is only as fresh as the
  last tick. ``clock_gettime`` on the clock of a thread of one's own process settles it first.
- The CPU clock of a process is the sum of its living threads' run times plus that of its exited
  ones, and may be read for any pid of our pid namespace by any user.
- ``st_nlink`` of ``task/`` is 2 + the number of threads. Equal to the threads held open, and all of
  them then readable: nobody came or went.
- A dead main thread whose siblings live on is a zombie without memory, while ``task/`` still lists
  the others. Only a zombie that is alone is a dead process.
- At exec the calling thread takes over the id and the start time of the main thread, and keeps its own run time.
- ``VmPeak`` of ``status`` never falls in the life of a memory map, and a program that is executed gets a new one.
- Files below ``task/<tid>/`` tell of the whole process too: memory, descriptors, command line. They do so for a
  living thread when the main thread has exited.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from vitalsd.snapshot import Extras, Identity, Snapshot, ThreadExtras, ThreadRoster
from vitalsd.sources.base import AccessDenied, KernelError, NoSuchProcess, SourceError, TargetGone, Unsupported
from vitalsd.sources.linux.cpu_counters import (
    GONE,
    USER_TICK_NS,
    SchedstatFiles,
    StatFiles,
    ThreadClocks,
    ThreadCounter,
    ThreadNames,
    read_file,
    reread,
)
from vitalsd.sources.linux.exit_status import ending
from vitalsd.sources.linux.process_identity import LinuxBirths, boottime_offset_ticks
from vitalsd.sources.linux.processes import CLOCK_BOOTTIME, PAGE_BYTES, PF_KTHREAD, running_command
from vitalsd.sources.linux.procfs import (
    STATES,
    Malformed,
    Stat,
    freezer_paths,
    parse_run_times,
    parse_stat,
    parse_statm,
    parse_status,
    parse_tgid,
)
from vitalsd.sources.linux.threads import ThreadTable
from vitalsd.sources.programs import Command, ProgramOf, no_program

__all__ = ["LinuxSource"]

LOOK_EVERY_NS = 1_000_000_000
"""The main thread's stat is read that often, and whenever the memory map or the set of threads has changed."""
DECIDE_EVERY_NS = 60_000_000_000
"""A kernel may begin to count run times while it runs (kernel.task_delayacct), so that often it is looked at again."""
ATTEMPTS = 8
"""Readings of all threads, until the target does not execute a program meanwhile."""
KEPT_NAMES = 1024
"""Descriptors kept for names: the kernel holds a page for each."""
FREEZING = ("get_signal", "do_freezer_trap")
"""Where a thread sleeps that the freezer of cgroup v2 holds (kernel/signal.c)."""
CGROUPS = {1: ("/sys/fs/cgroup/freezer",), 2: ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")}
"""By version: where control groups are mounted."""

T = TypeVar("T")


class _Memory(NamedTuple):
    """Of a process, as one of its threads tells."""

    vm_pages: int
    rss_pages: int
    text_pages: int


class LinuxSource:
    """
    Reads one process of Linux; see `vitalsd.sources.base.Source`.

    Args:
        pid: target; ``None`` is this process.
        root: where procfs is mounted. One of another pid namespace (a container's ``/host/proc``) is
            read without CPU clocks, because those take pids of our own namespace. ``/proc`` itself has to be of our
            own: or whoever says a pid means another process by it.
        fd_budget: descriptors that may be kept open for threads of another process; the rest are
            opened at each read, three times dearer. Default: half of the soft limit.
        program_of: makes `Identity.program`; called when the source is opened and after each exec.

    Raises:
        SourceError: `NoSuchProcess`, `AccessDenied`, `TargetGone`, `Unsupported` or `KernelError`.
    """

    def __init__(
        self,
        pid: int | None = None,
        *,
        root: str = "/proc",
        fd_budget: int | None = None,
        program_of: ProgramOf = no_program,
    ) -> None:
        self._root = root
        self._program_of = program_of
        own = self._own_pid()
        same_namespace = own == os.getpid()
        self._pid = pid if pid is not None else own or os.getpid()
        if pid is not None and own and not same_namespace and root == "/proc":
            raise Unsupported(
                "/proc is of another pid namespace, where this number is another process's; mount a procfs of our own"
                " there (unshare --mount-proc), or name that one by another path with --proc-root"
            )
        if fd_budget is None:
            fd_budget = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._fds: list[int] = []
        self._threads: ThreadTable | None = None
        self._fd_budget = fd_budget
        self._counted_by: ThreadCounter
        self._decided_ns = 0
        self._own = same_namespace and self._pid == os.getpid()
        try:
            stat = self._attach(same_namespace)
            self._clock = self._process_clock() if same_namespace else None
            self._open_threads()
        except BaseException:
            self.close()
            raise
        self._process_cut_ns = 0 if self._clock else 2 * USER_TICK_NS
        self._seen_memory = -1, -1
        """Pages of address space and of text when the main thread's stat was read last, and the threads of then."""
        self._seen_threads = ThreadRoster()
        self._looked_ns = 0
        self._looked_cpu_ns = -1
        self._state: str | None = None
        self._member = self._pid
        """The thread through which the process is read: the main one, or another if that has exited."""
        self._peak_pages = 0
        """The largest address space that the running program was seen with."""
        self._executions = 0
        self._image: tuple[int, ...] = ()
        self._program: tuple[tuple[int, ...], int] = (), -1
        self._named: ThreadRoster | None = None
        self._start_ns = stat.start_ticks * USER_TICK_NS
        self._identity = Identity(
            platform="linux",
            pid=self._pid,
            name=stat.name,
            boot_id=LinuxBirths(root).boot_id(),
            start_key=stat.start_ticks - boottime_offset_ticks(),
            started_unix_ns=time.time_ns() - time.clock_gettime_ns(CLOCK_BOOTTIME) + self._start_ns,
            program=self._running_program(),
        )

    def identity(self) -> Identity:
        return self._identity

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()
        while self._fds:
            os.close(self._fds.pop())

    def snapshot(self, *, extras: bool = False, names: bool = True) -> Snapshot:
        try:
            for _ in range(ATTEMPTS):
                taken = self._snapshot(extras, names)
                if taken is not None:
                    return taken
            # It executes one program after the other: what was read is of several, and no difference spans it.
            self._execute()
            taken = self._snapshot(extras, names, torn=True)
            self._execute()
            assert taken is not None
            return taken
        except (OSError, Malformed) as error:
            raise self._translated(error) from None

    def restart(self) -> None:
        try:
            self._open_threads()
        except (OSError, Malformed) as error:
            raise self._translated(error) from None

    def _snapshot(self, extras: bool, names: bool, *, torn: bool = False) -> Snapshot | None:
        """Return ``None``, unless `torn`, if other threads or another program were read than there are."""
        if not self._fds:
            raise ValueError("the source is closed")
        if self._threads is None:
            self._open_threads()
        assert self._threads is not None
        threads, counter = self._threads, self._counted_by
        begun_ns = time.monotonic_ns()
        before_ns = self._cpu_ns()
        proved = threads.read_proved(before_ns, self._cpu_ns) if counter.provable and self._clock else None
        if proved is not None:
            thread_cpu_ns, cpu_ns, exited_ns = proved
            exited_cpu_ns = exited_ns, exited_ns
        else:
            thread_cpu_ns = threads.read()
            cpu_ns = self._cpu_ns()
            living_ns = threads.living_ns
            exited_cpu_ns = (
                before_ns - living_ns - len(thread_cpu_ns) * counter.cut_ns,
                cpu_ns - living_ns + self._process_cut_ns,
            )
            if exited_cpu_ns[0] == exited_cpu_ns[1]:
                threads.calibrate(cpu_ns, exited_cpu_ns[0])
        monotonic_ns = time.monotonic_ns()
        boottime_ns = time.clock_gettime_ns(CLOCK_BOOTTIME)
        wall_ns = time.time_ns()

        # Read last: a descriptor that still answers proves that the pid, and its clock, were ours all along.
        image = self._image
        memory = self._memory(monotonic_ns, cpu_ns, closely=extras)
        if not threads.look_around(monotonic_ns, names=names) and not torn:
            return None
        if self._image is not image and not torn:
            return None  # The main thread may be another one than was read.
        if self._is_miscounted(cpu_ns, monotonic_ns):
            self._open_threads()
            if not torn:
                return None
        self._follow_name()

        warnings: list[str] = []
        extra = self._extras(warnings) if extras else None
        return Snapshot(
            monotonic_ns=monotonic_ns,
            boottime_ns=boottime_ns,
            wall_ns=wall_ns,
            uptime_ns=max(0, boottime_ns - self._start_ns),
            skew_ns=monotonic_ns - begun_ns,
            cpu_ns=cpu_ns,
            cpu_grain_ns=self._process_cut_ns or 1,
            exited_cpu_ns=exited_cpu_ns,
            rss_bytes=memory.rss_pages * PAGE_BYTES,
            vm_bytes=memory.vm_pages * PAGE_BYTES,
            state=self._state,
            image=self._image,
            roster=threads.roster,
            thread_cpu_ns=thread_cpu_ns,
            thread_grain_ns=counter.grain_ns,
            thread_lag_ns=counter.lag_ns,
            source=counter.source,
            extras=extra,
            warnings=tuple(warnings),
        )

    def _is_miscounted(self, cpu_ns: int, now_ns: int) -> bool:
        """Whether another counter has to be used: the kernel stopped counting in ``schedstat``, or began."""
        assert self._threads is not None
        if self._counted_by.source == "schedstat":
            return self._threads.living_ns == 0 < cpu_ns and not self._counts()
        if self._counted_by.source == "stat" and now_ns - self._decided_ns >= DECIDE_EVERY_NS:
            self._decided_ns = now_ns
            return self._counts()
        return False

    def _follow_name(self) -> None:
        """A process is called as its main thread, which may rename itself."""
        assert self._threads is not None
        roster = self._threads.roster
        if self._named is not roster:
            self._named = roster
            if self._pid in roster.tids:
                name = roster.names[roster.tids.index(self._pid)]
                if name != self._identity.name:
                    self._identity = self._identity._replace(name=name)

    def _cpu_ns(self) -> int:
        """CPU time of living and exited threads, ns."""
        if self._clock is None:
            stat = parse_stat(read_file("stat", self._dir))
            return (stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS
        try:
            return time.clock_gettime_ns(self._clock)
        except OSError:  # EINVAL: no such process
            raise ProcessLookupError from None

    def _memory(self, now_ns: int, cpu_ns: int, *, closely: bool) -> _Memory:
        """Return the pages in use; on the way, find out whether it was stopped or has executed a program."""
        assert self._threads is not None
        vm, rss, text = parse_statm(os.pread(self._statm, 256, 0))
        memory = _Memory(vm, rss, text)
        roster = self._threads.roster
        # At exec by another thread than the main one all others end.
        replaced = not roster.has_same_threads(self._seen_threads)
        due = now_ns - self._looked_ns >= LOOK_EVERY_NS
        if closely or due or not vm or replaced or (vm, text) != self._seen_memory:
            stat = leader = parse_stat(reread(self._leader))
            if vm or leader.flags & PF_KTHREAD:
                self._member = self._pid
            else:
                memory, stat = self._sibling()
            self._state = STATES.get(stat.state)
            if stat.state in "SD" and (closely or cpu_ns == self._looked_cpu_ns) and self._is_frozen(stat.state):
                self._state = "frozen"
            self._look_at(stat.image, memory, leader.name, replaced=replaced)
            self._seen_memory, self._seen_threads = (memory.vm_pages, memory.text_pages), roster
            self._looked_ns, self._looked_cpu_ns = now_ns, cpu_ns
        return memory

    def _look_at(self, addresses: tuple[int, ...], memory: _Memory, name: str, *, replaced: bool) -> None:
        """
        Find out whether it is another program now, and what it is called.

        Without addresses that stays open: a process may hide them, and it has none as it dies, nor inside exec,
        when its command line is not there yet either. The same program may have the same ones. Then a memory map that
        has never been as large as it was tells that it is another one.

        Args:
            replaced: other threads were found than before.
        """
        known, known_text = self._program
        self._program = addresses or known, memory.text_pages
        executed = memory.text_pages != known_text or bool(addresses and known and addresses != known)
        replaced = replaced or memory.vm_pages != self._seen_memory[0]
        if replaced and not executed and memory.vm_pages < self._peak_pages:
            peak = self._status().get("VmPeak")
            executed = peak is not None and peak // PAGE_BYTES < self._peak_pages
        self._peak_pages = memory.vm_pages if executed else max(self._peak_pages, memory.vm_pages)
        if executed:
            self._execute()
        if executed or (addresses and not known):
            self._identity = self._identity._replace(name=name, program=self._running_program())

    def _execute(self) -> None:
        self._executions += 1  # else the same object: compared at each beat
        addresses, text = self._program
        self._image = self._executions, *addresses, text

    def _running_program(self) -> str:
        if self._program_of is no_program:
            return ""
        try:
            command = self._of_member(_command)
        except (OSError, SourceError):
            return ""
        return self._program_of(command) if command is not None else ""

    def _sibling(self) -> tuple[_Memory, Stat]:
        """
        Find a living thread and read of it what the main one, which has exited, does not tell any more.

        Where a thread is executing a program, the others end first; then it takes the place of the main one.
        """
        for _ in range(ATTEMPTS):
            for tid in self._candidates():
                try:
                    memory = _Memory(*parse_statm(read_file(f"{tid}/statm", self._task)))
                    stat = parse_stat(read_file(f"{tid}/stat", self._task))
                except OSError as error:
                    if error.errno not in GONE:
                        raise
                    continue
                if memory.vm_pages:
                    self._member = tid
                    return memory, stat
            if parse_stat(reread(self._leader)).thread_count <= 1:
                break
        raise self._gone("; its parent has not yet collected it (zombie)")

    def _candidates(self) -> Iterator[int]:
        """Yield threads through which the process may be read: the last such, those listed, the main one of now."""
        yield self._member
        yield from map(int, os.listdir(self._task))
        yield self._pid

    def _of_member(self, read: Callable[[str, int], T]) -> T:
        """Return what `read` does with the files of a living thread, a path and a directory; one may exit meanwhile."""
        while True:
            try:
                if self._member == self._pid:
                    return read("", self._dir)
                return read(f"{self._member}/", self._task)
            except (FileNotFoundError, ProcessLookupError):
                if self._member == self._pid:
                    raise
                self._sibling()

    def _status(self) -> dict[str, int]:
        return self._of_member(lambda path, directory: parse_status(read_file(f"{path}status", directory)))

    def _is_frozen(self, state: str) -> bool:
        """Whether a cgroup freezer holds it, as ``docker pause`` does: of version 1 in state D, of version 2 in S."""
        if self._own:
            return False
        try:
            if state == "S" and self._of_member(_wait_channel) in FREEZING:
                return True  # without looking for the mounted control groups, which may not be there
            groups = self._of_member(lambda path, directory: freezer_paths(read_file(f"{path}cgroup", directory)))
        except OSError:
            return False
        return any(_holds(version, path) for version, path in groups if version == (1 if state == "D" else 2))

    def _extras(self, warnings: list[str]) -> Extras:
        assert self._threads is not None
        stats = self._threads.stats()
        total = parse_stat(read_file("stat", self._dir))
        sizes = self._status()
        return Extras(
            threads=ThreadExtras(
                user_ns=[s.utime_ticks * USER_TICK_NS if s else 0 for s in stats],
                system_ns=[s.stime_ticks * USER_TICK_NS if s else 0 for s in stats],
                states=[STATES.get(s.state) if s else "dead" for s in stats],
                priorities=[s.priority if s else None for s in stats],
            ),
            user_ns=total.utime_ticks * USER_TICK_NS,
            system_ns=total.stime_ticks * USER_TICK_NS,
            peak_rss_bytes=sizes.get("VmHWM"),
            swap_bytes=sizes.get("VmSwap"),
            open_fds=self._open_fds(warnings),
            minor_faults=total.minor_faults,
            major_faults=total.major_faults,
        )

    def _open_fds(self, warnings: list[str]) -> int | None:
        try:
            return self._of_member(self._count_fds)
        except PermissionError:
            warnings.append("open_fds: only its own user may count the descriptors of this process")
        except FileNotFoundError:
            reread(self._leader)  # raises if the process is gone: then it is not only the list that lacks
            warnings.append(f"open_fds: {self._root} does not list the descriptors of this process")
        return None

    def _count_fds(self, path: str, directory: int) -> int:
        # Since 6.2 the size of fd/ is the count, for any user; a procfs gives every other directory size 0.
        if os.fstat(self._task).st_size == 0 and (count := os.stat(f"{path}fd", dir_fd=directory).st_size):
            return count
        found = os.open(f"{path}fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            return len(os.listdir(found))
        finally:
            os.close(found)

    # Attaching

    def _attach(self, same_namespace: bool) -> Stat:
        """Open what is held for the life of the source, and read the main thread's ``stat``."""
        directory = f"{self._root}/{self._pid}"
        try:
            self._dir = self._keep(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
            self._task = self._keep(os.open("task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._dir))
            self._leader = self._keep(os.open(f"{self._pid}/stat", os.O_RDONLY, dir_fd=self._task))
            self._statm = self._keep(os.open("statm", os.O_RDONLY, dir_fd=self._dir))
            # By number: that it is of this process, the reading below proves.
            self._pidfd = self._exit_descriptor() if same_namespace and self._pid != os.getpid() else -1
            process = parse_tgid(read_file("status", self._dir))
            if process not in (self._pid, None):
                raise NoSuchProcess(f"no process has pid {self._pid}; it is a thread of process {process}")
            return parse_stat(reread(self._leader))
        except (FileNotFoundError, ProcessLookupError):
            raise self._absent() from None
        except PermissionError:
            raise self._denied(f"{self._root} hides it") from None
        except Malformed as error:
            raise KernelError(f"process {self._pid}: {error}") from None
        except OSError as error:
            raise KernelError(f"cannot open {directory}: {error.strerror}") from None

    def _exit_descriptor(self) -> int:
        """A pidfd, -1 where there is none: it tells how the process ended, see `vitalsd.sources.linux.exit_status`."""
        try:
            return self._keep(os.pidfd_open(self._pid))  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            return -1

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _absent(self) -> SourceError:
        """Why ``/proc/<pid>`` is not there; under hidepid=2 the process may be all the same."""
        if not os.path.exists(f"{self._root}/stat") and not os.path.exists(f"{self._root}/self"):
            return Unsupported(f"{self._root} is not a procfs; mount it or name another with --proc-root")
        if self._root == "/proc":
            try:
                os.kill(self._pid, 0)
            except PermissionError:
                return self._denied("/proc hides it (hidepid)")
            except (ProcessLookupError, OverflowError):
                pass
            else:
                if not os.path.exists(f"/proc/{self._pid}"):  # else it has only just been there
                    return self._denied("/proc hides it (hidepid)")
        return NoSuchProcess(f"no process has pid {self._pid}")

    def _denied(self, how: str) -> AccessDenied:
        """Why a process that exists cannot be read; whether it is of this user, kill(2) tells."""
        try:
            os.kill(self._pid, 0)
        except OSError:
            return AccessDenied(f"process {self._pid} belongs to another user and {how}")
        return AccessDenied(
            f"process {self._pid} is yours and {how}: it does not let itself be read (PR_SET_DUMPABLE, or a program"
            " with privileges of its own); ask as root, or mount /proc without hidepid"
        )

    def _own_pid(self) -> int:
        """That of this process in the procfs, which may be of another pid namespace; 0 if it is not in there."""
        try:
            return int(os.readlink(f"{self._root}/self"))
        except (OSError, ValueError):
            return 0

    def _process_clock(self) -> int | None:
        clock_id = (~self._pid << 3) | 2  # CPUCLOCK_SCHED of a process, linux/posix-timers_types.h
        try:
            time.clock_gettime_ns(clock_id)
        except OSError:
            return None
        return clock_id

    def _open_threads(self) -> None:
        """Choose the counter and read all threads with it. Raises `SourceError`, `OSError`, `Malformed`."""
        before, self._threads = self._threads, None
        if before is not None:
            before.close()
        self._decided_ns = time.monotonic_ns()
        self._counted_by = self._counter()
        kept = 0 if self._own else min(KEPT_NAMES, self._fd_budget // 2)  # Descriptors are the program's own there.
        try:
            self._threads = ThreadTable(self._task, self._counted_by, ThreadNames(self._task, kept))
        except (OSError, Malformed) as error:
            raise self._translated(error) from None

    def _counter(self) -> ThreadCounter:
        if self._own:
            return ThreadClocks()
        return (SchedstatFiles if self._counts() else StatFiles)(self._task, self._fd_budget)

    def _counts(self) -> bool:
        """
        Whether the kernel counts run times in ``schedstat``.

        One that does not has no such file, or "0 0 0" for every thread, while the process has used CPU time. A thread
        that has run once has more than 0.
        """
        found = False
        for tid in os.listdir(self._task):
            try:
                if parse_run_times([read_file(f"{tid}/schedstat", self._task)])[0]:
                    return True
                found = True
            except OSError as error:
                if error.errno not in GONE:
                    raise
        return found and self._cpu_ns() == 0

    def _translated(self, error: OSError | Malformed) -> SourceError:
        """What went wrong, in our own terms."""
        match error:
            case ProcessLookupError() | FileNotFoundError():
                if self._hidden():
                    return AccessDenied(f"process {self._pid} does not let this user read it any more (hidepid)")
                return self._gone()
            case PermissionError():
                return AccessDenied(f"process {self._pid}: {error.strerror}: {error.filename}")
            case Malformed():
                return KernelError(f"process {self._pid}: {error}")
            case _:
                return KernelError(f"process {self._pid}: {error.strerror}")

    def _gone(self, more: str = "") -> TargetGone:
        return TargetGone(f"target {self._pid} has exited{more}", ending(self._dir, self._leader, self._pidfd))

    def _hidden(self) -> bool:
        """Whether it lives and /proc now hides it: what was open still answers, and nothing more can be opened."""
        try:
            os.close(os.open("stat", os.O_RDONLY, dir_fd=self._dir))
        except FileNotFoundError:
            try:
                return parse_stat(reread(self._leader)).state not in "ZX"
            except (OSError, Malformed):
                return False
        except OSError:
            pass
        return False


def _command(path: str, directory: int) -> Command | None:
    process = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        return running_command(process)
    finally:
        os.close(process)


def _wait_channel(path: str, directory: int) -> str:
    return read_file(f"{path}wchan", directory).decode("ascii", "replace")


def _holds(version: int, path: str) -> bool:
    """Whether a control group, or one above it, is frozen."""
    file, word = {1: ("freezer.state", b"FROZEN"), 2: ("cgroup.events", b"\nfrozen 1")}[version]
    for mount in CGROUPS[version]:
        try:
            with open(f"{mount}{path}/{file}", "rb") as opened:
                return word in b"\n" + opened.read()
        except OSError:
            continue
    return False
