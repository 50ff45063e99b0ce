"""
Define the counters for Prometheus and OpenTelemetry in tables: a new counter is one new row.

Names and units are those of the client libraries of Prometheus and of OpenTelemetry's conventions for processes. A
counter without a name in either has ``vitalsd`` in its name.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from vitalsd.snapshot import Identity, Snapshot

__all__ = [
    "OWN_COUNTERS",
    "TARGET_COUNTERS",
    "TARGET_UP",
    "THREADS_LEFT_OUT",
    "THREAD_COUNTERS",
    "Counter",
    "OwnReading",
    "PerThreadCounter",
    "Point",
    "TargetReading",
    "busiest_threads",
]

ReadingT = TypeVar("ReadingT")
Point = tuple[dict[str, Any], float]
"""Attributes and a value of OpenTelemetry."""


class TargetReading(NamedTuple):
    """The data from which the counters of the target are read."""

    identity: Identity
    snapshot: Snapshot


class OwnReading(NamedTuple):
    """The data from which the counters of vitalsd itself are read."""

    snapshots_taken: int
    recorder: Mapping[str, Any] | None = None
    """The state of the recorder, as in ``/info``; ``None``: there is no recorder."""


@dataclass(frozen=True, kw_only=True)
class Counter(Generic[ReadingT]):
    """One counter. An exporter leaves it out if its name for that exporter, `prometheus` or `otel`, is empty."""

    kind: Literal["counter", "gauge", "level"]
    """A level is a gauge for Prometheus and an UpDownCounter for OpenTelemetry."""
    value: Callable[[ReadingT], float | None]
    """Return the value in the unit of the name; ``None``: it is unknown, and the counter is left out."""
    prometheus: str = ""
    help: str = ""
    otel: str = ""
    unit: str = ""
    description: str = ""
    """Text for OpenTelemetry, in place of `help`."""
    points_of: Callable[[ReadingT], Sequence[Point]] | None = None
    """Return the points for OpenTelemetry, in place of `value`."""
    is_private: bool = False
    """Whether the kernel shows it only to the user of the target."""

    def points(self, reading: ReadingT) -> Sequence[Point]:
        """Return the points for OpenTelemetry; if there are none, the metric is left out."""
        if self.points_of is not None:
            return self.points_of(reading)
        value = self.value(reading)
        return () if value is None else (({}, value),)


class PerThreadCounter(NamedTuple):
    """One counter of each thread. ``{limit}`` in a text stands for the number of threads with a series of their own."""

    values: Callable[[Snapshot], Sequence[float]]
    """Return the values in the order of the roster, in the unit of the name."""
    prometheus: str
    help: str
    otel: str
    unit: str
    description: str


def _cpu_modes(reading: TargetReading) -> list[Point]:
    figures = reading.snapshot.figures
    if figures is None or figures.user_ns is None or figures.system_ns is None:
        return []
    return [({"cpu.mode": "user"}, figures.user_ns / 1e9), ({"cpu.mode": "system"}, figures.system_ns / 1e9)]


def _faults(reading: TargetReading) -> list[Point]:
    figures = reading.snapshot.figures
    if figures is None:
        return []
    faults = (("minor", figures.minor_faults), ("major", figures.major_faults))
    return [({"system.paging.fault.type": kind}, count) for kind, count in faults if count is not None]


def _recorded(own: OwnReading, key: str) -> int | None:
    return None if own.recorder is None else own.recorder[key]


TARGET_UP = Counter[TargetReading | None](
    kind="gauge",
    value=lambda reading: int(reading is not None),
    prometheus="vitalsd_target_up",
    help="1 if the target can be read, else 0.",
    otel="vitalsd.target.up",
    unit="1",
    description="1 if the target can be read, else 0.",
)

TARGET_COUNTERS = (
    Counter[TargetReading](
        kind="counter",
        value=lambda reading: reading.snapshot.cpu_ns / 1e9,
        prometheus="process_cpu_seconds",
        help="CPU time of the target, living and exited threads, user and system, in seconds.",
        otel="process.cpu.time",
        unit="s",
        description="CPU time of all threads, living and exited.",
        points_of=_cpu_modes,
    ),
    Counter[TargetReading](
        kind="level",
        value=lambda reading: reading.snapshot.rss_bytes,
        prometheus="process_resident_memory_bytes",
        help="Resident memory of the target in bytes.",
        otel="process.memory.usage",
        unit="By",
        description="Physical memory in use.",
    ),
    Counter[TargetReading](
        kind="level",
        value=lambda reading: reading.snapshot.vm_bytes,
        prometheus="process_virtual_memory_bytes",
        help="Virtual memory of the target in bytes.",
        otel="process.memory.virtual",
        unit="By",
        description="Committed virtual memory.",
    ),
    Counter[TargetReading](
        kind="gauge",
        value=lambda reading: reading.identity.started_unix_ns / 1e9,
        prometheus="process_start_time_seconds",
        help="Start of the target in Unix time, seconds.",
    ),
    Counter[TargetReading](
        kind="level",
        value=lambda reading: len(reading.snapshot.roster),
        prometheus="process_threads",
        help="Threads of the target.",
        otel="process.thread.count",
        unit="{thread}",
        description="Threads.",
    ),
    Counter[TargetReading](
        kind="gauge",
        value=lambda reading: reading.snapshot.uptime_ns / 1e9,
        otel="process.uptime",
        unit="s",
        description="Time since the process started.",
    ),
    Counter[TargetReading](
        kind="level",
        value=lambda reading: reading.snapshot.figures and reading.snapshot.figures.open_fds,
        prometheus="process_open_fds",
        help="Open file descriptors of the target.",
        otel="process.unix.file_descriptor.count",
        unit="{file_descriptor}",
        description="Open file descriptors.",
        is_private=True,
    ),
    Counter[TargetReading](
        kind="counter",
        value=lambda _: None,
        otel="process.paging.faults",
        unit="{fault}",
        description="Page faults.",
        points_of=_faults,
    ),
)

THREAD_COUNTERS = (
    PerThreadCounter(
        values=lambda snapshot: [ns / 1e9 for ns in snapshot.thread_cpu_ns],
        prometheus="vitalsd_thread_cpu_seconds",
        help="CPU time of a living thread in seconds; of more than {limit}, those with the most.",
        otel="vitalsd.thread.cpu.time",
        unit="s",
        description="CPU time of a living thread; of more than {limit}, those with the most.",
    ),
)

THREADS_LEFT_OUT = Counter[int](
    kind="gauge",
    value=lambda left_out: left_out,
    prometheus="vitalsd_threads_left_out",
    help="Living threads without a series of their own.",
    otel="vitalsd.thread.left_out",
    unit="{thread}",
    description="Living threads without a series.",
)

OWN_COUNTERS = (
    Counter[OwnReading](
        kind="counter",
        value=lambda _: time.process_time(),
        prometheus="vitalsd_cpu_seconds",
        help="CPU time of this service in seconds.",
        otel="vitalsd.cpu.time",
        unit="s",
        description="CPU time of vitalsd itself.",
    ),
    Counter[OwnReading](
        kind="gauge",
        value=lambda _: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        prometheus="vitalsd_peak_resident_memory_bytes",
        help="Most resident memory this service ever had, in bytes.",
    ),
    Counter[OwnReading](
        kind="counter",
        value=lambda own: own.snapshots_taken,
        prometheus="vitalsd_snapshots",
        help="Snapshots taken of the target.",
        otel="vitalsd.snapshots",
        unit="{snapshot}",
        description="Snapshots taken of the target.",
    ),
    Counter[OwnReading](
        kind="counter",
        value=partial(_recorded, key="missed"),
        prometheus="vitalsd_recorder_missed",
        help="Snapshots the recorder missed.",
    ),
    Counter[OwnReading](
        kind="gauge",
        value=partial(_recorded, key="size_bytes"),
        prometheus="vitalsd_recorder_size_bytes",
        help="Memory of the record in bytes.",
    ),
    Counter[OwnReading](
        kind="gauge",
        value=partial(_recorded, key="snapshots"),
        prometheus="vitalsd_recorder_snapshots",
        help="Snapshots in the record.",
    ),
)


def busiest_threads(snapshot: Snapshot, limit: int) -> list[int]:
    """Return the indexes in the roster, ascending, of the `limit` threads with the most CPU time."""
    cpu_ns = snapshot.thread_cpu_ns
    return sorted(nlargest(limit, range(len(cpu_ns)), key=lambda i: (cpu_ns[i], -i)))
