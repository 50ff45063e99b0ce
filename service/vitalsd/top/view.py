"""
The live view as a picture: what is known, which keys do what, and the lines for a given size. Opens nothing.

Names of threads come from whoever wrote the program; they reach the lines through `printable` alone.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from rich.text import Text

from vitalsd.model import Measured, ThreadMetrics
from vitalsd.record import MAX_LABEL_LENGTH
from vitalsd.top.feed import Ended, News, Note, Past, Sample, Subject, Trouble
from vitalsd.wire import printable

__all__ = ["ASCII", "BLOCKS", "Glyphs", "View"]

TREND = 240
"""Samples kept for the sparklines; no terminal is much wider."""
BACKLOG = 3600
IDLE_PERCENT = 0.05
"""Below it a figure would read 0.0."""

SortKey = Literal["cpu", "name", "tid"]

HELP = """\
 c n t    sort by CPU, name, thread id
 r        reverse the order
 /        filter by name or id; Enter keeps it, Esc clears it
 p Space  pause, and go on with all that came meanwhile
 m        put a mark on the clock of the record
 arrows   scroll; also j k, PgUp PgDn, Home End
 ? h      this help
 q        quit

 100 % is one core. A bar is full at 100 %."""


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What bars and sparklines are made of: from nothing to full."""

    bar: str
    spark: str
    dots: str


BLOCKS = Glyphs(" ▏▎▍▌▋▊▉█", " ▁▂▃▄▅▆▇█", "…")
ASCII = Glyphs(" #", " .:-=+*#", "~")
"""For terminals that do not speak UTF-8."""


