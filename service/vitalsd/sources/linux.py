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
- At exec the calling thread takes over the id and the start time of the leader.
"""

import os
import resource
import time

from vitalsd.snapshot import Extras, Identity, Snapshot, ThreadExtras
from vitalsd.sources import (
    AccessDenied,
    KernelError,
    NoSuchProcess,
    SourceError,
    TargetGone,
    Unsupported,
)
from vitalsd.sources.linux_counters import (
    GONE,
    USER_TICK_NS,
    SchedstatFiles,
    StatFiles,
    ThreadClocks,
    ThreadCounter,
    read_file,
)
from vitalsd.sources.linux_exit import ending
from vitalsd.sources.linux_processes import CLOCK_BOOTTIME, PAGE_BYTES, PF_KTHREAD, running_command
from vitalsd.sources.linux_threads import ThreadTable
from vitalsd.sources.procfs import (
    STATES,
    Malformed,
    Stat,
    parse_run_times,
    parse_stat,
    parse_statm,
    parse_status,
    parse_tgid,
)
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["LinuxSource"]

LOOK_EVERY_NS = 1_000_000_000
"""The main thread's stat is read that often, and whenever the memory map has changed."""


class LinuxSource:
    """
    Reads one process of Linux; see `vitalsd.sources.Source`.

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
        try:
            stat = self._attach(same_namespace)
            self._clock = self._process_clock() if same_namespace else None
            try:
                counter = self._counter(stat, fd_budget, own=same_namespace and self._pid == os.getpid())
                self._threads = ThreadTable(self._task, counter)
            except (OSError, Malformed) as error:
                raise self._translated(error) from None
        except BaseException:
            self.close()
            raise
        self._counted_by = counter
        self._process_cut_ns = 0 if self._clock else 2 * USER_TICK_NS
        self._seen = (0, 0)
        self._looked_ns = 0
        self._state: str | None = None
        self._image: tuple[int, ...] = ()
        self._program: tuple[tuple[int, ...], int] = (), -1
        self._start_ns = stat.start_ticks * USER_TICK_NS
        self._identity = Identity(
            platform="linux",
            pid=self._pid,
            name=stat.name,
            boot_id=_boot_id(root),
            start_key=stat.start_ticks,
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
            return self._snapshot(extras, names)
        except (OSError, Malformed) as error:
            raise self._translated(error) from None

    def _snapshot(self, extras: bool, names: bool) -> Snapshot:
        if self._threads is None or not self._fds:
            raise ValueError("the source is closed")
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
        vm_pages, rss_pages = self._memory(monotonic_ns, closely=extras)
        if not threads.look_around(monotonic_ns, names=names):
            return self._snapshot(extras, names)

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
            rss_bytes=rss_pages * PAGE_BYTES,
            vm_bytes=vm_pages * PAGE_BYTES,
            state=self._state,
            image=self._image,
            tids=threads.tids,
            births=threads.births,
            thread_cpu_ns=thread_cpu_ns,
            names=threads.names,
            thread_grain_ns=counter.grain_ns,
            thread_lag_ns=counter.lag_ns,
            source=counter.source,
            extras=extra,
            warnings=tuple(warnings),
        )

    def _cpu_ns(self) -> int:
        """CPU time of living and exited threads, ns."""
        if self._clock is None:
            stat = parse_stat(read_file("stat", self._dir))
            return (stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS
        try:
            return time.clock_gettime_ns(self._clock)
        except OSError:  # EINVAL: no such process
            raise ProcessLookupError from None

    def _memory(self, now_ns: int, *, closely: bool) -> tuple[int, int]:
        """Pages of address space and resident; on the way, what tells whether it was stopped or executed."""
        vm, rss, text = parse_statm(os.pread(self._statm, 256, 0))
        if closely or not vm or (vm, text) != self._seen or now_ns - self._looked_ns >= LOOK_EVERY_NS:
            leader = parse_stat(os.pread(self._leader, 1024, 0))
            image = leader.image
            if not vm and not leader.flags & PF_KTHREAD:
                vm, rss, text, image = self._sibling()
            self._state = STATES.get(leader.state)
            self._look_at(image, text, leader.name)
            self._seen, self._looked_ns = (vm, text), now_ns
        return vm, rss

    def _look_at(self, addresses: tuple[int, ...], text: int, name: str) -> None:
        """
        Whether it is another program now, and what it is called.

        Without addresses that stays open: a process may hide them, and it has none as it dies, nor inside exec,
        when its command line is not there yet either.
        """
        known, known_text = self._program
        self._program = addresses or known, text
        executed = text != known_text or bool(addresses and known and addresses != known)
        if executed:  # else the same object: compared at each beat
            self._image = *addresses, text
        if executed or (addresses and not known):
            self._identity = self._identity._replace(name=name, program=self._running_program())

    def _running_program(self) -> str:
        if self._program_of is no_program:
            return ""
        command = running_command(self._dir)
        return self._program_of(command) if command is not None else ""

    def _sibling(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Pages of address space, resident and text, and the image, told by another thread than the dead main one."""
        assert self._threads is not None
        for tid in self._threads.tids:
            try:
                vm, rss, text = parse_statm(read_file(f"{tid}/statm", self._task))
                stat = parse_stat(read_file(f"{tid}/stat", self._task))
            except OSError as error:
                if error.errno not in GONE:
                    raise
                continue
            if vm:
                return vm, rss, text, stat.image
        raise self._gone("; its parent has not yet collected it (zombie)")

    def _extras(self, warnings: list[str]) -> Extras:
        assert self._threads is not None
        stats = self._threads.stats()
        total = parse_stat(read_file("stat", self._dir))
        sizes = parse_status(read_file("status", self._dir))
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
        # Since 6.2 the size of fd/ is the count, for any user; a procfs gives every other directory size 0.
        if os.fstat(self._task).st_size == 0 and (count := os.stat("fd", dir_fd=self._dir).st_size):
            return count
        try:
            directory = os.open("fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._dir)
        except PermissionError:
            warnings.append("open_fds: only its own user may count the descriptors of this process")
            return None
        except FileNotFoundError:
            os.pread(self._leader, 1, 0)  # raises if the process is gone: then it is not only the list that lacks
            warnings.append(f"open_fds: {self._root} does not list the descriptors of this process")
            return None
        try:
            return len(os.listdir(directory))
        finally:
            os.close(directory)

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
            return parse_stat(os.pread(self._leader, 1024, 0))
        except (FileNotFoundError, ProcessLookupError):
            raise self._absent() from None
        except PermissionError:
            raise AccessDenied(f"process {self._pid} belongs to another user and {self._root} hides it") from None
        except Malformed as error:
            raise KernelError(f"process {self._pid}: {error}") from None
        except OSError as error:
            raise KernelError(f"cannot open {directory}: {error.strerror}") from None

    def _exit_descriptor(self) -> int:
        """A pidfd, -1 where there is none: it tells how the process ended, see `vitalsd.sources.linux_exit`."""
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
                return AccessDenied(f"process {self._pid} belongs to another user and /proc hides it (hidepid)")
            except (ProcessLookupError, OverflowError):
                pass
        return NoSuchProcess(f"no process has pid {self._pid}")

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

    def _counter(self, stat: Stat, fd_budget: int, *, own: bool) -> ThreadCounter:
        if own:
            return ThreadClocks()
        try:
            run_ns = parse_run_times([read_file(f"{self._pid}/schedstat", self._task)])[0]
        except FileNotFoundError:
            return StatFiles(self._task, fd_budget)
        # A kernel that does not count writes "0 0 0".
        if run_ns == 0 and stat.utime_ticks + stat.stime_ticks > 0:
            return StatFiles(self._task, fd_budget)
        return SchedstatFiles(self._task, fd_budget)

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
                return parse_stat(os.pread(self._leader, 1024, 0)).state not in "ZX"
            except (OSError, Malformed):
                return False
        except OSError:
            pass
        return False


def _boot_id(root: str) -> str:
    try:
        with open(f"{root}/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
