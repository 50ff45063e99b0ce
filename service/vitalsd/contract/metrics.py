"""
Model the wire contract: the answer of ``GET /metrics`` and the content of ``runtime-metrics.json``.

These models declare the schema and read answers on the client's side. The sidecar writes bytes with
`vitalsd.contract.encoding`; a property test compares the two.

Units are in the names: ``_ms``, ``_secs``, ``_kb`` (KiB), ``_ns``, ``_percent`` (100 = one core busy).
"""

from datetime import datetime
from typing import Annotated, Generic, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypeVar

__all__ = [
    "Accounting",
    "ApplicationMetrics",
    "ChildMetrics",
    "FullMetrics",
    "FullProcess",
    "FullThread",
    "Host",
    "Machine",
    "Measured",
    "Platform",
    "Pressure",
    "ProcessMetrics",
    "Resolution",
    "RuntimeMetrics",
    "Target",
    "ThreadMetrics",
    "Unavailable",
    "Window",
    "parse_runtime_metrics",
]

Platform = Literal["linux", "macos"]

Percent = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SignedPercent = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProcessMetrics(_Wire):
    """The process as a whole, over the window."""

    cpu_percent: Percent = Field(
        description="CPU time of all threads, living and exited, per time. 100 = one core busy; may exceed it."
    )
    rss_kb: Count = Field(description="Resident memory at the end of the window, KiB.")
    vm_size_kb: Count = Field(description="Virtual address space at the end of the window, KiB.")
    uptime_secs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        description="Seconds since the target process started; unaffected by wall-clock steps."
    )


class _Thread(_Wire):
    tid: Count = Field(
        description="The kernel's thread id: Linux tid, macOS 64-bit thread_id; equals Python's get_native_id()."
    )
    name: str = Field(description="The operating system's name of the thread, '' if it has none.")


class ThreadMetrics(_Thread):
    """One thread alive at the end of the window."""

    cpu_percent: Percent = Field(
        description="100 = one core busy. A thread born inside the window reads 0 in the basic answer."
    )


ThreadT = TypeVar("ThreadT", default=ThreadMetrics)
"""`ThreadMetrics`, with a figure that is never null, or `FullThread`."""


class Measured(_Wire, Generic[ThreadT]):
    """Numbers of one process over one window: the basic answer."""

    sample_window_ms: Count = Field(description="The time that was really measured between the two snapshots, ms.")
    process: ProcessMetrics
    threads: tuple[ThreadT, ...]
    platform: Platform
    truncated: bool = Field(
        default=False,
        description="The sidecar had to leave out threads, the idlest ones: more than 20 000, or 8 MiB, in one answer. "
        "The basic answer has this key then and only then.",
    )


class Unavailable(_Wire):
    """The reason why the metrics are not available."""

    platform: str
    available: Literal[False]
    reason: str = Field(description="One sentence a developer can act on.")


class Target(_Wire):
    """The process that was measured. ``start_id`` names this run of it and no other."""

    pid: Count
    name: str
    started_at: datetime = Field(description="Wall-clock start, UTC.")
    start_id: str = Field(description="pid, start time and boot, so that a reused pid differs.")


class Window(_Wire):
    """The time the numbers cover."""

    requested_ms: Count
    measured_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    mode: Literal["wait", "trailing"]
    started_at: datetime
    ended_at: datetime
    suspended: bool = Field(description="The machine slept inside the window; rates are over the time awake.")


class FullProcess(ProcessMetrics):
    """``detail=full``: more of the process. A field the platform lacks is null."""

    user_percent: Percent | None
    system_percent: Percent | None
    cpu_percent_error: Percent = Field(
        description="Half-width of the error bar of cpu_percent, from clock grain, lag and read skew."
    )
    wait_percent: Percent | None = Field(
        description="Time for which threads were runnable and did not run, summed over the threads. A wait counts when"
        " it ends. Linux: a lower bound if threads exited in the window; throttling by a CPU quota counts as waiting,"
        " and time that a hypervisor takes does not. macOS: of the process only."
    )
    wait_percent_error: Percent | None = Field(
        description="Half-width of the error bar of wait_percent. Linux: null, because a wait in progress is unknown."
    )
    children_percent: Percent | None = Field(
        description="CPU time of children that the process waited for in the window; Linux: in ticks of 10 ms, and"
        " without the children of a process that ignores SIGCHLD. null: they used part of it before the window, and"
        " were not watched."
    )
    footprint_kb: Count | None = Field(description="macOS physical footprint (Activity Monitor's Memory), KiB.")
    anonymous_kb: Count | None = Field(description="Linux: resident memory that belongs to no file, KiB.")
    peak_rss_kb: Count | None
    swap_kb: Count | None = Field(description="Linux VmSwap, KiB.")
    thread_count: Count
    open_fds: Count | None
    minor_faults: Count | None = Field(description="Page faults served without IO since the start.")
    major_faults: Count | None = Field(description="Page faults that needed IO since the start.")
    idle_wakeups: Count | None = Field(description="macOS: package idle wakeups since the start.")
    interrupt_wakeups: Count | None = Field(description="macOS: interrupt wakeups since the start.")
    energy_nj: Count | None = Field(description="macOS on Apple silicon: energy used since the start, nJ.")
    p_core_percent: Percent | None = Field(
        description="macOS on Apple silicon: part of cpu_percent that ran on performance cores."
    )
    qos_percent: dict[str, Percent] | None = Field(description="macOS: cpu_percent by quality-of-service class.")


