"""
What the routes other than ``/metrics`` answer, for the schema: the service itself writes these bodies by hand.

Loaded when somebody asks for the schema, and not before. A test reads real answers back through it.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vitalsd.contract.metrics import Platform, ProcessMetrics, Target, Unavailable
from vitalsd.http.responses import Reason
from vitalsd.recording.run_reader import State
from vitalsd.recording.series import EventKind

__all__ = ["Health", "Hello", "History", "Info", "Mark", "Problem", "Process", "Reported", "Run"]

Count = Annotated[int, Field(ge=0)]
UnixMs = Annotated[int, Field(description="Unix time, ms.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Body):
    """A refusal (RFC 9457)."""

    title: str = Field(description="What `reason` means, in words.")
    status: int = Field(description="The HTTP status, again.")
    reason: Reason = Field(description="One of a closed set, for programs.")
    detail: str = Field(description="What is wrong and what would be right.")
    parameter: str | None = Field(None, description="The query parameter, or the field of the body, that is wrong.")


class Process(_Body):
    """A process this user may sample."""

    pid: Count
    name: str
    started_at: datetime = Field(description="Wall-clock start, UTC.")
    cpu_time_secs: Annotated[float, Field(ge=0)] = Field(description="CPU time since the start, s.")
    rss_kb: Count = Field(description="Resident memory, KiB.")
    thread_count: Count


class Health(_Body):
    """The service answers."""

    status: Literal["ok"]


class BlackBox(_Body):
    """The record on disk."""

    run: str | None = Field(description="Its id in `/runs`.")
    error: str | None = Field(description="Why nothing is written to disk any more; null while it is.")
    dropped: Count = Field(description="Snapshots that did not get to disk.")


class Recorder(_Body):
    """The record. A replay has the fields without a default alone."""

    interval_ms: Count = Field(description="Between two snapshots, ms.")
    snapshots: Count = Field(description="Held now.")
    marks: Count = Field(description="Held now.")
    ended: str | None = Field(description="Why there will be no more snapshots; null while there will.")
    state: State = Field(description="running, or how the target ended.")
    retention_secs: Count | None = Field(None, description="Kept so long, s.")
    max_bytes: Count | None = Field(None, description="Memory it may use, bytes.")
    size_bytes: Count | None = Field(None, description="Memory it uses, bytes.")
    missed: Count | None = Field(None, description="Snapshots that could not be taken in time.")
    black_box: BlackBox | None = Field(None, description="null: kept in memory only.")


class HostFacts(_Body):
    """The machine that was recorded; null where it is not known."""

    system: str | None = Field(description="Name of the kernel.")
    release: str | None = Field(description="Release of the kernel.")
    version: str | None = Field(description="Version of macOS; on Linux the release of the kernel.")
    arch: str | None
    cpu_count: Count | None
    utc_offset_minutes: int | None = Field(description="Local time less UTC when it was recorded, minutes.")


class OwnCost(_Body):
    """What the sidecar itself uses."""

    pid: Count
    cpu_secs: Annotated[float, Field(ge=0)] = Field(description="CPU time since its start, s.")
    peak_rss_kb: Count = Field(description="Most resident memory it ever had, KiB.")
    snapshots: Count = Field(description="Taken of the target since the start.")


PROGRAM = "Keyed digest of the executed file and of what it was told to run; empty: not known."
APP = "Application id that the client passed; null: none."


class Watched(Target):
    """The target, and what it runs."""

    program: str = Field(description=PROGRAM)


class Info(_Body):
    """The service, its target and its own cost."""

    version: str
    python: str
    platform: Platform
    os_version: str | None = Field(description="Of the recorded machine.")
    arch: str | None
    cpu_count: Count | None
    utc_offset_minutes: int | None = Field(description="Local time less UTC of the recorded machine, minutes.")
    app: str | None = Field(description=APP)
    app_version: str | None
    target: Watched | Unavailable
    replay: "Replayed | None" = Field(description="The file that is replayed; null: a process is measured.")
    capabilities: list[str]
    recorder: Recorder | None = Field(description="null: nothing is recorded.")
    self: OwnCost


class Mark(_Body):
    """A label on the recorder's clock."""

    time: datetime
    time_ms: UnixMs
    label: str


class ThreadColumn(_Body):
    """One thread over time."""

    tid: Count
    name: str
    cpu_percent: list[float | None] = Field(description="One per row; null while it did not live.")


class PastMark(_Body):
    """A label on the time axis."""

    time_ms: UnixMs
    label: str


class Event(_Body):
    """Something the recorder noticed."""

    time_ms: UnixMs
    kind: EventKind = Field(
        description="stopped: by a signal, a debugger or a freezer. clock_set: the wall clock. inconsistent: the CPU"
        " counters contradicted each other, and the threads have no figure there."
    )
    detail: str


class History(_Body):
    """A table over time, one list per quantity, all equally long. A row covers the time since the row before."""

    schema_: Literal[1] = Field(alias="schema")
    platform: Platform
    target: Target
    interval_ms: Count = Field(description="Between two snapshots, ms.")
    time_ms: list[int] = Field(description="End of each row, Unix time, ms.")
    elapsed_ms: list[float] = Field(description="Measured length of each row, ms.")
    cpu_percent: list[float] = Field(description="Of the process; 100 = one core busy.")
    rss_kb: list[int] = Field(description="Resident memory at the end of the row, KiB.")
    vm_size_kb: list[int] = Field(description="Virtual memory at the end of the row, KiB.")
    thread_count: list[int]
    threads: list[ThreadColumn] = Field(description="The `top` busiest, busiest first.")
    marks: list[PastMark]
    events: list[Event]


class Run(_Body):
    """A run on disk."""

    id: str
    state: State = Field(description="crashed: it did not end well, and its last seconds are in it.")
    ended: str | None = Field(description="How it ended; null while it runs, or if nobody could say.")
    reported: bool = Field(description="Has gone into a bug report already.")
    app: str | None = Field(description=APP)
    app_version: str | None
    platform: Platform
    host: HostFacts
    pid: Count
    name: str
    program: str = Field(description=PROGRAM)
    started_at: datetime
    recorded_from: datetime | None
    recorded_to: datetime | None
    snapshots: Count
    size_bytes: Count


class ReportMember(_Body):
    """A file in a report."""

    name: str
    size: Count = Field(description="Bytes, unpacked.")


class ReportFailure(_Body):
    """A file that is not in a report."""

    member: str
    reason: str


class ReportMetrics(_Body):
    """The window that was measured when the report was requested."""

    sample_window_ms: Count
    process: ProcessMetrics
    threads: Count = Field(description="How many.")


class ReportCard(_Body):
    """What a replayed report says about itself; null where it says nothing."""

    app: str | None
    app_version: str | None
    description: str | None = Field(description="What the user said.")
    platform: str | None
    host: HostFacts
    triggered_at: str | None
    submitted_at: str | None
    vitalsd_version: str | None
    members: list[ReportMember]
    failures: list[ReportFailure]
    metrics: ReportMetrics | None = Field(description="null: it has none.")


class Replayed(_Body):
    """A file that is replayed."""

    file: str
    run: Run = Field(description="The run that `/history` shows: the crashed one if there is one.")
    report: ReportCard | None = Field(description="null: the file is not a report.")


Info.model_rebuild()


class Reported(_Body):
    """Whether the run counts as reported now: a run that has not crashed does not."""

    id: str
    reported: bool


class Hello(_Body):
    """The proof that this sidecar knows the token of its runtime file."""

    app: Literal["vitalsd"]
    proof: str = Field(description="HMAC-SHA256 with the token over nonce and port, hexadecimal.")
