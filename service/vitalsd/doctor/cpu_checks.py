"""Check the CPU time of threads at a known duty, that of their process, and the scale of the kernel's ticks."""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from vitalsd.doctor.cpu_load import CpuLoad, CpuLoadProcess, CpuLoadThreads, Log, bounds_ns
from vitalsd.doctor.finding import BUG, Finding, between, make_finding, not_here
from vitalsd.snapshot import Measurement, Part, Snapshot, measure
from vitalsd.sources.base import Source
from vitalsd.sources.platform import Platform

__all__ = ["DUTIES", "another_process", "own_process"]

DUTIES = (0, 5, 30, 100)
"""Percent of a core at which the threads burn, one thread each."""
WINDOW_S = 1.0
"""Time between the two snapshots that are compared, s."""
ALLOWANCE_PERCENT = 0.5
"""Percent of a core by which a reading may miss the bounds of the thread's own clock, beyond the error it states."""
TOTAL_ALLOWANCE = 0.02
"""Part of the CPU time of the process by which its reading may miss the bounds, beyond the error and `LAG_NS`."""
LAG_NS = 10_000_000
"""A total of the process may lag by this much for each running thread, ns: a tick of Linux, as getrusage does."""
WIDE_NS = 3_000_000
"""A snapshot that took longer than this is taken again, ns: the bounds of the true values would be too wide."""
ATTEMPTS = 5
"""Number of snapshots until one that took longer than `WIDE_NS` is accepted."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """Hold a snapshot, and the earliest and latest monotonic time at which it may have been taken, ns."""

    snapshot: Snapshot
    earliest_ns: int
    latest_ns: int


def own_process(platform: Platform, window_s: float = WINDOW_S) -> Iterator[Finding]:
    """Compare the threads of this process with their own clocks, and its total with getrusage."""
    with CpuLoadThreads(DUTIES) as load, closing(platform.open_source(None)) as source:
        _read(source)  # the first snapshot opens files that stay open for the others
        low = _usage_ns()
        first = _read(source)
        high = _usage_ns()
        time.sleep(window_s)
        spent = (_usage_ns() - high, 0)
        last = _read(source)
        spent = (spent[0], _usage_ns() - low)
        logs = load.logs()
    measured = measure(first.snapshot, last.snapshot)
    yield from _threads("own", "in process", load, logs, first, last)
    yield _total("own", "process total, by getrusage", measured, spent)
    yield _ticks("own", "scale of ticks", measured, spent)


def another_process(platform: Platform, window_s: float = WINDOW_S) -> Iterator[Finding]:
    """Compare the threads of another process with their own clocks, and its total with the sum of these clocks."""
    with CpuLoadProcess(DUTIES) as load, closing(platform.open_source(load.pid)) as source:
        load.note()
        _read(source)
        first = _read(source)
        time.sleep(window_s)
        last = _read(source)
        logs = load.logs()
    measured = measure(first.snapshot, last.snapshot)
    yield from _threads("other", "another process", load, logs, first, last)
    spans = [_spent(log, first, last) for log in logs.values()]
    spent = sum(low for low, _ in spans), sum(high for _, high in spans)
    yield _total("other", "process total, by all its threads' clocks", measured, spent)
    yield _ticks("other", "scale of ticks, another process", measured, spent)


def _read(source: Source) -> _Reading:
    for _ in range(ATTEMPTS):
        earliest_ns = time.monotonic_ns()
        reading = _Reading(source.snapshot(parts=Part.DETAIL), earliest_ns, time.monotonic_ns())
        if reading.latest_ns - reading.earliest_ns < WIDE_NS:
            break
    return reading


def _usage_ns() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


def _spent(log: Log, first: _Reading, last: _Reading) -> tuple[int, int]:
    """Return the bounds of the CPU time that a thread used between two readings, ns."""
    a = bounds_ns(log, first.earliest_ns, first.latest_ns)
    b = bounds_ns(log, last.earliest_ns, last.latest_ns)
    return max(0, b[0] - a[1]), b[1] - a[0]


def _threads(
    place: str, where: str, load: CpuLoad, logs: Mapping[str, Log], first: _Reading, last: _Reading
) -> Iterator[Finding]:
    measured = measure(first.snapshot, last.snapshot)
    percent = 100 / measured.elapsed_ns
    for duty in DUTIES:
        name = f"burn-{duty}"
        check, what = f"cpu.{place}.{duty}", f"thread at {duty} %, {where}"
        low, high = (ns * percent for ns in _spent(logs[name], first, last))
        try:
            index = measured.last.roster.tids.index(load.tids[name])
        except ValueError:
            yield make_finding(check, what, between(low, high, "%"), "the thread is not listed", False, BUG)
            continue
        read = measured.thread_cpu_ns[index] * percent
        error = measured.thread_error_ns(index) * percent
        yield make_finding(
            check,
            what,
            f"{between(low, high, '%')} by its own clock",
            f"{read:.1f} % ± {error:.1f}",
            low - error - ALLOWANCE_PERCENT <= read <= high + error + ALLOWANCE_PERCENT,
            BUG,
        )


def _total(place: str, what: str, measured: Measurement, spent: tuple[int, int]) -> Finding:
    low, high = (ns / 1e6 for ns in spent)
    slack = (measured.cpu_error_ns + LAG_NS * len(DUTIES)) / 1e6 + TOTAL_ALLOWANCE * high
    read = measured.cpu_ns / 1e6
    return make_finding(
        f"cpu.{place}.total",
        what,
        f"{between(low, high, 'ms', 0)} ± {slack:.0f}",
        f"{read:.0f} ms",
        low - slack <= read <= high + slack,
        "the process total omits threads or counts in another unit; " + BUG,
    )


def _ticks(place: str, what: str, measured: Measurement, spent: tuple[int, int]) -> Finding:
    """Compare user and system time with the bounds; the kernel counts ticks of 10 ms (Linux), 1 or 41.67 ns (macOS)."""
    check = f"ticks.{place}"
    a, b = measured.first.figures, measured.last.figures
    if a is None or b is None or None in (a.user_ns, a.system_ns, b.user_ns, b.system_ns):
        return not_here(check, what, "user and system time are not available")
    grown = (b.user_ns + b.system_ns) - (a.user_ns + a.system_ns)  # type: ignore[operator]
    true_ns = max(1, (spent[0] + spent[1]) // 2)
    oddities = "".join(f"; {warning}" for warning in measured.warnings if "hw.tbfrequency" in warning)
    return make_finding(
        check,
        what,
        "1 (0.7 to 1.4) of the true time",
        f"{grown / true_ns:.3f}{oddities}",
        0.7 <= grown / true_ns <= 1.4,
        "user and system time count in another unit than ns (0.024 is 24 MHz taken for 1 GHz); on macOS compare"
        " `sysctl hw.tbfrequency`; " + BUG,
    )
