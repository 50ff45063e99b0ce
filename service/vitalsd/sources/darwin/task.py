"""
Read what both macOS sources need of a process: its identity, the length of kernel ticks and its age.

Facts about the kernel (xnu-11417, and `docs/macos-proof.md` of this project):

- Times that the kernel writes in ticks (``task_absolutetime_info``, ``pti_*``, ``ri_*``) have the frequency of sysctl
  ``hw.tbfrequency``. ``mach_timebase_info`` returns 1/1 to a process that Rosetta translates, although those ticks are
  of 24 MHz. With that scale CPU times are 41.67 times too low, a defect that most monitors once had.
- The kernel has the start of a process twice, as wall clock, which it never corrects when the clock is stepped, and in
  ticks that stop in sleep. Exec changes neither.
- Thread ids are unique since boot, so a tid alone identifies a thread.
"""

import errno
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from vitalsd.snapshot import Identity, ThreadFigures
from vitalsd.sources.base import AccessDeniedError, KernelError, NoSuchProcessError, TargetGoneError, UnsupportedError
from vitalsd.sources.darwin.apple_headers import (
    proc_bsdinfo,
    proc_bsdshortinfo,
    proc_taskallinfo,
)
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.threads import RUN_STATES, Living
from vitalsd.sources.darwin.usage import UsageReader
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

MAC_FREQUENCIES = (24_000_000, 1_000_000_000)
"""Ticks per second of the known kernels: Apple silicon, Intel."""

SCALE_CHECK_NS = 5_000_000
"""CPU time that this process must have used before its totals in ticks and in ns are compared, ns."""


@contextmanager
def translated_errors(pid: int) -> Iterator[None]:
    """Translate errors of `LibSystem` about the target `pid` into errors of a source."""
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
    """Return the UUID of this boot; `UNKNOWN_BOOT` if it cannot be read."""
    try:
        return lib.host.sysctl("kern.bootsessionuuid").rstrip(b"\0").decode("ascii", "backslashreplace").lower()
    except OSError:
        return UNKNOWN_BOOT


def process_name(info: proc_bsdinfo) -> str:
    """Return the name of a process: up to 31 bytes of ``pbi_name``, or the 15 of ``pbi_comm`` if that is empty."""
    return decode_name(info.pbi_name or info.pbi_comm)


def process_names(info: proc_bsdinfo) -> frozenset[str]:
    """Return the names that ``--name`` matches: the 31 and the 15 bytes that the kernel keeps of the name."""
    return frozenset(decode_name(name) for name in (info.pbi_name, info.pbi_comm) if name)


def start_key(info: proc_bsdinfo) -> int:
    """Return the wall clock at fork, µs."""
    return int(info.pbi_start_tvsec) * 1_000_000 + int(info.pbi_start_tvusec)


