"""Hold the state of the live view, and change it by events and keys; `vitalsd.top.render` draws it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from vitalsd.contract.limits import LABEL_CHARACTERS
from vitalsd.contract.metrics import FullMetrics, FullThread, Measured, ThreadMetrics
from vitalsd.text import printable
from vitalsd.top.events import Ended, FeedEvent, HangNote, Hangs, InitialHistory, Interrupted, Note, Sample, TargetInfo

__all__ = ["SortKey", "View", "wait_percent"]

TREND = 240
"""Samples to keep for the sparklines; no terminal is much wider."""
RECENT_MS = 300_000
"""Age up to which the header names a hang that is over, ms."""
BACKLOG = 3600
"""Events to keep during a pause: an hour with one event each second."""

SortKey = Literal["cpu", "wait", "name", "tid"]


@dataclass(slots=True)
class View:
    """Hold everything that the view shows; `apply` handles an event of the feed, `press` a key."""

    target: TargetInfo | None = None
    metrics: Measured | FullMetrics | None = None
    cpu: deque[float] = field(default_factory=lambda: deque(maxlen=TREND))
    rss_kb: deque[float] = field(default_factory=lambda: deque(maxlen=TREND))
    trends: dict[int, deque[float]] = field(default_factory=dict)
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=100))
    hangs: dict[tuple[int, str], HangNote] = field(default_factory=dict)
    """The hangs that last, and those of the last `RECENT_MS`, by start and heartbeat."""
    now_ms: int = 0
    """Time of the last sample, Unix time in ms."""
    trouble: str | None = None
    ended: str | None = None

    sort: SortKey = "cpu"
    reverse: bool = False
    filter: str = ""
    first: int = 0
    """Index of the first row of the table to show."""
    helping: bool = False
    prompt: Literal["filter", "mark"] | None = None
    typed: str = ""
    message: str = ""
    backlog: deque[FeedEvent] | None = None
    """Events that arrived during the pause; ``None``: the view is not paused."""
    mark: Callable[[str], None] | None = None
    """Function called with the label of a new mark."""
    rows: int = 1
    """Number of visible rows of the table; set by the renderer."""

    # Events

    def apply(self, event: FeedEvent) -> None:
        """Apply an event, or keep it while the view is paused."""
        if self.backlog is not None:
            if len(self.backlog) == self.backlog.maxlen:
                self._take(self.backlog.popleft())
            self.backlog.append(event)
            return
        self._take(event)

    def _take(self, event: FeedEvent) -> None:
        match event:
            case TargetInfo():
                if self.target is not None and event.start_id != self.target.start_id:
                    self._reset()
                self.target, self.trouble, self.ended = event, None, None
                self._hangs(Hangs(()))  # another source of samples may know of none
            case InitialHistory():
                self._remember(event)
            case Sample():
                self.trouble = self.ended = None
                self.now_ms = event.wall_ms
                self._sample(event.metrics)
            case Hangs():
                self._hangs(event)
            case Note():
                if event not in self.notes:
                    self.notes.append(event)
            case Interrupted():
                self.trouble = event.reason
            case Ended():
                self.ended = event.reason

    def _reset(self) -> None:
        """Clear the data of the previous process."""
        self.cpu.clear()
        self.rss_kb.clear()
        self.trends.clear()
        self.hangs.clear()
        self.metrics = None

    def _hangs(self, event: Hangs) -> None:
        """Take the hangs of a recording; what lasted and is not among them is over."""
        known = {key: replace(hang, ongoing=False) for key, hang in self.hangs.items()}
        known |= {(hang.wall_ms, hang.heartbeat): hang for hang in event.hangs}
        self.hangs = {key: hang for key, hang in known.items() if hang.ongoing or self._is_recent(hang)}

    def _is_recent(self, hang: HangNote) -> bool:
        return hang.end_ms >= self.now_ms - RECENT_MS

    def hang_line(self) -> str:
        """Return which heartbeat is silent, or which hang there was recently; empty: none."""
        lasting = [hang for hang in self.hangs.values() if hang.ongoing]
        if lasting:
            return "; ".join(hang.text for hang in sorted(lasting, key=lambda hang: -hang.duration_ms))
        recent = [hang for hang in self.hangs.values() if self._is_recent(hang)]
        if not recent:
            return ""
        worst = max(recent, key=lambda hang: hang.duration_ms)
        count = (
            "1 hang in the last 5 min" if len(recent) == 1 else f"{len(recent)} hangs in the last 5 min, the longest"
        )
        return f"{count}: {worst.heartbeat} {worst.length}, {worst.reason}"

    def _sample(self, metrics: Measured | FullMetrics) -> None:
        self.metrics = metrics
        self.cpu.append(metrics.process.cpu_percent)
        self.rss_kb.append(metrics.process.rss_kb)
        before, self.trends = self.trends, {}
        for thread in metrics.threads:
            trend = before.get(thread.tid)
            if trend is None:
                trend = deque(maxlen=TREND)
            trend.append(thread.cpu_percent or 0.0)
            self.trends[thread.tid] = trend

    def _remember(self, past: InitialHistory) -> None:
        """Replace the samples of this view by the recorded ones, unless the recording is shorter."""
        if len(past.cpu_percent) < len(self.cpu):
            return
        self.cpu.clear()
        self.rss_kb.clear()
        self.cpu.extend(past.cpu_percent)
        self.rss_kb.extend(past.rss_kb)
        for tid, percents in past.threads.items():
            self.trends[tid] = deque(percents, maxlen=TREND)

    # Keys

    def press(self, key: str) -> bool:
        """Handle a key; return False if the key ends the view."""
        self.message = ""
        if self.helping:
            self.helping = False
        elif self.prompt is not None:
            self._type(key)
        else:
            return self._command(key)
        return True

    def _command(self, key: str) -> bool:
        match key:
            case "q":
                return False
            case "c" | "w" | "n" | "t":
                self.sort = {"c": "cpu", "w": "wait", "n": "name", "t": "tid"}[key]  # type: ignore[assignment]
                self.first = 0
            case "r":
                self.reverse = not self.reverse
            case "p" | " ":
                self._pause()
            case "/":
                self.prompt, self.typed = "filter", self.filter
            case "m":
                self.prompt, self.typed = "mark", ""
            case "escape":
                self.filter = ""
            case "?" | "h":
                self.helping = True
            case _:
                self._scroll(key)
        return True

    def _scroll(self, key: str) -> None:
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -self.rows, "pagedown": self.rows}
        if key in steps:
            self.first += steps[key]
        elif key in ("home", "g"):
            self.first = 0
        elif key in ("end", "G"):
            self.first = len(self.trends)

    def _type(self, key: str) -> None:
        if key == "escape":
            self.filter = "" if self.prompt == "filter" else self.filter
            self.prompt = None
        elif key == "enter":
            label, asked, self.prompt = self.typed.strip(), self.prompt, None
            if asked == "mark" and label and self.mark is not None:
                self.message = f"marking: {label}"
                self.mark(label)
        elif key == "backspace":
            self.typed = self.typed[:-1]
        elif key == "clear":
            self.typed = ""
        elif len(key) == 1 and key.isprintable() and len(self.typed) < LABEL_CHARACTERS:
            self.typed += key
        if self.prompt == "filter":
            self.filter, self.first = self.typed, 0

    def _pause(self) -> None:
        if self.backlog is None:
            self.backlog = deque(maxlen=BACKLOG)
            return
        missed, self.backlog = self.backlog, None
        for event in missed:
            self._take(event)

    # The table

    def chosen(self) -> list[ThreadMetrics | FullThread]:
        """Return the threads that match the filter, in the selected order."""
        if self.metrics is None:
            return []
        wanted = self.filter.casefold()
        threads: list[ThreadMetrics | FullThread] = [
            thread
            for thread in self.metrics.threads
            if not wanted or wanted in printable(thread.name).casefold() or wanted in str(thread.tid)
        ]
        if self.sort == "cpu":
            threads.sort(key=lambda thread: (-_known(thread.cpu_percent), thread.tid))
        elif self.sort == "wait":
            threads.sort(key=lambda thread: (-_known(wait_percent(thread)), -_known(thread.cpu_percent), thread.tid))
        elif self.sort == "name":
            threads.sort(key=lambda thread: (thread.name.casefold(), thread.tid))
        if self.reverse:
            threads.reverse()
        return threads


def wait_percent(thread: ThreadMetrics | FullThread) -> float | None:
    """Return how long a thread waited for a CPU, percent; ``None``: it is unknown, or the answer is a basic one."""
    return thread.wait_percent if isinstance(thread, FullThread) else None


def _known(percent: float | None) -> float:
    """Return a percentage to sort by: an unknown one is below 0."""
    return -1.0 if percent is None else percent
