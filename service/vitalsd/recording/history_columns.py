"""
Declare the columns of a history: their JSON, and the recorded figure that each one is made from.

A new column is a row in `PROCESS`, `MACHINE` or `APPLICATION`, and its description in the `TypedDict` beside it.
"""

from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from typing_extensions import TypedDict

from vitalsd.contract.shapes import Count, Doc, Lazy, UnixMs
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.series import EventKind
from vitalsd.snapshot import MEMORY_PRESSURE_LEVELS, THERMAL_STATES

__all__ = ["APPLICATION", "MACHINE", "PROCESS", "Column", "EventJson", "HistoryJson", "Values"]

Values = list[Any] | None
"""Cells of a column, one per row, ``None`` where there is no figure; ``None``: no row has one."""


class Column(NamedTuple):
    """
    A column that is made from one scalar of the record.

    Figures are read once a second, so with shorter rows most rows have none.
    """

    name: str
    scalar: str
    kind: Literal["level", "fraction", "growth", "percent", "steady"]
    """
    level: the last figure of the row, in whole units; fraction: the same with decimals. growth: between the last
    reading before the row and the last one in it; percent: the same, of the time in between; steady: whether it is 0.
    """
    unit: int = 1
    """Size of the unit of a level or a fraction."""
    names: tuple[str, ...] = ()
    """Names of the levels."""


PROCESS = (
    Column("anonymous_kb", "anonymous_bytes", "level", 1024),
    Column("footprint_kb", "footprint_bytes", "level", 1024),
    Column("swap_kb", "swap_bytes", "level", 1024),
    Column("open_fds", "open_fds", "level"),
    Column("major_faults", "major_faults", "growth"),
    Column("idle_wakeups", "idle_wakeups", "growth"),
    Column("interrupt_wakeups", "interrupt_wakeups", "growth"),
    Column("energy_nj", "energy_nj", "growth"),
)
MACHINE = (
    Column("cpu_percent", "machine_busy_ns", "percent"),
    Column("load_1m", "machine_load_milli", "fraction", 1000),
    Column("memory_available_kb", "machine_memory_available_bytes", "level", 1024),
    Column("swap_used_kb", "machine_swap_used_bytes", "level", 1024),
    Column("cpu_pressure_percent", "machine_cpu_pressure_ns", "percent"),
    Column("memory_pressure_percent", "machine_memory_pressure_ns", "percent"),
    Column("io_pressure_percent", "machine_io_pressure_ns", "percent"),
    Column("memory_pressure", "machine_memory_pressure_level", "level", names=MEMORY_PRESSURE_LEVELS),
    Column("quota_throttled_percent", "machine_quota_throttled_ns", "percent"),
    Column("thermal_state", "machine_thermal_level", "level", names=THERMAL_STATES),
)
APPLICATION = (
    Column("cpu_percent", "tree_cpu_ns", "percent"),
    Column("rss_kb", "tree_rss_bytes", "level", 1024),
    Column("process_count", "tree_process_count", "level"),
    Column("complete", "tree_gaps", "steady"),
)

Numbers = list[float | None] | None
Counts = list[int | None] | None


class ThreadColumnJson(TypedDict):
    """One thread over time."""

    tid: Count
    name: str
    cpu_percent: Annotated[list[float | None], Doc("One per row; null while it did not live.")]
    wait_percent: Annotated[
        Numbers,
        Doc("Linux: time for which it was ready to run and did not run; with cpu_percent at most 100. null: unknown."),
    ]


class ChildColumnJson(TypedDict):
    """One descendant of the target over time; never this sidecar."""

    pid: Count
    name: str
    cpu_percent: Annotated[list[float | None], Doc("One per row; null where it was not seen.")]
    rss_kb: Annotated[list[int | None], Doc("Resident memory at the last reading in the row, KiB.")]


class MachineColumnsJson(TypedDict):
    """The machine over time; no process and no user is named."""

    scope: Annotated[Literal["host", "container"], Doc("What the figures cover, at the end of the table.")]
    cpu_percent: Annotated[Numbers, Doc("CPU time of all cores: 100 = one core busy.")]
    other_percent: Annotated[
        Numbers, Doc("cpu_percent less this process, or less the application if children are recorded; not below 0.")
    ]
    load_1m: Annotated[Numbers, Doc("Load average of one minute.")]
    memory_available_kb: Annotated[Counts, Doc("Memory that programs can get without swapping, KiB.")]
    swap_used_kb: Counts
    cpu_pressure_percent: Annotated[Numbers, Doc("Linux: time in which at least one task waited for a CPU (PSI).")]
    memory_pressure_percent: Annotated[Numbers, Doc("Linux: the same for memory.")]
    io_pressure_percent: Annotated[Numbers, Doc("Linux: the same for input and output.")]
    memory_pressure: Annotated[
        list[Literal["normal", "warning", "critical"] | None] | None, Doc("macOS: the kernel's level.")
    ]
    quota_throttled_percent: Annotated[
        Numbers, Doc("Linux: time for which a CPU quota kept the target from running; summed over cores.")
    ]
    thermal_state: Annotated[
        list[Literal["nominal", "moderate", "heavy", "trapping", "sleeping", "throttled"] | None] | None,
        Doc("macOS: thermal pressure. Linux: throttled if the CPU was throttled since the reading before."),
    ]


