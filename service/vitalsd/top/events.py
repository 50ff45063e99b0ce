"""What there is to tell of a target: the vocabulary between a feed and those who show it."""

from dataclasses import dataclass

from vitalsd.contract.metrics import Measured

__all__ = ["Ended", "News", "Note", "Past", "Sample", "Subject", "Trouble"]


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose numbers follow."""

    pid: int
    name: str
    start_id: str
    via: str
    """Where they come from, in words."""


@dataclass(frozen=True, slots=True)
class Past:
    """What was recorded before, oldest first: percent, KiB, and per thread id percent."""

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
class Trouble:
    """There are no numbers for now, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The target has exited."""

    reason: str


News = Subject | Past | Sample | Note | Trouble | Ended