@dataclass(slots=True)
class View:
    """All that is shown. `tell` it what happened, `press` a key, ask for `lines`."""

    glyphs: Glyphs = BLOCKS
    subject: Subject | None = None
    metrics: Measured | None = None
    cpu: deque[float] = field(default_factory=lambda: deque(maxlen=TREND))
    rss_kb: deque[float] = field(default_factory=lambda: deque(maxlen=TREND))
    trends: dict[int, deque[float]] = field(default_factory=dict)
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=100))
    trouble: str | None = None
    ended: str | None = None

    sort: SortKey = "cpu"
    reverse: bool = False
    filter: str = ""
    first: int = 0
    """Row of the table that is shown first."""
    helping: bool = False
    prompt: Literal["filter", "mark"] | None = None
    typed: str = ""
    message: str = ""
    backlog: deque[News] | None = None
    """What came while paused; ``None`` when not."""
    mark: Callable[[str], None] | None = None
    """Called with the label of a new mark."""
    _rows: int = 1

    # What happened

    def tell(self, news: News) -> None:
        """Take it in, or keep it for later while paused."""
        if self.backlog is not None:
            if len(self.backlog) == self.backlog.maxlen:
                self._take(self.backlog.popleft())
            self.backlog.append(news)
            return
        self._take(news)

    def _take(self, news: News) -> None:
        match news:
            case Subject():
                if self.subject is not None and news.start_id != self.subject.start_id:
                    self._forget()
                self.subject, self.trouble, self.ended = news, None, None
            case Past():
                self._remember(news)
            case Sample():
                self.trouble = self.ended = None
                self._sample(news.metrics)
            case Note():
                if news not in self.notes:
                    self.notes.append(news)
            case Trouble():
                self.trouble = news.reason
            case Ended():
                self.ended = news.reason

    def _forget(self) -> None:
        """The target is another process now."""
        self.cpu.clear()
        self.rss_kb.clear()
        self.trends.clear()
        self.metrics = None

    def _sample(self, metrics: Measured) -> None:
        self.metrics = metrics
        self.cpu.append(metrics.process.cpu_percent)
        self.rss_kb.append(metrics.process.rss_kb)
        before, self.trends = self.trends, {}
        for thread in metrics.threads:
            trend = before.get(thread.tid)
            if trend is None:
                trend = deque(maxlen=TREND)
            trend.append(thread.cpu_percent)
            self.trends[thread.tid] = trend

    def _remember(self, past: Past) -> None:
        """A record knows more than was seen from here and takes the place of that, unless it has just begun."""
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
        """Obey a key; False if it means the end."""
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
            case "c" | "n" | "t":
                self.sort = {"c": "cpu", "n": "name", "t": "tid"}[key]  # type: ignore[assignment]
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
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -self._rows, "pagedown": self._rows}
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
        elif len(key) == 1 and key.isprintable() and len(self.typed) < MAX_LABEL_LENGTH:
            self.typed += key
        if self.prompt == "filter":
            self.filter, self.first = self.typed, 0

    def _pause(self) -> None:
        if self.backlog is None:
            self.backlog = deque(maxlen=BACKLOG)
            return
        missed, self.backlog = self.backlog, None
        for news in missed:
            self._take(news)

    # The picture

    def lines(self, width: int, height: int) -> list[Text]:
        """Exactly `height` lines of at most `width` cells."""
        foot = [self._foot(width)] if height >= 3 else []
        if self.helping:
            body = [Text(line) for line in HELP.splitlines()]
            body = [self._title(width), *body][: height - len(foot)]
        else:
            body = self._body(width, height - len(foot))
        body += [Text()] * (height - len(foot) - len(body))
        lines = [*body, *foot]
        for line in lines:
            line.no_wrap = True
            line.truncate(width)
        return lines

    def _body(self, width: int, height: int) -> list[Text]:
        head = [self._title(width)]
        if (banner := self.ended or self.trouble) is not None:
            head.append(Text(f" {printable(banner)} ", style="bold reverse" if self.ended else "reverse"))
        if self.metrics is None:
            if banner is None:
                head.append(Text(" measuring ...", style="dim"))
            return head[:height]
        if height >= 6:
            head += self._process(width)
        notes = [self._note(note) for note in list(self.notes)[-min(3, max(0, height - 12)) :]] if height > 12 else []
        room = max(0, height - len(head) - len(notes) - 1)
        return [*head, *self._table(width, room), *notes][:height]

    def _title(self, width: int) -> Text:
        subject, metrics = self.subject, self.metrics
        state = "PAUSED" if self.backlog is not None else "ENDED" if self.ended else "LOST" if self.trouble else ""
        title = Text(" ")
        if subject is not None:
            title.append(printable(subject.name) or "(no name)", style="bold")
            title.append(f" {subject.pid}")
            if metrics is not None:
                title.append(f"  up {_duration(metrics.process.uptime_secs)}  {len(metrics.threads)} threads")
            title.append(f"  {printable(subject.via)}", style="dim")
        if state:
            title.truncate(max(0, width - len(state) - 3), overflow="ellipsis", pad=True)
            title.append(f" {state} ", style="reverse")
        return title

    def _process(self, width: int) -> list[Text]:
        assert self.metrics is not None
        process = self.metrics.process
        cpu = Text.assemble(" CPU ", (f"{process.cpu_percent:7.1f} %", "bold"))
        rss = Text.assemble(" RSS ", (f"{_size(process.rss_kb):>9}", "bold"))
        most_kb, least_kb = max(self.rss_kb), min(self.rss_kb)
        for line, values, low, high in (
            (cpu, self.cpu, 0.0, max(100.0, *self.cpu)),
            # From the least, or no leak would ever be seen; a hundredth is noise.
            (rss, self.rss_kb, min(least_kb, most_kb * 0.99) - 1, most_kb),
        ):
            tail = f"peak {max(values):.1f} %" if line is cpu else f"VM {_size(process.vm_size_kb)}"
            room = width - cell_len(line.plain) - len(tail) - 5
            if room >= 4:
                line.append("  ")
                line.append(self._spark(values, room, low, high).ljust(room), style="cyan")
            line.append(f"  {tail}", style="dim")
        return [cpu, rss]

    def _table(self, width: int, room: int) -> list[Text]:
        threads = self._chosen()
        self._rows = max(1, room)
        self.first = max(0, min(self.first, len(threads) - room))
        shown = threads[self.first : self.first + room]
        digits = max([3, *(len(str(thread.tid)) for thread in shown)])
        with_tid = width >= 26
        names = min(max([6, *(cell_len(printable(thread.name)) for thread in shown)]), 32, max(6, width // 3))
        rest = width - (digits + 2 if with_tid else 1) - names - 9
        bar = 0 if rest < 5 else min(25, rest if rest < 20 else rest // 2)
        trend = rest - bar - 2 if rest - bar >= 8 else 0
        below = len(threads) - self.first - len(shown)
        head = Text(" ", style="bold reverse")
        if with_tid:
            head.append(f"{self._headed('TID', 'tid'):>{digits}} ")
        head.append(f"{self._headed('THREAD', 'name'):<{names}} {self._headed('CPU%', 'cpu'):>7}")
        more = f"{len(threads)} of {len(self.trends)}" if self.filter else f"{below} more below" if below > 0 else ""
        space = max(0, width - cell_len(head.plain))
        head.append(f"{more + ' ' if len(more) < space else '':>{space}}")
        rows = []
        for thread in shown:
            line = Text(" ")
            if with_tid:
                line.append(f"{thread.tid:>{digits}} ", style="dim")
            name = Text(printable(thread.name) or "(no name)")
            name.truncate(names, overflow="ellipsis", pad=True)
            percent = thread.cpu_percent
            figure = "idle" if percent == 0 else "<0.1" if percent < IDLE_PERCENT else f"{percent:.1f}"
            line.append_text(name)
            line.append(f" {figure:>7}")
            if percent < IDLE_PERCENT:
                line.stylize("dim")
            if bar:
                line.append(" ")
                line.append(self._bar(percent, bar), style=_heat(percent))
            if trend:
                line.append("  ")
                line.append(self._spark(self.trends[thread.tid], trend, 0, 100), style="cyan")
            rows.append(line)
        return [head, *rows]

    def _chosen(self) -> list[ThreadMetrics]:
        assert self.metrics is not None
        wanted = self.filter.casefold()
        threads = [
            thread
            for thread in self.metrics.threads
            if not wanted or wanted in printable(thread.name).casefold() or wanted in str(thread.tid)
        ]
        if self.sort == "cpu":
            threads.sort(key=lambda thread: (-thread.cpu_percent, thread.tid))
        elif self.sort == "name":
            threads.sort(key=lambda thread: (thread.name.casefold(), thread.tid))
        if self.reverse:
            threads.reverse()
        return threads

    def _headed(self, title: str, key: SortKey) -> str:
        if self.sort != key:
            return title
        return title + ("v" if (key == "cpu") != self.reverse else "^")

    def _bar(self, percent: float, width: int) -> str:
        steps = len(self.glyphs.bar) - 1
        filled = min(width * steps, round(percent / 100 * width * steps))
        if percent >= IDLE_PERCENT:
            filled = max(1, filled)
        whole, part = divmod(filled, steps)
        return (self.glyphs.bar[-1] * whole + (self.glyphs.bar[part] if part else "")).ljust(width)

    def _spark(self, values: Sequence[float] | deque[float], width: int, low: float, high: float) -> str:
        steps = self.glyphs.spark
        span = max(high - low, 1e-9)
        shown = list(values)[-width:]
        levels = [
            0 if value <= low else min(len(steps) - 1, 1 + int((value - low) / span * (len(steps) - 1)))
            for value in shown
        ]
        return "".join(steps[level] for level in levels).rjust(width)

    def _note(self, note: Note) -> Text:
        line = Text(f" {time.strftime('%H:%M:%S', time.localtime(note.wall_ms / 1000))} ", style="dim")
        line.append(f"{note.kind}: ", style="bold" if note.kind == "mark" else "yellow")
        return line.append(printable(note.text), style="default")

    def _foot(self, width: int) -> Text:
        if self.prompt is not None:
            ask = "filter: " if self.prompt == "filter" else "mark: "
            # The end of what is typed stays in sight.
            typed = self.typed
            while typed and cell_len(ask) + cell_len(typed) + 2 > width:
                typed = typed[1:]
            return Text.assemble((f" {ask}", "bold"), typed, ("_", "blink"))
        if self.message:
            return Text(f" {printable(self.message)}", style="bold")
        if self.helping:
            return Text(" any key goes back", style="dim")
        keys = " q quit  ? help  c n t sort  / filter  p pause  m mark"
        if self.filter:
            keys = f" filter: {self.filter}  (Esc clears)"
        return Text(keys, style="dim")


def _heat(percent: float) -> str:
    return "green" if percent < 50 else "yellow" if percent < 90 else "red"


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _size(kb: float) -> str:
    for unit in ("KiB", "MiB", "GiB"):
        if kb < 10_000:
            return f"{kb:.0f} {unit}" if unit == "KiB" else f"{kb:.1f} {unit}"
        kb /= 1024
    return f"{kb:.1f} TiB"
