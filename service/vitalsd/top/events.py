"""The events of a feed: what it yields about one target, and what the views show."""

from dataclasses import dataclass

from vitalsd.contract.metrics import Measured

__all__ = ["Ended", "FeedEvent", "InitialHistory", "Interrupted", "Note", "Sample", "TargetInfo"]


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """The process that the next events are about."""

    pid: int
    name: str
    start_id: str
    via: str
    """The backend, in words."""


@dataclass(frozen=True, slots=True)
class InitialHistory:
    """The recorded past, oldest first: percent, KiB, and percent by thread id."""

    cpu_percent: tuple[float, ...]
    rss_kb: tuple[float, ...]
    threads: dict[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One window; `body` is the answer of ``/metrics`` that `metrics` was read from."""

    wall_ms: int
    metrics: Measured
    body: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A mark or an event of the record; `kind` is ``mark`` or that of the event."""

    wall_ms: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """There are no numbers for now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The target has exited."""

    reason: str


FeedEvent = TargetInfo | InitialHistory | Sample | Note | Interrupted | Ended