def tick_frequency(lib: LibSystem, own: proc_taskallinfo) -> tuple[int, str | None]:
    """
    Return the frequency of kernel ticks, Hz, and a warning, or ``None``.

    ``hw.tbfrequency`` is compared with ``getrusage``, of which the kernel converts the times. If they contradict each
    other, as with an emulated sysctl, a known frequency that agrees with ``getrusage`` is used, with a warning.

    Args:
        lib: libSystem.
        own: a recent reading of this process.

    Raises:
        MachError: no known frequency agrees with ``getrusage``.
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
    """CPU times of a task at one instant, in ticks."""

    user: int
    system: int
    living: int
    """User and system time of the threads that the kernel has not reaped yet."""


class Instant(NamedTuple):
    """One instant on each clock of a `Snapshot`, ns."""

    monotonic_ns: int
    boottime_ns: int
    wall_ns: int
    uptime_ns: int


class OpenedProcess:
    """
    The process for which a source was opened.

    Args:
        lib: libSystem.
        pid: of the process.
        own_pid: pid of this process.
        wall_clock: returns the Unix time, ns.
        program_of: makes `Identity.program` from the command of the process.

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
        self.usage = UsageReader(lib, pid)
        self.cpu_count = self._cpu_count()
        self.identity = Identity(
            platform="macos",
            pid=pid,
            name=process_name(self.info.pbsd),
            boot_id=boot_id(lib),
            start_key=start_key(self.info.pbsd),
            started_unix_ns=start_key(self.info.pbsd) * 1000,
            program=self._program() or "",
        )
        with translated_errors(pid):
            self._age_base_ns = self._age_ns() - lib.host.continuous_ns()

    def ns(self, ticks: int) -> int:
        """Convert kernel ticks to ns."""
        return ticks * 1_000_000_000 // self.frequency

    @property
    def tick_ns(self) -> int:
        """Length of a tick, ns, rounded up."""
        return -(-1_000_000_000 // self.frequency)

    def now(self) -> Instant:
        """Read the clocks."""
        monotonic_ns = time.monotonic_ns()
        boottime_ns = self._lib.host.continuous_ns()
        return Instant(monotonic_ns, boottime_ns, self._wall_clock(), max(0, self._age_base_ns + boottime_ns))

    def refresh(self) -> proc_taskallinfo:
        """
        Read identity and totals, of one instant.

        Raises:
            TargetGoneError: the process has exited, and its pid was reused.
            ProcessLookupError: the process has exited.
        """
        self._lib.proc.info(self.pid, self.info)
        if start_key(self.info.pbsd) != self.identity.start_key:
            raise TargetGoneError(f"target {self.pid} has exited; its pid belongs to another process now")
        name = process_name(self.info.pbsd)
        if name != self.identity.name:  # it has executed another program
            self.identity = self.identity._replace(name=name)
        return self.info

    def read_program(self) -> bool:
        """Determine `Identity.program` again, after exec; return whether the kernel showed the command."""
        program = self._program()
        self.identity = self.identity._replace(program=program or "")
        return program is not None

    def exited_ns(self, before: Totals, after: Totals, living_ns: int) -> tuple[int, int]:
        """
        Return the lower and the upper bound of the CPU time of exited threads, ns.

        The kernel counts the time of reaped threads exactly. It counts a thread that has ended and is not reaped yet
        as living, while its time is not in `living_ns`. In that case, if `after` was read too, the bounds are the
        totals less `living_ns`, but not less than the time of reaped threads.

        Args:
            before: read before the threads.
            after: read after the threads, or `before` if none of them has ended.
            living_ns: sum of the CPU times of the living threads.
        """
        reaped_ns = self.ns(before.user + before.system) - self.ns(before.living)
        if after is before:
            return reaped_ns, reaped_ns
        return (
            max(reaped_ns, self.ns(before.user + before.system) - living_ns),
            max(reaped_ns, self.ns(after.user + after.system) - living_ns),
        )

    @staticmethod
    def thread_figures(living: Living) -> ThreadFigures:
        """Return the figures of each thread, which the reply with its times has."""
        return ThreadFigures(
            user_ns=living.user_ns,
            system_ns=living.system_ns,
            states=[RUN_STATES.get(state) for state in living.run_states],
            priorities=living.priorities,
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
        """Return `Identity.program`; ``None`` if the kernel does not show the command."""
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
        """Return why the process was not found; the call made here finds zombies too."""
        try:
            self._lib.proc.info(self.pid, proc_bsdshortinfo(), 1)
        except (OSError, MachError):
            return NoSuchProcessError(f"no process has pid {self.pid}")
        return TargetGoneError(f"target {self.pid} has exited; its parent has not yet collected it (zombie)")

    def _age_ns(self) -> int:
        """
        Return the time since the start of the process, with the time asleep, ns.

        The kernel's ticks give the time awake. Only the wall clock shows how much of the sleep since boot came after
        the start; it is limited by the total sleep. So a stepped clock cannot make a process younger than its time
        awake, or older than that and all sleep.
        """
        continuous_ns, absolute_ns = self._lib.host.continuous_ns(), self._lib.host.absolute_ns()
        wall_age_ns = self._wall_clock() - self.identity.started_unix_ns
        try:
            usage = self.usage.read()
        except ProcessLookupError:
            raise
        except OSError:  # a sandbox may hide it; then only the wall clock is left
            return min(max(0, wall_age_ns), continuous_ns)
        awake_ns = max(0, absolute_ns - self.ns(usage.ri_proc_start_abstime))
        slept_ns = max(0, continuous_ns - absolute_ns)
        return awake_ns + min(max(0, wall_age_ns - awake_ns), slept_ns)

    def _cpu_count(self) -> int:
        try:
            return max(0, self._lib.host.sysctl_int("hw.ncpu"))
        except (OSError, MachError):
            return 0
