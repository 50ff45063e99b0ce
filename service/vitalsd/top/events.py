"""Define the events that a feed yields about one target."""

from dataclasses import dataclass

from vitalsd.contract.metrics import FullMetrics, Measured

__all__ = ["Ended", "FeedEvent", "InitialHistory", "Interrupted", "Note", "Sample", "TargetInfo"]


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
class Interrupted:
    """Report that there are no numbers at present."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Report that the target has exited."""

    reason: str


FeedEvent = TargetInfo | InitialHistory | Sample | Note | Interrupted | Ended
