"""
What both macOS sources have in common: who the target is, the scale of kernel ticks, its age.

Some facts about the kernel (xnu-11417 and the `docs/macos-proof.md` of this project):

- Times the kernel writes in ticks (``task_absolutetime_info``, ``pti_*``, ``ri_*``) run at sysctl
  ``hw.tbfrequency``. ``mach_timebase_info`` says 1/1 to a process translated by Rosetta while those
  ticks stay at 24 MHz: 41.67 times too low, a defect most monitors had once.
- The start of a process is known twice, as wall clock (never corrected when the clock is stepped)
  and in ticks that stop in sleep; both are kept across exec.
- Thread ids are unique since boot, so a thread needs no birth to be told from another.
"""

import errno
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from vitalsd.snapshot import Extras, Identity, ThreadExtras
from vitalsd.sources.base import AccessDeniedError, KernelError, NoSuchProcessError, TargetGoneError, UnsupportedError
from vitalsd.sources.darwin.apple_headers import (
    RUSAGE_INFO_V4,
    RUSAGE_INFO_V6,
    proc_bsdinfo,
    proc_bsdshortinfo,
    proc_fdinfo,
    proc_taskallinfo,
    rusage_info_v6,
)
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.threads import RUN_STATES, Living
from vitalsd.sources.names import decode_name
from vitalsd.sources.process_identity import UNKNOWN_BOOT
from vitalsd.sources.programs import Command, ProgramOf, no_program

__all__ = [
    "Instant",
    "OpenedProcess",
    "Totals",
    "boot_id",
    "process_name",
    "process_names",
    "start_key",
    "tick_frequency",
    "translated_errors",
]

QOS_CLASSES = (
    "default",
    "maintenance",
    "background",
    "utility",
    "legacy",
    "user_initiated",
    "user_interactive",
)
"""The ``ri_cpu_time_qos_*`` fields of rusage_info_v4 (bsd/sys/resource.h)."""

SATURATED = 2**31 - 1
"""Event counters of a task stop here (osfmk/kern/task.c)."""

MAC_FREQUENCIES = (24_000_000, 1_000_000_000)
"""Ticks per second of the kernels known so far: Apple silicon, Intel."""

SCALE_CHECK_NS = 5_000_000
"""CPU time this process must have used before its two totals can be compared."""


@contextmanager
def translated_errors(pid: int) -> Iterator[None]:
    """Errors of `LibSystem` about an open target as those of a source."""
    try:
        yield
    except ProcessLookupError:
        raise TargetGoneError(f"target {pid} has exited") from None
    except PermissionError as error:
        raise AccessDeniedError(
            f"process {pid} belongs to another user, or a sandbox hides it: {error.strerror}"
        ) from None
    except OSError as error:
        unknown = error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOENT)
        raise (UnsupportedError if unknown else KernelError)(
            f"process {pid}: {error.strerror} ({error.errno})"
        ) from None
    except MachError as error:
        raise KernelError(f"process {pid}: {error}") from None


def boot_id(lib: LibSystem) -> str:
    """The UUID of this boot of the machine."""
    try:
        return lib.host.sysctl("kern.bootsessionuuid").rstrip(b"\0").decode("ascii", "backslashreplace").lower()
    except OSError:
        return UNKNOWN_BOOT


def process_name(info: proc_bsdinfo) -> str:
    """Up to 31 bytes; the 15 of ``pbi_comm`` where a process has no longer one."""
    return decode_name(info.pbi_name or info.pbi_comm)


def process_names(info: proc_bsdinfo) -> frozenset[str]:
    """What somebody may call the process: the 31 and the 15 bytes that the kernel keeps of its name."""
    return frozenset(decode_name(name) for name in (info.pbi_name, info.pbi_comm) if name)


def start_key(info: proc_bsdinfo) -> int:
    """Wall clock at fork, µs."""
    return int(info.pbi_start_tvsec) * 1_000_000 + int(info.pbi_start_tvusec)


def tick_frequency(lib: LibSystem, own: proc_taskallinfo) -> tuple[int, str | None]:
    """
    Kernel ticks per second, and what is odd about that.

    ``hw.tbfrequency`` is checked against ``getrusage``, which the kernel converts itself: `own` has
    to be a recent reading of this very process. Should the two disagree (an emulated sysctl), the
    frequency that does agree is taken.

    Raises:
        MachError: no known frequency agrees.
    """
    stated = lib.host.sysctl_int("hw.tbfrequency")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_ns = round((usage.ru_utime + usage.ru_stime) * 1e9)
    ticks = own.ptinfo.pti_total_user + own.ptinfo.pti_total_system
    if stated > 0 and used_ns < SCALE_CHECK_NS:
        return stated, None
    for frequency in (stated, *MAC_FREQUENCIES):
        if frequency > 0 and used_ns / 2 < ticks * 1_000_000_000 / frequency < used_ns * 2:
            if frequency == stated:
                return stated, None
            return frequency, f"hw.tbfrequency says {stated} and getrusage agrees with {frequency} ticks per second"
    raise MachError(
        f"CPU time has no known unit: {ticks} ticks are {used_ns} ns by getrusage, and hw.tbfrequency says {stated}"
    )