class ApplicationColumnsJson(TypedDict):
    """The target and its descendants as one application, over time; a sidecar that it has started is not included."""

    cpu_percent: Annotated[Numbers, Doc("CPU time of all of them, with that of descendants that ended.")]
    rss_kb: Annotated[Counts, Doc("Sum of resident memory, KiB; shared pages count once for each process.")]
    process_count: Counts
    complete: Annotated[
        list[bool | None] | None,
        Doc("false: a descendant started and ended unseen, one was unreadable, or there were more than 256."),
    ]


class GaugeColumnJson(TypedDict):
    """A number of the application over time."""

    name: str
    value: Annotated[
        list[float | None], Doc("Last value in the row; null where the application had not set it, or had closed it.")
    ]


class PastMarkJson(TypedDict):
    """A label on the time axis."""

    time_ms: UnixMs
    label: str


class EventJson(TypedDict):
    """Something the recorder noticed."""

    time_ms: UnixMs
    kind: Annotated[
        EventKind,
        Doc(
            "stopped: by a signal, a debugger or a freezer. clock_set: the wall clock. inconsistent: the CPU"
            " counters contradicted each other, and the threads have no figure there. child_reaped: the target waited"
            " for children with CPU time from before. hang: no beat of a heartbeat"
            " came for longer than its limit; it has the time of the last beat."
        ),
    ]
    detail: str
    duration_ms: NotRequired[Annotated[Count, Doc("Length of a hang, ms; so far, if it is ongoing.")]]
    heartbeat: NotRequired[Annotated[str, Doc("Name of the heartbeat that was silent.")]]
    cause: NotRequired[
        Annotated[
            HangCause,
            Doc(
                "starved: runnable without a CPU. blocked: asleep, where `detail` states. idle: asleep in its event"
                " loop. unknown: two causes fit, or none."
            ),
        ]
    ]
    ongoing: NotRequired[Annotated[bool, Doc("Whether the hang lasts.")]]


class HistoryJson(TypedDict):
    """
    A table over time, one list per quantity, all equally long. A row covers the time since the row before.

    A column in which no row has a figure is null. Most figures are read once a second: a shorter row may have none.
    """

    schema: Literal[2]
    platform: Annotated[str, Lazy("vitalsd.contract.metrics:Platform")]
    target: Annotated[dict[str, Any], Lazy("vitalsd.contract.metrics:Target")]
    interval_ms: Annotated[Count, Doc("Intended time between two snapshots, ms.")]
    time_ms: Annotated[list[int], Doc("End of each row, Unix time, ms.")]
    elapsed_ms: Annotated[list[float], Doc("Measured length of each row, ms.")]
    cpu_percent: Annotated[list[float], Doc("Of the process; 100 = one core busy.")]
    rss_kb: Annotated[list[int], Doc("Resident memory at the end of the row, KiB.")]
    vm_size_kb: Annotated[list[int], Doc("Virtual memory at the end of the row, KiB.")]
    thread_count: list[int]
    wait_percent: Annotated[
        Numbers, Doc("Time for which threads were ready to run and did not run, summed over the threads.")
    ]
    children_percent: Annotated[
        Numbers,
        Doc("CPU time of children that the process waited for; null also where they used part of it before the row."),
    ]
    anonymous_kb: Annotated[Counts, Doc("Linux: resident memory that belongs to no file, KiB.")]
    footprint_kb: Annotated[Counts, Doc("macOS: physical footprint, KiB.")]
    swap_kb: Annotated[Counts, Doc("Linux: swapped memory of the process, KiB.")]
    open_fds: Counts
    major_faults: Annotated[Counts, Doc("Page faults that needed IO, in the row.")]
    idle_wakeups: Annotated[Counts, Doc("macOS: package idle wakeups, in the row.")]
    interrupt_wakeups: Annotated[Counts, Doc("macOS: interrupt wakeups, in the row.")]
    energy_nj: Annotated[Counts, Doc("macOS on Apple silicon: energy used in the row, nJ.")]
    machine: Annotated[MachineColumnsJson | None, Doc("null: not recorded.")]
    application: Annotated[ApplicationColumnsJson | None, Doc("null: children are not recorded.")]
    threads: Annotated[list[ThreadColumnJson], Doc("The `top` busiest, busiest first.")]
    children: Annotated[list[ChildColumnJson], Doc("The `top` busiest, busiest first; empty unless recorded.")]
    gauges: Annotated[
        list[GaugeColumnJson], Doc("By name. At most 64: those that have had no value for the longest are left out.")
    ]
    marks: list[PastMarkJson]
    events: list[EventJson]
    truncated: NotRequired[
        Annotated[Literal[True], Doc("Threads or children that were asked for, or gauges, are left out.")]
    ]