class FullThread(_Thread):
    """
    ``detail=full``: more of a thread.

    ``cpu_percent`` covers a thread born in the window too. It is null where the target executed another program in the
    window, and where it contradicts the process's CPU clock: see `warnings`.
    """

    cpu_percent: Percent | None
    user_percent: Percent | None
    system_percent: Percent | None
    cpu_percent_error: Percent | None
    wait_percent: Percent | None = Field(
        description="Linux: time for which the thread was runnable and did not run. A wait counts when it ends, and one"
        " that is in progress may be missing; so may that of a thread which moved to another CPU and did not run. At"
        " most the part of the window in which the thread did not run."
    )
    cpu_time_ns: Count = Field(description="CPU time since the thread started, ns.")
    state: str | None = Field(
        description="State at the end of the window: running, sleeping, waiting, stopped, dead, and others of the"
        " kernel. runnable: it was ready to run at both ends, and did not run."
    )
    priority: int | None
    born_in_window: bool


class Accounting(_Wire):
    """The balance of CPU time: process = living + exited + unattributed, in percent of one core."""

    process_percent: Percent
    living_percent: Percent = Field(description="CPU of the threads alive at the end of the window.")
    exited_percent: Percent = Field(description="CPU of threads that ended inside the window.")
    unattributed_percent: SignedPercent = Field(
        description="The rest: readings are not taken at one instant. May be negative."
    )


class Resolution(_Wire):
    """How fine and how fresh the thread CPU counters are."""

    cpu_ns: Count = Field(description="Smallest step of a thread's CPU counter, ns.")
    lag_ns: Count = Field(description="How far the counter of a thread that is running now may lag, ns.")
    source: str


class Host(_Wire):
    """The machine, without anything that names it; of a replay only ``os`` is known."""

    cpu_count: Count | None
    os: str
    os_version: str | None
    arch: str | None


class Pressure(_Wire):
    """Linux: part of the window in which at least one task waited for a resource (PSI, ``some``)."""

    cpu: Percent | None
    memory: Percent | None
    io: Percent | None


class Machine(_Wire):
    """The machine over the window. No process and no user is named."""

    scope: Literal["host", "container"] = Field(description="What the figures cover: the host, or the container.")
    cpu_percent: Percent | None = Field(description="CPU time of all cores: 100 = one core busy.")
    other_percent: Percent | None = Field(
        description="cpu_percent less this process, or less the application if children=true; not below 0. A sidecar"
        " beside the process is part of it."
    )
    load_1m: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        description="Load average of the last minute. null in a container, because the kernel has it for the host only."
    )
    memory_available_kb: Count | None = Field(description="Memory that programs can get without swapping, KiB.")
    swap_used_kb: Count | None
    pressure_percent: Pressure
    memory_pressure: Literal["normal", "warning", "critical"] | None = Field(
        description="macOS: the kernel's level of memory pressure."
    )
    quota_throttled_percent: Percent | None = Field(
        description="Linux: time for which a CPU quota kept the target from running; summed over cores."
    )
    thermal_state: Literal["nominal", "moderate", "heavy", "trapping", "sleeping", "throttled"] | None = Field(
        description="macOS: thermal pressure. Linux: throttled if the CPU was throttled in the last second;"
        " null if it does not count that, as in a virtual machine."
    )


class ChildMetrics(_Wire):
    """A living descendant of the target, at the end of the window; never this sidecar."""

    pid: Count
    name: str
    cpu_percent: Percent
    rss_kb: Count
    thread_count: Annotated[int, Field(ge=1)] | None = Field(description="null: a replay of a report has none.")


class ApplicationMetrics(_Wire):
    """The target and its descendants as one application; a sidecar that the target has started is not included."""

    cpu_percent: Percent = Field(description="CPU time of all of them, with that of descendants that ended.")
    rss_kb: Count = Field(description="Sum of resident memory, KiB; shared pages count once for each process.")
    process_count: Count
    complete: bool = Field(
        description="false: a descendant started and ended unseen, one was unreadable, or there are more than 256."
    )


class FullMetrics(Measured[FullThread]):
    """``detail=full``: the basic answer with more fields."""

    process: FullProcess
    machine: Machine | None = Field(description="null: it was not read at both ends of the window.")
    children: tuple[ChildMetrics, ...] | None = Field(
        default=None,
        description="Living descendants of the target, without this sidecar; the key is there with children=true only.",
    )
    application: ApplicationMetrics | None = Field(
        default=None,
        description="The target and its descendants, without a sidecar that it has started (/info has its cost); the"
        " key is there with children=true only.",
    )
    schema_: Literal[2] = Field(alias="schema")
    target: Target
    window: Window
    accounting: Accounting
    resolution: Resolution
    host: Host
    truncated: bool = Field(description="The list of threads was cut, by limit= or for its size.")
    warnings: tuple[str, ...]


RuntimeMetrics = FullMetrics | Measured | Unavailable
"""A union without a tag: only `Unavailable` has ``available``, and only `FullMetrics` has ``schema``."""

_adapter: TypeAdapter[RuntimeMetrics] = TypeAdapter(RuntimeMetrics)


def parse_runtime_metrics(body: bytes | str) -> RuntimeMetrics:
    """
    Read an answer of ``GET /metrics`` or the content of ``runtime-metrics.json``.

    Raises:
        pydantic.ValidationError: it is none of the variants.
    """
    return _adapter.validate_json(body)
