"""
Define the counters for Prometheus and OpenTelemetry in tables: a new counter is one new row.

Names and units are those of the client libraries of Prometheus and of OpenTelemetry's conventions for processes. A
counter without a name in either has ``vitalsd`` in its name. So have those of the machine: the conventions reserve
``system.*`` for hosts, and the figures may be those of a container.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.hangs import HeartbeatStatus
from vitalsd.sampling.target_pool import PooledTarget
from vitalsd.snapshot import MEMORY_PRESSURE_LEVELS, THERMAL_STATES, Identity, Snapshot

__all__ = [
    "MACHINE_COUNTERS",
    "NO_SIGNALS",
    "OWN_COUNTERS",
    "SIGNAL_COUNTERS",
    "TARGET_COUNTERS",
    "TARGET_UP",
    "THREADS_LEFT_OUT",
    "THREAD_COUNTERS",
    "Counter",
    "OwnReading",
    "PerThreadCounter",
    "Point",
    "SignalCounter",
    "SignalsReading",
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


class SignalsReading(NamedTuple):
    """What the target signals: the data from which the counters of its heartbeats and gauges are read."""

    heartbeats: Sequence[HeartbeatStatus] = ()
    gauges: Mapping[str, float] = MappingProxyType({})
    hang_counts: Mapping[tuple[str, HangCause], int] = MappingProxyType({})

    @classmethod
    def of(cls, target: PooledTarget) -> "SignalsReading":
        """Read what a target signals now."""
        return cls(target.heartbeats, target.gauges, target.hang_counts)


NO_SIGNALS = SignalsReading()
"""A target that signals nothing."""


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
    """Text for OpenTelemetry; empty: that of `help`."""
    points_of: Callable[[ReadingT], Sequence[Point]] | None = None
    """Return the points for OpenTelemetry, in place of `value`."""
    is_private: bool = False
    """Whether the kernel shows it only to the user of the target."""
    is_since_start: bool = True
    """Whether a counter of the target began at 0 when the target started; OpenTelemetry gets no start of any other."""

    def points(self, reading: ReadingT) -> Sequence[Point]:
        """Return the points for OpenTelemetry; if there are none, the metric is left out."""
        if self.points_of is not None:
            return self.points_of(reading)
        value = self.value(reading)
        return () if value is None else (({}, value),)


class PerThreadCounter(NamedTuple):
    """One counter of each thread. ``{limit}`` in a text stands for the number of threads with a series of their own."""

    values: Callable[[Snapshot], Sequence[float] | None]
    """Return the values in the order of the roster, in the unit of the name; ``None``: the counter is left out."""
    prometheus: str
    help: str
    otel: str
    unit: str
    description: str


class SignalCounter(NamedTuple):
    """One counter with a series for each heartbeat or gauge. Its labels have the same names in both exporters."""

    kind: Literal["counter", "gauge"]
    """A counter began at 0 with the sidecar."""
    points: Callable[[SignalsReading], Sequence[Point]]
    labels: tuple[str, ...]
    prometheus: str
    otel: str
    unit: str
    help: str


def _gauges(reading: SignalsReading) -> list[Point]:
    return [({"name": name}, value) for name, value in reading.gauges.items()]


def _silences(reading: SignalsReading) -> list[Point]:
    silent_ns: dict[str, int] = {}
    for each in reading.heartbeats:  # two clients may have one of the same name
        silent_ns[each.name] = max(silent_ns.get(each.name, 0), each.silent_ns)
    return [({"name": name}, ns / 1e9) for name, ns in silent_ns.items()]


def _hangs(reading: SignalsReading) -> list[Point]:
    """Return the hangs; an open heartbeat has all causes, because `increase` does not see a series that begins at 1."""
    none = {(each.name, cause): 0 for each in reading.heartbeats for cause in get_args(HangCause)}
    return [({"name": name, "cause": cause}, count) for (name, cause), count in {**none, **reading.hang_counts}.items()]


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


def _waits(snapshot: Snapshot) -> list[float] | None:
    return None if snapshot.thread_wait_ns is None else [ns / 1e9 for ns in snapshot.thread_wait_ns]


def _figure(reading: TargetReading, name: str, unit: float = 1) -> float | None:
    """Return a field of `ProcessFigures`, divided by `unit`."""
    return _divided(getattr(reading.snapshot.figures, name, None), unit)


def _machine(reading: TargetReading, name: str, unit: float = 1) -> float | None:
    """Return a field of `MachineFigures`, divided by `unit`."""
    return _divided(getattr(reading.snapshot.machine, name, None), unit)


def _divided(value: int | None, unit: float) -> float | None:
    return value if value is None or unit == 1 else value / unit


def _levels(names: Sequence[str]) -> str:
    """Return the meaning of each level, for a help text."""
    return ", ".join(f"{level} {name}" for level, name in enumerate(names))


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
        value=partial(_figure, name="open_fds"),
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
    Counter[TargetReading](
        kind="counter",
        value=partial(_figure, name="major_faults"),
        prometheus="vitalsd_process_major_faults",
        help="Page faults of the target that needed IO.",
    ),
    Counter[TargetReading](
        kind="counter",
        value=lambda reading: _divided(reading.snapshot.wait_ns, 1e9),
        prometheus="vitalsd_process_wait_seconds",
        help="Time for which threads of the target were runnable and did not run, summed over threads, in seconds.",
        otel="vitalsd.process.wait.time",
        unit="s",
        is_since_start=False,
    ),
    Counter[TargetReading](
        kind="counter",
        value=partial(_figure, name="reaped_ns", unit=1e9),
        prometheus="vitalsd_children_cpu_seconds",
        help="CPU time of children that the target has waited for, in seconds; counted when it waits.",
        otel="vitalsd.children.cpu.time",
        unit="s",
    ),
    Counter[TargetReading](
        kind="level",
        value=partial(_figure, name="anonymous_bytes"),
        prometheus="vitalsd_process_anonymous_memory_bytes",
        help="Resident memory of the target that belongs to no file, in bytes (Linux).",
        otel="vitalsd.process.memory.anonymous",
        unit="By",
    ),
    Counter[TargetReading](
        kind="level",
        value=partial(_figure, name="footprint_bytes"),
        prometheus="vitalsd_process_memory_footprint_bytes",
        help="Memory that is charged to the target, compressed and swapped memory included, in bytes (macOS).",
        otel="vitalsd.process.memory.footprint",
        unit="By",
        is_private=True,
    ),
    Counter[TargetReading](
        kind="level",
        value=partial(_figure, name="swap_bytes"),
        prometheus="vitalsd_process_swap_bytes",
        help="Swapped memory of the target in bytes (Linux).",
        otel="vitalsd.process.memory.swap",
        unit="By",
    ),
    Counter[TargetReading](
        kind="counter",
        value=partial(_figure, name="idle_wakeups"),
        prometheus="vitalsd_process_idle_wakeups",
        help="Times that the target woke a CPU package that was idle (macOS).",
        otel="vitalsd.process.idle_wakeups",
        unit="{wakeup}",
        is_private=True,
    ),
    Counter[TargetReading](
        kind="counter",
        value=partial(_figure, name="interrupt_wakeups"),
        prometheus="vitalsd_process_interrupt_wakeups",
        help="Times that an interrupt woke the target (macOS).",
        otel="vitalsd.process.interrupt_wakeups",
        unit="{wakeup}",
        is_private=True,
    ),
    Counter[TargetReading](
        kind="counter",
        value=partial(_figure, name="energy_nj", unit=1e9),
        prometheus="vitalsd_process_energy_joules",
        help="Energy that the target has used, in joules (macOS on Apple silicon).",
        otel="vitalsd.process.energy",
        unit="J",
        is_private=True,
    ),
)

MACHINE_COUNTERS = (
    Counter[TargetReading](
        kind="gauge",
        value=lambda reading: reading.snapshot.machine and int(reading.snapshot.machine.in_container),
        prometheus="vitalsd_machine_in_container",
        help="1 if the figures of the machine are those of the container of the target, 0 if those of the host.",
        otel="vitalsd.machine.in_container",
        unit="1",
    ),
    Counter[TargetReading](
        kind="counter",
        value=partial(_machine, name="busy_ns", unit=1e9),
        prometheus="vitalsd_machine_cpu_seconds",
        help="CPU time of all cores of the machine, user, system and interrupts, in seconds.",
        otel="vitalsd.machine.cpu.time",
        unit="s",
        is_since_start=False,
    ),
    Counter[TargetReading](
        kind="gauge",
        value=partial(_machine, name="load_milli", unit=1000),
        prometheus="vitalsd_machine_load1",
        help="Load average of the machine over one minute.",
        otel="vitalsd.machine.load_1m",
        unit="1",
    ),
    Counter[TargetReading](
        kind="level",
        value=partial(_machine, name="memory_available_bytes"),
        prometheus="vitalsd_machine_memory_available_bytes",
        help="Memory that programs can get without swapping, in bytes.",
        otel="vitalsd.machine.memory.available",
        unit="By",
    ),
    Counter[TargetReading](
        kind="level",
        value=partial(_machine, name="swap_used_bytes"),
        prometheus="vitalsd_machine_swap_used_bytes",
        help="Swap in use on the machine, in bytes.",
        otel="vitalsd.machine.swap.used",
        unit="By",
    ),
    *(
        Counter[TargetReading](
            kind="counter",
            value=partial(_machine, name=f"{what}_pressure_ns", unit=1e9),
            prometheus=f"vitalsd_machine_{what}_pressure_seconds",
            help=f"Time for which at least one task of the machine waited for {thing}, in seconds (Linux, PSI).",
            otel=f"vitalsd.machine.{what}.pressure.time",
            unit="s",
            is_since_start=False,
        )
        for what, thing in (("cpu", "a CPU"), ("memory", "memory"), ("io", "IO"))
    ),
    Counter[TargetReading](
        kind="counter",
        value=partial(_machine, name="quota_throttled_ns", unit=1e9),
        prometheus="vitalsd_machine_quota_throttled_seconds",
        help="Time for which a CPU quota kept the target's control group from running, in seconds (Linux).",
        otel="vitalsd.machine.quota_throttled.time",
        unit="s",
        is_since_start=False,
    ),
    Counter[TargetReading](
        kind="gauge",
        value=partial(_machine, name="memory_pressure_level"),
        prometheus="vitalsd_machine_memory_pressure_level",
        help=f"Memory pressure of the machine (macOS): {_levels(MEMORY_PRESSURE_LEVELS)}.",
        otel="vitalsd.machine.memory.pressure_level",
        unit="1",
    ),
    Counter[TargetReading](
        kind="gauge",
        value=partial(_machine, name="thermal_level"),
        prometheus="vitalsd_machine_thermal_level",
        help=f"Thermal state of the machine: {_levels(THERMAL_STATES)}.",
        otel="vitalsd.machine.thermal_level",
        unit="1",
    ),
)
"""Counters of the machine on which the target runs; they name no process and no user."""

THREAD_COUNTERS = (
    PerThreadCounter(
        values=lambda snapshot: [ns / 1e9 for ns in snapshot.thread_cpu_ns],
        prometheus="vitalsd_thread_cpu_seconds",
        help="CPU time of a living thread in seconds; of more than {limit}, those with the most.",
        otel="vitalsd.thread.cpu.time",
        unit="s",
        description="CPU time of a living thread; of more than {limit}, those with the most.",
    ),
    PerThreadCounter(
        values=_waits,
        prometheus="vitalsd_thread_wait_seconds",
        help="Time for which a living thread was runnable and did not run, in seconds; counted when the wait ends.",
        otel="vitalsd.thread.wait.time",
        unit="s",
        description="Time for which a living thread was runnable and did not run; counted when the wait ends.",
    ),
)

SIGNAL_COUNTERS = (
    SignalCounter(
        kind="gauge",
        points=_gauges,
        labels=("name",),
        prometheus="vitalsd_gauges",  # promtool refuses a name that ends with _gauge
        otel="vitalsd.gauge",
        unit="1",
        help="Gauges of the application: the last value that it has set.",
    ),
    SignalCounter(
        kind="gauge",
        points=_silences,
        labels=("name",),
        prometheus="vitalsd_heartbeat_silent_seconds",
        otel="vitalsd.heartbeat.silent.time",
        unit="s",
        help="Time since the last beat of a heartbeat in which the sidecar was looking, in seconds; 0 if it is paused.",
    ),
    SignalCounter(
        kind="counter",
        points=_hangs,
        labels=("name", "cause"),
        prometheus="vitalsd_hangs",
        otel="vitalsd.hangs",
        unit="{hang}",
        help="Hangs of a heartbeat by cause since the sidecar started; one that lasts counts once its cause is known.",
    ),
)
"""Counters of heartbeats and gauges, for the user of the target alone: the application has named them."""

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
