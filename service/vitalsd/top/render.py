"""
Draw the live view as lines of text for a terminal of a given size, without I/O.

Names come from the measured program and are untrusted; they reach a line through `Renderer._name` only.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from vitalsd.contract.metrics import FullMetrics, Machine
from vitalsd.text import printable
from vitalsd.top.events import Note
from vitalsd.top.view_state import SortKey, View, wait_percent

__all__ = ["ASCII", "BLOCKS", "Glyphs", "Renderer"]

IDLE_PERCENT = 0.05
"""Percent of one core; a smaller number would be shown as 0.0."""

HELP = """\
 c n t w  sort by CPU, name, thread id, wait
 r        reverse the order
 /        filter by name or id; Enter keeps it, Esc clears it
 p Space  pause; resume with everything received meanwhile
 m        set a mark in the recording
 arrows   scroll; also j k, PgUp PgDn, Home End
 ? h      this help
 q        quit

 100 % is one core. A bar is full at 100 %. WAIT% and wait: ready to run, and
 no CPU was free. other: what the machine does for other processes. A dash: not
 known here."""


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Hold the characters of bars and sparklines, from empty to full, of a truncated name, and of no number."""

    bar: str
    spark: str
    dots: str
    dash: str


BLOCKS = Glyphs(" ▏▎▍▌▋▊▉█", " ▁▂▃▄▅▆▇█", "…", "\u2013")
ASCII = Glyphs(" #", " .:-=+*#", "~", "-")
"""Characters for terminals without UTF-8."""


