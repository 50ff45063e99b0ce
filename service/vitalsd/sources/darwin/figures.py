"""
Read what a snapshot has on macOS beside its counters: figures of the process, its wait for a CPU, machine and children.

Facts about the kernel (xnu-11417):

- ``ri_runnable_time`` is the time for which threads were runnable, also while they ran, exited threads included; one
  lock covers it and the CPU times of the same reply (fill_task_rusage, osfmk/kern/bsd_kern.c). Less the CPU time it is
  the time for which they waited for a CPU.
- The kernel adds a wait when the thread gets a CPU, and the time of a running thread when it leaves the CPU or its
  quantum ends (timer_update, osfmk/kern/sched_prim.c and priority.c); it updates the CPU time more often. So a wait in
  progress is not included, and each running thread can make the figure too small by a quantum.
"""

from typing import NamedTuple

from vitalsd.snapshot import MachineFigures, Part, ProcessFigures, ProcessTree
from vitalsd.sources.darwin.apple_headers import proc_fdinfo, rusage_info_v6
from vitalsd.sources.darwin.children import ChildrenReader
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.machine import machine_figures
from vitalsd.sources.darwin.task import OpenedProcess, Totals
from vitalsd.sources.darwin.threads import Living

__all__ = ["FigureReader", "Figures", "TaskCounts"]

QOS_CLASSES = (
    "default",
    "maintenance",
    "background",
    "utility",
    "legacy",
    "user_initiated",
    "user_interactive",
)
"""Quality-of-service classes: the ends of the ``ri_cpu_time_qos_*`` fields of rusage_info_v4 (bsd/sys/resource.h)."""

SATURATED = 2**31 - 1
"""Highest value of the event counters of a task, which do not wrap (osfmk/kern/task.c)."""


class TaskCounts(NamedTuple):
    """What a source has read already."""

    totals: Totals
    living: Living
    faults: int
    """Page faults since the start."""
    pageins: int
    """Those that needed IO."""
    peak_rss_bytes: int | None = None
    """``None``: unknown."""
    footprint_bytes: int | None = None
    """``None``: it is taken from ``ri_phys_footprint``."""


class Figures(NamedTuple):
    """What a snapshot has beside its counters; ``None``: not requested, or it cannot be read."""

    process: ProcessFigures | None = None
    wait_ns: int | None = None
    wait_error_ns: int | None = None
    machine: MachineFigures | None = None
    tree: ProcessTree | None = None


class FigureReader:
    """
    Read the figures of one process.

    Args:
        lib: libSystem.
        target: the process.
        thread_limit: most threads with which ``proc_pid_rusage`` is called, because the kernel walks through all of
            them under a lock; ``None``: no limit.
    """

    def __init__(self, lib: LibSystem, target: OpenedProcess, thread_limit: int | None = None) -> None:
        self._lib = lib
        self._target = target
        self._thread_limit = thread_limit
        self._has_p_cores = self._perf_levels() > 1
        self._children = ChildrenReader(lib, target.pid, target.ns, target.cpu_count)

    def read(self, parts: Part, counts: TaskCounts, warnings: list[str]) -> Figures:
        """
        Read what `parts` requests. A figure that cannot be read is ``None``.

        Args:
            parts: what the snapshot has beside its counters.
            counts: what the source has read already.
            warnings: gets the reason why a figure cannot be read.

        Raises:
            ProcessLookupError: the process has exited.
        """
        tree = self._children.read(warnings) if Part.CHILDREN in parts else None
        if Part.FIGURES not in parts:
            return Figures(tree=tree)
        usage = self._usage(len(counts.living.tids), warnings)
        wait_ns = self._wait_ns(usage)
        return Figures(
            process=self._process(counts, usage, warnings),
            wait_ns=wait_ns,
            wait_error_ns=None if wait_ns is None else self._wait_error_ns(counts.living),
            machine=machine_figures(self._lib, warnings),
            tree=tree,
        )

    def _process(self, counts: TaskCounts, usage: rusage_info_v6 | None, warnings: list[str]) -> ProcessFigures:
        ns, v6 = self._target.ns, usage if self._target.usage.has_v6 else None
        saturated = SATURATED in (counts.faults, counts.pageins)
        footprint_bytes = counts.footprint_bytes
        return ProcessFigures(
            user_ns=ns(counts.totals.user),
            system_ns=ns(counts.totals.system),
            footprint_bytes=usage.ri_phys_footprint if footprint_bytes is None and usage else footprint_bytes,
            peak_rss_bytes=counts.peak_rss_bytes,
            open_fds=self._open_fds(warnings),
            minor_faults=None if saturated else counts.faults - counts.pageins,
            major_faults=None if saturated else counts.pageins,
            idle_wakeups=usage.ri_pkg_idle_wkups if usage else None,
            interrupt_wakeups=usage.ri_interrupt_wkups if usage else None,
            # A kernel without the counter writes 0.
            energy_nj=v6.ri_energy_nj or None if v6 else None,
            p_core_ns=ns(v6.ri_user_ptime + v6.ri_system_ptime) if v6 and self._has_p_cores else None,
            qos_ns={name: ns(getattr(usage, f"ri_cpu_time_qos_{name}")) for name in QOS_CLASSES} if usage else None,
            reaped_ns=ns(usage.ri_child_user_time + usage.ri_child_system_time) if usage else None,
        )

    def _usage(self, thread_count: int, warnings: list[str]) -> rusage_info_v6 | None:
        what = "footprint, waits, wakeups, energy, children"
        if self._thread_limit is not None and thread_count > self._thread_limit:
            warnings.append(f"{what}: not read of a process with more than {self._thread_limit} threads")
            return None
        try:
            return self._target.usage.read()
        except ProcessLookupError:
            raise
        except OSError as error:
            warnings.append(f"{what}: {error.strerror}")
            return None

    def _wait_ns(self, usage: rusage_info_v6 | None) -> int | None:
        """Return the time for which threads waited for a CPU, ns; ``None``: the kernel does not count it."""
        if usage is None or not usage.ri_runnable_time:
            return None
        return self._target.ns(max(0, usage.ri_runnable_time - usage.ri_user_time - usage.ri_system_time))

    def _wait_error_ns(self, living: Living) -> int:
        """Return by how much `_wait_ns` may be too small, ns: a quantum for each thread that runs."""
        return min(living.running, self._target.cpu_count or living.running) * living.lag_ns

    def _perf_levels(self) -> int:
        try:
            return self._lib.host.sysctl_int("hw.nperflevels")
        except (OSError, MachError):
            return 1

    def _open_fds(self, warnings: list[str]) -> int | None:
        room = self._target.info.pbsd.pbi_nfiles + 32
        try:
            while True:
                buffer = (proc_fdinfo * room)()
                number = self._lib.proc.list_of(self._target.pid, "PROC_PIDLISTFDS", buffer) // 8
                if number < room:
                    return number
                room *= 2
        except ProcessLookupError:
            raise
        except OSError as error:
            warnings.append(f"open_fds: {error.strerror}")
            return None