class Totals(NamedTuple):
    """CPU time of a task, of one instant, in ticks."""

    user: int
    system: int
    living: int
    """The part of threads that the kernel has not yet reaped."""


class Instant(NamedTuple):
    """One moment on the clocks of a `Snapshot`, ns."""

    monotonic_ns: int
    boottime_ns: int
    wall_ns: int
    uptime_ns: int


class OpenedProcess:
    """
    The process a source was opened for.

    Args:
        wall_clock: Unix time, ns.
        program_of: makes `Identity.program` of what the process executes.

    Raises:
        SourceError: `NoSuchProcessError`, `AccessDeniedError`, `TargetGoneError` (a zombie), `UnsupportedError` or
            `KernelError`.
    """

    def __init__(
        self, lib: LibSystem, pid: int, own_pid: int, wall_clock: Callable[[], int], program_of: ProgramOf = no_program
    ) -> None:
        self._lib = lib
        self._program_of = program_of
        self._wall_clock = wall_clock
        self.pid = pid
        self.info = self._attach()
        with translated_errors(pid):
            own = proc_taskallinfo()
            lib.proc.info(own_pid, own)
            self.frequency, oddity = tick_frequency(lib, own)
        self.warnings = (oddity,) if oddity else ()
        self._usage = rusage_info_v6()
        self._usage_flavor = RUSAGE_INFO_V6
        self.identity = Identity(
            platform="macos",
            pid=pid,
            name=process_name(self.info.pbsd),
            boot_id=boot_id(lib),
            start_key=start_key(self.info.pbsd),
            started_unix_ns=start_key(self.info.pbsd) * 1000,
            program=self._program() or "",
        )
        self._start_abstime: int | None = None
        with translated_errors(pid):
            self._age_base_ns = self._age_ns() - lib.host.continuous_ns()
        self._has_p_cores = self._perf_levels() > 1

    def ns(self, ticks: int) -> int:
        """Kernel ticks as ns."""
        return ticks * 1_000_000_000 // self.frequency

    @property
    def tick_ns(self) -> int:
        """Length of a tick, rounded up."""
        return -(-1_000_000_000 // self.frequency)

    def now(self) -> Instant:
        monotonic_ns = time.monotonic_ns()
        boottime_ns = self._lib.host.continuous_ns()
        return Instant(monotonic_ns, boottime_ns, self._wall_clock(), max(0, self._age_base_ns + boottime_ns))

    def refresh(self) -> proc_taskallinfo:
        """
        Identity and totals, of one instant.

        Raises:
            TargetGoneError: it has exited, even if its pid is in use again.
        """
        self._lib.proc.info(self.pid, self.info)
        if start_key(self.info.pbsd) != self.identity.start_key:
            raise TargetGoneError(f"target {self.pid} has exited; its pid belongs to another process now")
        name = process_name(self.info.pbsd)
        if name != self.identity.name:  # it has executed another program
            self.identity = self.identity._replace(name=name)
        return self.info

    def read_program(self) -> bool:
        """Determine `Identity.program` again, after exec; return whether the kernel told what was executed."""
        program = self._program()
        self.identity = self.identity._replace(program=program or "")
        return program is not None

    def exited_ns(self, before: Totals, after: Totals, living_ns: int) -> tuple[int, int]:
        """
        Bounds of the CPU time of exited threads, ns.

        The kernel tells that of the reaped ones exactly. A thread that has ended without being reaped
        has exited for us and lives on for the kernel: then, that is if `after` was read as well, what
        the living do not account for is meant.

        Args:
            before: read before the threads.
            after: read after them, or `before` if none of them has ended.
            living_ns: sum of the threads alive.
        """
        reaped_ns = self.ns(before.user + before.system) - self.ns(before.living)
        if after is before:
            return reaped_ns, reaped_ns
        return (
            max(reaped_ns, self.ns(before.user + before.system) - living_ns),
            max(reaped_ns, self.ns(after.user + after.system) - living_ns),
        )

    def extras(
        self,
        living: Living,
        totals: Totals,
        warnings: list[str],
        *,
        faults: int,
        pageins: int,
        peak_rss_bytes: int | None = None,
        footprint_bytes: int | None = None,
    ) -> Extras:
        """
        What ``detail=full`` shows. A part that cannot be had is ``None`` and named in `warnings`.

        Args:
            footprint_bytes: if it is already known; otherwise it is taken from ``ri_phys_footprint``.
        """
        usage, v6 = self._read_usage(warnings)
        saturated = SATURATED in (faults, pageins)
        return Extras(
            threads=ThreadExtras(
                user_ns=living.user_ns,
                system_ns=living.system_ns,
                states=[RUN_STATES.get(state) for state in living.run_states],
                priorities=living.priorities,
            ),
            user_ns=self.ns(totals.user),
            system_ns=self.ns(totals.system),
            footprint_bytes=usage.ri_phys_footprint if footprint_bytes is None and usage else footprint_bytes,
            peak_rss_bytes=peak_rss_bytes,
            open_fds=self._open_fds(warnings),
            minor_faults=None if saturated else faults - pageins,
            major_faults=None if saturated else pageins,
            idle_wakeups=usage.ri_pkg_idle_wkups if usage else None,
            interrupt_wakeups=usage.ri_interrupt_wkups if usage else None,
            # 0 is what a kernel without the counter writes.
            energy_nj=usage.ri_energy_nj or None if usage and v6 else None,
            p_core_ns=self.ns(usage.ri_user_ptime + usage.ri_system_ptime)
            if usage and v6 and self._has_p_cores
            else None,
            qos_ns={name: self.ns(getattr(usage, f"ri_cpu_time_qos_{name}")) for name in QOS_CLASSES}
            if usage
            else None,
        )

    def _attach(self) -> proc_taskallinfo:
        info = proc_taskallinfo()
        if not 0 < self.pid < 2**31:
            raise NoSuchProcessError(f"no process has pid {self.pid}")
        with translated_errors(self.pid):
            try:
                self._lib.proc.info(self.pid, info)
            except ProcessLookupError:
                raise self._absent() from None
        return info

    def _program(self) -> str | None:
        """Return `Identity.program`; ``None`` if the kernel does not tell what was executed."""
        if self._program_of is no_program:
            return ""
        try:
            executable, words = self._lib.proc.command_line(self.pid)
        except OSError:
            return None
        try:
            directory = self._lib.proc.working_directory(self.pid)
        except (OSError, MachError):
            directory = ""
        return self._program_of(
            Command(os.path.join(directory, executable), words[1:], directory, words[0] if words else b"")
        )

    def _absent(self) -> NoSuchProcessError | TargetGoneError:
        """Why the calls that want a live process do not find it; this one finds zombies too."""
        try:
            self._lib.proc.info(self.pid, proc_bsdshortinfo(), 1)
        except (OSError, MachError):
            return NoSuchProcessError(f"no process has pid {self.pid}")
        return TargetGoneError(f"target {self.pid} has exited; its parent has not yet collected it (zombie)")

    def _age_ns(self) -> int:
        """
        Since the start, sleep included, ns.

        Time awake is known from the kernel's ticks. How much of the sleep since boot came after the
        start only the wall clock tells, and it is believed as far as the machine did sleep: a
        stepped clock cannot make a process younger than its time awake, nor older than that and all sleep.
        """
        continuous_ns, absolute_ns = self._lib.host.continuous_ns(), self._lib.host.absolute_ns()
        wall_age_ns = self._wall_clock() - self.identity.started_unix_ns
        try:
            self._read_rusage()
        except ProcessLookupError:
            raise
        except OSError:  # a sandbox may hide it; the wall clock is then all there is
            return min(max(0, wall_age_ns), continuous_ns)
        self._start_abstime = self._usage.ri_proc_start_abstime
        awake_ns = max(0, absolute_ns - self.ns(self._start_abstime))
        slept_ns = max(0, continuous_ns - absolute_ns)
        return awake_ns + min(max(0, wall_age_ns - awake_ns), slept_ns)

    def _perf_levels(self) -> int:
        try:
            return self._lib.host.sysctl_int("hw.nperflevels")
        except (OSError, MachError):
            return 1

    def _read_rusage(self) -> None:
        try:
            self._lib.proc.rusage(self.pid, self._usage, self._usage_flavor)
        except OSError as error:
            if error.errno != errno.EINVAL or self._usage_flavor == RUSAGE_INFO_V4:
                raise
            self._usage_flavor = RUSAGE_INFO_V4
            self._lib.proc.rusage(self.pid, self._usage, self._usage_flavor)

    def _read_usage(self, warnings: list[str]) -> tuple[rusage_info_v6 | None, bool]:
        try:
            self._read_rusage()
        except ProcessLookupError:
            raise
        except OSError as error:
            warnings.append(f"footprint, wakeups, energy: {error.strerror}")
            return None, False
        if self._usage.ri_proc_exit_abstime or self._start_abstime not in (None, self._usage.ri_proc_start_abstime):
            raise ProcessLookupError(errno.ESRCH, "proc_pid_rusage")
        return self._usage, self._usage_flavor == RUSAGE_INFO_V6

    def _open_fds(self, warnings: list[str]) -> int | None:
        room = self.info.pbsd.pbi_nfiles + 32
        try:
            while True:
                buffer = (proc_fdinfo * room)()
                number = self._lib.proc.list_of(self.pid, "PROC_PIDLISTFDS", buffer) // 8
                if number < room:
                    return number
                room *= 2
        except ProcessLookupError:
            raise
        except OSError as error:
            warnings.append(f"open_fds: {error.strerror}")
            return None