class Renderer:
    """
    Draw a view as lines of text.

    Args:
        view: the state to show; `View.rows` and `View.first` are adjusted.
        width: width of the terminal, cells.
        glyphs: characters of bars and sparklines.
    """

    def __init__(self, view: View, width: int, glyphs: Glyphs = BLOCKS) -> None:
        self._view = view
        self._width = width
        self._glyphs = glyphs

    def lines(self, height: int) -> list[Text]:
        """Return exactly `height` lines of at most `width` cells."""
        foot = [self._foot()] if height >= 3 else []
        room = height - len(foot)
        body = self._help(room) if self._view.helping else self._body(room)
        lines = [*body, *[Text()] * (room - len(body)), *foot]
        for line in lines:
            line.no_wrap = True
            line.truncate(self._width)
        return lines

    def _help(self, height: int) -> list[Text]:
        return [self._title(), *map(Text, HELP.splitlines())][:height]

    def _body(self, height: int) -> list[Text]:
        view = self._view
        head = [self._title()]
        if (banner := view.ended or view.trouble) is not None:
            head.append(Text(f" {self._name(banner)} ", style="bold reverse" if view.ended else "reverse"))
        if height >= 6 and (hang := view.hang_line()):
            lasts = any(each.ongoing for each in view.hangs.values())
            head.append(Text(f" {self._name(hang)}", style="bold red" if lasts else "yellow"))
        if view.metrics is None:
            return [*head, Text("" if banner else " measuring ...", style="dim")][:height]
        if height >= 6:
            head += self._process()
        if height >= 15 and isinstance(view.metrics, FullMetrics):
            head += [self._reasons(view.metrics), self._machine(view.metrics.machine)]
        notes = list(view.notes)[-3:] if height >= 15 else list(view.notes)[-1:] if height >= 13 else []
        room = max(0, height - len(head) - len(notes) - 1)
        return [*head, *self._table(room), *map(self._note, notes)][:height]

    def _title(self) -> Text:
        view = self._view
        state = "PAUSED" if view.backlog is not None else "ENDED" if view.ended else "LOST" if view.trouble else ""
        title = Text(" ")
        if view.target is not None:
            title.append(self._name(view.target.name), style="bold")
            title.append(f" {view.target.pid}")
            if view.metrics is not None:
                title.append(f"  up {_duration(view.metrics.process.uptime_secs)}  {len(view.metrics.threads)} threads")
            title.append(f"  {self._name(view.target.via)}", style="dim")
        if state:
            title.truncate(max(0, self._width - len(state) - 3), pad=True)
            title.append(f" {state} ", style="reverse")
        return title

    def _process(self) -> list[Text]:
        view = self._view
        assert view.metrics is not None
        process = view.metrics.process
        most_kb, least_kb = max(view.rss_kb), min(view.rss_kb)
        peak = max(view.cpu)
        lines = []
        for title, figure, values, low, high, tail in (
            ("CPU", f"{process.cpu_percent:7.1f} %", view.cpu, 0.0, max(100.0, peak), f"peak {peak:.1f} %"),
            # The scale begins at the minimum, otherwise a leak would not be visible; 1 % of it is noise.
            (
                "RSS",
                f"{_size(process.rss_kb):>9}",
                view.rss_kb,
                min(least_kb, most_kb * 0.99) - 1,
                most_kb,
                f"VM {_size(process.vm_size_kb)}",
            ),
        ):
            line = Text.assemble(f" {title} ", (figure, "bold"))
            room = self._width - cell_len(line.plain) - len(tail) - 5
            if room >= 4:
                line.append("  ")
                line.append(self._spark(values, room, low, high), style="cyan")
            lines.append(line.append(f"  {tail}", style="dim"))
        return lines

    def _reasons(self, metrics: FullMetrics) -> Text:
        """Return the line with what explains the CPU time and the memory of the process."""
        process, mac = metrics.process, metrics.platform == "macos"
        memory_kb = process.footprint_kb if mac else process.anonymous_kb
        parts = [
            f"wait {self._percent(process.wait_percent)}",
            f"children {self._percent(process.children_percent)}",
            f"{'footprint' if mac else 'anonymous'} {self._kb(memory_kb)}",
            f"swap {self._kb(process.swap_kb)}",
            f"fds {self._glyphs.dash if process.open_fds is None else process.open_fds}",
        ]
        return Text(f" {', '.join(parts)}")

    def _machine(self, machine: Machine | None) -> Text:
        """Return the line about the machine; what slows a process down is named only if there is any."""
        if machine is None:
            return Text(f" machine {self._glyphs.dash}", style="dim")
        line = Text(f" {'container' if machine.scope == 'container' else 'machine'} ")
        line.append(f"{self._percent(machine.cpu_percent, 0)} busy, other {self._percent(machine.other_percent, 0)}")
        line.append(f", memory available {self._kb(machine.memory_available_kb)}")
        if machine.quota_throttled_percent:
            line.append(f", throttled {self._percent(machine.quota_throttled_percent, 0)}", style="yellow")
        if machine.memory_pressure not in (None, "normal"):
            line.append(f", memory pressure {machine.memory_pressure}", style="yellow")
        if machine.thermal_state not in (None, "nominal"):
            line.append(f", thermal {machine.thermal_state}", style="yellow")
        load = self._glyphs.dash if machine.load_1m is None else f"{machine.load_1m:.1f}"
        return line.append(f", swap {self._kb(machine.swap_used_kb)}, load {load}")

    def _percent(self, percent: float | None, decimals: int = 1) -> str:
        return self._glyphs.dash if percent is None else f"{percent:.{decimals}f} %"

    def _kb(self, kb: int | None) -> str:
        return self._glyphs.dash if kb is None else _size(kb)

    def _table(self, room: int) -> list[Text]:
        view, width = self._view, self._width
        threads = view.chosen()
        view.rows = max(1, room)
        view.first = max(0, min(view.first, len(threads) - room))
        shown = threads[view.first : view.first + room]
        named = [self._name(thread.name) for thread in shown]
        digits = max([3, *(len(str(thread.tid)) for thread in shown)]) if width >= 26 else 0
        names = min(max([6, *map(cell_len, named)]), 32, max(6, width // 3))
        rest = width - (digits + 2 if digits else 1) - names - 9
        waits = isinstance(view.metrics, FullMetrics) and rest >= 12
        rest -= 7 if waits else 0
        bar = 0 if rest < 5 else min(25, rest if rest < 20 else rest // 2)
        trend = rest - bar - 2 if rest - bar >= 8 else 0

        head = Text(" ", style="bold reverse")
        if digits:
            head.append(f"{self._headed('TID', 'tid'):>{digits}} ")
        head.append(f"{self._headed('THREAD', 'name'):<{names}} {self._headed('CPU%', 'cpu'):>7}")
        if waits:
            head.append(f"{'':{bar + 2}}{self._headed('WAIT%', 'wait'):>6}")
        below = len(threads) - view.first - len(shown)
        more = f"{len(threads)} of {len(view.trends)}" if view.filter else f"{below} more below" if below > 0 else ""
        space = max(0, width - cell_len(head.plain))
        head.append(f"{more + ' ' if len(more) < space else '':>{space}}")

        rows = [head]
        for thread, name in zip(shown, named, strict=True):
            percent = thread.cpu_percent
            line = Text(" ")
            if digits:
                line.append(f"{thread.tid:>{digits}} ", style="dim")
            line.append(self._cut(name, names))
            line.append(f" {self._figure(percent):>7}")
            if percent is None or percent < IDLE_PERCENT:
                line.stylize("dim")
            if bar:
                line.append(" ")
                line.append(self._bar(percent or 0.0, bar), style=_heat(percent or 0.0))
            if waits:
                line.append(f" {self._wait(wait_percent(thread)):>6}")
            if trend:
                line.append("  ")
                line.append(self._spark(view.trends[thread.tid], trend, 0, 100), style="cyan")
            rows.append(line)
        return rows

    def _headed(self, title: str, key: SortKey) -> str:
        if self._view.sort != key:
            return title
        return title + ("v" if (key in ("cpu", "wait")) != self._view.reverse else "^")

    def _note(self, note: Note) -> Text:
        line = Text(f" {time.strftime('%H:%M:%S', time.localtime(note.wall_ms / 1000))} ", style="dim")
        line.append(f"{self._name(note.kind)}: ", style="bold" if note.kind == "mark" else "yellow")
        return line.append(self._name(note.text), style="default")

    def _foot(self) -> Text:
        view = self._view
        if view.prompt is not None:
            # Keep the end of the typed text visible.
            typed = self._name(view.typed) if view.typed else ""
            while typed and len(view.prompt) + cell_len(typed) + 4 > self._width:
                typed = typed[1:]
            return Text.assemble((f" {view.prompt}: ", "bold"), typed, ("_", "blink"))
        if view.message:
            return Text(f" {self._name(view.message)}", style="bold")
        if view.helping:
            return Text(" press any key to return", style="dim")
        if view.filter:
            return Text(f" filter: {self._name(view.filter)}  (Esc clears)", style="dim")
        return Text(" q quit  ? help  c n t w sort  / filter  p pause  m mark", style="dim")

    def _name(self, text: str) -> str:
        """Return text of another program without characters that this terminal cannot show."""
        shown = printable(text) or "(no name)"
        return shown if self._glyphs is BLOCKS else shown.encode("ascii", "backslashreplace").decode()

    def _cut(self, text: str, width: int) -> str:
        """Return text truncated or padded to exactly `width` cells."""
        return (
            set_cell_size(text, width)
            if cell_len(text) <= width
            else set_cell_size(text, width - 1) + self._glyphs.dots
        )

    def _figure(self, percent: float | None) -> str:
        """Return a percentage of CPU as text; a thread that has run a little is not shown as 0.0."""
        if percent is None:
            return self._glyphs.dash
        return "idle" if percent == 0 else "<0.1" if percent < IDLE_PERCENT else f"{percent:.1f}"

    def _wait(self, percent: float | None) -> str:
        if percent is None:
            return self._glyphs.dash
        return "<0.1" if 0 < percent < IDLE_PERCENT else f"{percent:.1f}"

    def _bar(self, percent: float, width: int) -> str:
        steps = len(self._glyphs.bar) - 1
        filled = min(width * steps, round(percent / 100 * width * steps))
        if percent >= IDLE_PERCENT:
            filled = max(1, filled)
        whole, part = divmod(filled, steps)
        return (self._glyphs.bar[-1] * whole + (self._glyphs.bar[part] if part else "")).ljust(width)

    def _spark(self, values: Sequence[float] | deque[float], width: int, low: float, high: float) -> str:
        steps = self._glyphs.spark
        top, span = len(steps) - 1, max(high - low, 1e-9)
        levels = [
            0 if value <= low else min(top, 1 + int((value - low) / span * top)) for value in list(values)[-width:]
        ]
        return "".join(steps[level] for level in levels).rjust(width)


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
