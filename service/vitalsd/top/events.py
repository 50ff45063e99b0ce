"""Define the events that a feed yields about one target."""

from dataclasses import dataclass

from vitalsd.contract.metrics import FullMetrics, Measured

__all__ = ["Ended", "FeedEvent", "HangNote", "Hangs", "InitialHistory", "Interrupted", "Note", "Sample", "TargetInfo"]


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """Announce the process of the following events."""

    pid: int
    name: str
    start_id: str
    via: str
    """Text for the backend in the view."""


@dataclass(frozen=True, slots=True)
class InitialHistory:
    """Hold the recorded past, oldest first: percent of one core, KiB, and percent by thread id."""

    cpu_percent: tuple[float, ...]
    rss_kb: tuple[float, ...]
    threads: dict[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold one window; `body` is the answer of ``/metrics`` from which `metrics` was parsed."""

    wall_ms: int
    metrics: Measured | FullMetrics
    body: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """Hold a mark or an event of the recording; `kind` is ``mark`` or the kind of the event."""

    wall_ms: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class HangNote:
    """Hold a hang of the recording as far as it is known: one that is ongoing becomes longer."""

    wall_ms: int
    """Its start, Unix time in ms."""
    heartbeat: str
    duration_ms: int
    cause: str
    detail: str
    ongoing: bool

    @property
    def end_ms(self) -> int:
        """Its end, or the last time at which it was seen, Unix time in ms."""
        return self.wall_ms + self.duration_ms

    @property
    def length(self) -> str:
        """The duration in words."""
        return f"{self.duration_ms / 1000:.1f} s"

    @property
    def reason(self) -> str:
        """The cause in words."""
        return self.cause.replace("_", " ")

    @property
    def text(self) -> str:
        """Heartbeat, length, cause and detail in words."""
        return f"{self.heartbeat} silent for {self.length}: {', '.join(filter(None, [self.reason, self.detail]))}"


@dataclass(frozen=True, slots=True)
class Hangs:
    """Hold the latest hangs, and all that are ongoing now."""

    hangs: tuple[HangNote, ...]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Report that there are no numbers at present."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Report that the target has exited."""

    reason: str


FeedEvent = TargetInfo | InitialHistory | Sample | Note | Hangs | Interrupted | Ended
