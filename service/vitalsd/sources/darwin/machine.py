"""
Read figures of the machine on macOS.

Two figures of `MachineFigures` are always ``None`` here besides those of Linux:

- A thermal state: libnotify of libSystem could give it, but would connect the host to the daemon notifyd, wait for it
  in each reading, and leave a registration behind; its header is not available to the ABI proof. Intel's
  ``machdep.xcpm.cpu_thermal_level`` is no documented scale.
- PSI and CPU quotas do not exist on macOS.
"""

from collections.abc import Callable
from typing import TypeVar

from vitalsd.snapshot import MachineFigures
from vitalsd.sources.darwin.apple_headers import loadavg, xsw_usage
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem

__all__ = ["machine_figures"]

CPU_TICK_NS = 10_000_000
"""Unit of the CPU time of a processor, ns (hz_tick_interval, osfmk/kern/clock.c)."""

PRESSURE_LEVELS = {1: 0, 2: 1, 4: 2}
"""Index in `MEMORY_PRESSURE_LEVELS` of each NOTE_MEMORYSTATUS_PRESSURE_* (bsd/sys/event_private.h)."""

ValueT = TypeVar("ValueT")


def machine_figures(lib: LibSystem, warnings: list[str]) -> MachineFigures:
    """
    Read the figures of the machine. A figure that cannot be read is ``None``.

    The memory available is what the kernel can give away without compressing or swapping anything: pages that are free,
    that belong to a file, or that their owner allows it to discard (purgeable). Speculative pages are read ahead from a
    file; the kernel counts them as free and as of a file, and they count once.

    Args:
        lib: libSystem.
        warnings: gets the reason why a figure cannot be read.
    """

    def tried(what: str, read: Callable[[], ValueT]) -> ValueT | None:
        try:
            return read()
        except (OSError, MachError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            warnings.append(f"machine: {what} unknown: {reason}")
            return None

    ticks = tried("CPU time", lib.statistics.busy_ticks)
    load = tried("load", lambda: lib.host.sysctl_struct("vm.loadavg", loadavg))
    swap = tried("swap and available memory", lambda: lib.host.sysctl_struct("vm.swapusage", xsw_usage))
    pages = tried("available memory", lib.statistics.memory) if swap else None
    level = tried("memory pressure", lambda: lib.host.sysctl_int("kern.memorystatus_vm_pressure_level"))
    if level is not None and level not in PRESSURE_LEVELS:
        warnings.append(f"machine: memory pressure unknown: the kernel's level is {level}, not 1, 2 or 4")
    available = pages and pages.free_count - pages.speculative_count + pages.external_page_count + pages.purgeable_count
    return MachineFigures(
        busy_ns=None if ticks is None else ticks * CPU_TICK_NS,
        load_milli=load.ldavg[0] * 1000 // load.fscale if load and load.fscale > 0 else None,
        memory_available_bytes=available * swap.xsu_pagesize if available and swap and swap.xsu_pagesize else None,
        swap_used_bytes=swap.xsu_used if swap else None,
        memory_pressure_level=None if level is None else PRESSURE_LEVELS.get(level),
    )
