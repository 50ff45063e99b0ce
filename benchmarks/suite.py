"""
Run all benchmarks, and write docs/performance.md, docs/performance.json and the plots in docs/images/.

    python benchmarks/suite.py [--quick | --only PROGRAM | --write-only | --check]

Each benchmark is one interleaved run of its own. `--quick` takes few rounds, to see that every program works. `--only`
measures one program anew and keeps the other recorded figures.
`--write-only` measures nothing: it writes the page from the figures in docs/performance.json, after a change of labels
or text. `--check` writes nothing: it exits with status 1 if the page is not what `--write-only` would write.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from plot import bars

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

Row = Mapping[str, Any]
Results = Mapping[str, Sequence[Row]]


class Figure(NamedTuple):
    """Describe a figure of a table: its label with unit, its dotted name in the JSON, and the name of its spread."""

    label: str
    name: str
    spread: str = ""


class Table(NamedTuple):
    """
    Describe a table of the runs that have all of its figures.

    Args:
        run: format string for the label of a run; its fields are settings of the run.
        figures: the figures to show.
        run_per_line: write one line per run and one column per figure, instead of the reverse.
    """

    run: str
    figures: Sequence[Figure]
    run_per_line: bool = False


class Goal(NamedTuple):
    """Set a limit for a figure of the runs with these settings; `direction` is `<=` or `>=`."""

    label: str
    run: Row
    name: str
    direction: str
    limit: float


class Section(NamedTuple):
    """Describe a section of the page: its program, and the text that explains the figures."""

    program: str
    quick: Sequence[str]
    compared: str
    tables: Sequence[Table]
    goals: Sequence[Goal]
    meaning: str


SAMPLING = "Sampling another process (Linux)"
RECORDER = "The recorder"
MEMORY = "The record in memory"
ANSWERING = "Answering"
ACCURACY = "Accuracy"
MACOS = "A snapshot of its own threads on macOS (over the simulator)"
LOCK = "The interpreter lock on macOS (over the simulator)"
HOST = "Inside a program"
GUI = "In a program with a user interface"
STARTUP = "Start and size"

THOUSAND = {"threads": 1000, "busy": 4}
WORST = {"threads": 1000, "busy": 999}
FEW = {"threads": 100}
EACH_SECOND = {"threads": 50, "interval_s": 1.0}
MANY_EACH_SECOND = {"threads": 1000, "interval_s": 1.0}
FAST = {"threads": 50, "interval_s": 0.25}
ALL_RUN = {"snapshots": 900, "running_percent": 100}
BUSY = "beside_a_busy_thread"
WINDOWS_MS = (50, 250, 1000)


def _snapshot_costs(heat: str) -> Table:
    """Return the table of `sampling.py` for one state of the CPU's caches, `warm` or `cold`."""
    names = {
        "C program that reads every thread (the lower bound)": "floor",
        "vitalsd, every thread read": "full",
        "vitalsd, every thread, with the work of once a second (names, count)": "full_with_names",
        "vitalsd's recorder, which reads the threads that ran": "product",
        "psutil, with names": "psutil",
        "simple reader in Rust, with names": "rust",
    }
    ratios = {
        "vitalsd, every thread ÷ C program": "full_to_floor",
        "vitalsd, with the work of once a second ÷ C program": "full_with_names_to_floor",
        "recorder ÷ C program": "product_to_floor",
        "recorder ÷ vitalsd, every thread": "product_to_full",
        "psutil ÷ vitalsd, every thread": "psutil_to_full",
        "Rust ÷ vitalsd, every thread": "rust_to_full",
    }
    return Table(
        f"{heat}, {{threads}} threads, {{busy}} busy",
        (
            *(Figure(f"{label}, µs", f"{heat}.{name}_us", f"{heat}.{name}_spread_us") for label, name in names.items()),
            *(Figure(label, f"{heat}.{name}") for label, name in ratios.items()),
        ),
    )


SECTIONS: Mapping[str, Section] = {
    SAMPLING: Section(
        "sampling.py",
        ("--rounds", "5"),
        "CPU time of one snapshot of a process: CPU time and name of each thread. All programs read the same process "
        "in turn, pinned to one CPU. *Warm* snapshots follow each other directly. *Cold* snapshots follow 100 ms of "
        "rest, as in a recorder: the data is no longer in the CPU's caches. With 999 busy threads, each thread runs "
        "between any two snapshots, which is the worst case.",
        (_snapshot_costs("warm"), _snapshot_costs("cold")),
        (
            Goal("every thread of 1000, warm ÷ C program", THOUSAND, "warm.full_to_floor", "<=", 1.75),
            Goal("every thread of 1000, cold ÷ C program", THOUSAND, "cold.full_to_floor", "<=", 1.4),
            Goal("psutil ÷ vitalsd, warm", THOUSAND, "warm.psutil_to_full", ">=", 15),
            Goal("psutil ÷ vitalsd, cold", THOUSAND, "cold.psutil_to_full", ">=", 8),
            Goal("Rust ÷ vitalsd, warm", THOUSAND, "warm.rust_to_full", ">=", 8),
            Goal("Rust ÷ vitalsd, cold", THOUSAND, "cold.rust_to_full", ">=", 4),
            Goal("recorder ÷ C program, warm", THOUSAND, "warm.product_to_floor", "<=", 0.5),
            Goal("recorder ÷ every thread, cold, 999 busy", WORST, "cold.product_to_full", "<=", 1.1),
        ),
        "A snapshot is cheap enough for a process of thousands of threads. The recorder is cheaper than the C program "
        "because the CPU clock of the process proves, to the nanosecond, that no unread thread ran. Where every "
        "thread runs, nothing can be proved, and the recorder costs as much as reading every thread.",
    ),
    RECORDER: Section(
        "recorder.py",
        ("--seconds", "4", "--rounds", "1"),
        "CPU of a whole sidecar that records a process, in percent of one core, without requests. At the same time "
        "and on the same process: a sidecar without black box (`--no-black-box`), one that records nothing "
        "(`--record-interval 0`), a C program that wakes as often and reads every thread, and a Python program that "
        "wakes as often and does nothing. The last line is the time of one request with `mode=trailing`.",
        (
            Table(
                "{threads} threads, every {interval_s:g} s",
                (
                    Figure(
                        "sidecar with black box, % of a core",
                        "recorder_percent",
                        "recorder_spread_percent",
                    ),
                    Figure("sidecar without black box, % of a core", "in_memory_percent", "in_memory_spread_percent"),
                    Figure("difference: the black box, % of a core", "black_box_percent"),
                    Figure("sidecar that records nothing, % of a core", "idle_sidecar_percent"),
                    Figure("Python program that only wakes, % of a core", "empty_wake_up_percent"),
                    Figure("C program that reads every thread, % of a core", "c_floor_percent"),
                    Figure("sidecar with black box ÷ C program", "recorder_to_floor"),
                    Figure("answer with `mode=trailing`, ms", "trailing_ms"),
                ),
            ),
        ),
        (Goal("recorder with black box, 50 threads at 1 Hz ÷ C program", EACH_SECOND, "recorder_to_floor", "<=", 4),),
        "The recorder can stay on. With 50 threads it costs a few times what a C program costs that only reads; with "
        "1000 threads, most of them asleep, it costs less than that program. A negative difference is noise.",
    ),
    MEMORY: Section(
        "memory.py",
        ("--snapshots", "200"),
        "Growth of the resident memory when 15 minutes of one process are kept: 900 snapshots of 1000 threads. "
        "Compared with one Python list of numbers per snapshot, and with objects as psutil returns them. The counters "
        "are synthetic: 4 % of the threads run and wait in each second, or all of them.",
        (
            Table(
                "{threads} threads, {running_percent:g} % of them running",
                (
                    Figure("vitalsd's ring buffer, MiB", "product_mib"),
                    Figure("lists of numbers, MiB", "lists_mib"),
                    Figure("objects, MiB", "objects_mib"),
                    Figure("lists ÷ vitalsd", "lists_to_product"),
                    Figure("objects ÷ vitalsd", "objects_to_product"),
                ),
            ),
        ),
        (
            Goal("objects ÷ vitalsd, all threads running", ALL_RUN, "objects_to_product", ">=", 14),
            Goal("vitalsd's ring buffer, all threads running, MiB", ALL_RUN, "product_mib", "<=", 8),
        ),
        "The memory of the recorder depends on how many threads run, more than on how many there are. `--retention` "
        "changes it in proportion.",
    ),
    ANSWERING: Section(
        "answering.py",
        ("--rounds", "1", "--requests", "50"),
        "CPU of the server for one answer of `/metrics?mode=trailing` with 1000 threads. Compared with the same "
        "numbers through pydantic objects (FastAPI's `response_model=`), with `/healthz` of the same sidecar, and "
        "with an ASGI application of three lines on the same server and parser (h11). Then 200 clients, each on its "
        "own connection, ask at once for a window of 500 ms.",
        (
            Table(
                "{threads} threads",
                (
                    Figure("vitalsd, µs of CPU per answer", "ours_us", "ours_spread_us"),
                    Figure("`response_model=`, µs", "response_model_us", "response_model_spread_us"),
                    Figure("`/healthz`, µs", "tiny_us", "tiny_spread_us"),
                    Figure("application of three lines, µs", "h11_us", "h11_spread_us"),
                    Figure("user of a new connection, µs", "peer_us", "peer_spread_us"),
                    Figure("`response_model=` ÷ vitalsd", "response_model_to_ours"),
                    Figure("vitalsd ÷ `/healthz`", "ours_to_tiny"),
                    Figure("vitalsd ÷ application of three lines", "ours_to_h11"),
                    Figure("user of a new connection ÷ vitalsd's answer", "peer_to_ours"),
                    Figure("answers per second and core", "trailing_per_second_per_core"),
                    Figure("time of an answer, 99th percentile ÷ median", "p99_to_p50"),
                    Figure("200 clients: snapshots taken per request", "snapshots_per_request"),
                    Figure("200 clients: window longer than asked, 99th percentile, ms", "overshoot_p99_ms"),
                    Figure("200 clients: answer after the end of its window, median, ms", "late_p50_ms"),
                    Figure("200 clients: answer after the end of its window, 99th percentile, ms", "late_p99_ms"),
                ),
            ),
        ),
        (
            Goal("`response_model=` ÷ vitalsd", {}, "response_model_to_ours", ">=", 5),
            Goal("vitalsd ÷ `/healthz`", {}, "ours_to_tiny", "<=", 3),
            Goal("vitalsd ÷ application of three lines", {}, "ours_to_h11", "<=", 3.3),
            Goal("user of a new connection ÷ vitalsd's answer", {}, "peer_to_ours", "<=", 0.05),
            Goal("time of an answer, 99th percentile ÷ median", {}, "p99_to_p50", "<=", 4),
            Goal("200 clients: snapshots taken per request", {}, "snapshots_per_request", "<=", 0.25),
        ),
        "A dashboard or a scraper costs next to nothing. Clients that ask for the same window share its snapshots "
        "(single flight), so 200 of them load the target like a few. Under such a load the answer comes late; the "
        "window itself stays exact, because the sampler's own thread closes it.",
    ),
    ACCURACY: Section(
        "accuracy.py",
        ("--rounds", "25"),
        "Error of a thread's `cpu_percent`, in percentage points of one core, over HTTP. The truth is the CPU clock of "
        "the thread, which records it at the edges of its bursts of work. Compared with the kernel's ticks of 10 ms, "
        "which psutil reads. *Covered* is the share of answers with the truth within the stated error "
        "(`cpu_percent_error`). For the own process, answers are left out if the truth is not known to 0.1 points.",
        (
            Table(
                "window of {window_ms} ms",
                (
                    Figure("true CPU of the thread, %", "true_percent"),
                    Figure("vitalsd, another process: mean error, points", "ours.mean"),
                    Figure("vitalsd, another process: 99th percentile, points", "ours.p99"),
                    Figure("ticks: mean error, points", "ticks.mean"),
                    Figure("ticks: 99th percentile, points", "ticks.p99"),
                    Figure("mean error of ticks ÷ vitalsd", "ticks_to_ours"),
                    Figure("covered by the stated error, share", "covered"),
                    Figure("stated error, median, points", "bar"),
                    Figure("stated error ÷ 99th percentile of the error", "bar_to_p99"),
                ),
            ),
            Table(
                "window of {window_ms} ms",
                (
                    Figure("own process: mean error, points", "own_process.mean"),
                    Figure("own process: 99th percentile, points", "own_process.p99"),
                    Figure("own process: covered by the stated error, share", "own_covered"),
                    Figure("answers left out", "left_out"),
                ),
            ),
        ),
        (
            Goal("another process, 50 ms: mean error, points", {"window_ms": 50}, "ours.mean", "<=", 1.5),
            Goal("another process, 1000 ms: mean error, points", {"window_ms": 1000}, "ours.mean", "<=", 0.15),
            *(
                Goal(label.format(window_ms), {"window_ms": window_ms}, name, direction, limit)
                for label, name, direction, limit in (
                    ("mean error of ticks ÷ vitalsd, {} ms", "ticks_to_ours", ">=", 3),
                    ("own process, {} ms: mean error, points", "own_process.mean", "<=", 0.05),
                    ("covered by the stated error, {} ms, share", "covered", ">=", 0.99),
                    ("own process: covered by the stated error, {} ms, share", "own_covered", ">=", 0.99),
                    ("stated error ÷ 99th percentile of the error, {} ms", "bar_to_p99", "<=", 3),
                )
                for window_ms in WINDOWS_MS
            ),
        ),
        "Use a window of 250 ms or longer for a single reading of another process. With `detail=full` each answer "
        "states its error, and the true value was within it as often as the table says.",
    ),
    MACOS: Section(
        "darwin_snapshot.py",
        ("--rounds", "40"),
        "Python's share of a snapshot of the own process on macOS, over a simulated libSystem on Linux. Compared with "
        "one bare ctypes call, of which a thread needs three, and with the same snapshot as ctypes is usually "
        "written. It was not measured on a Mac.",
        (
            Table(
                "{threads} threads",
                (
                    Figure("snapshot, µs", "snapshot_us"),
                    Figure("of that, the simulated kernel, µs", "of_that_the_kernel_us"),
                    Figure("vitalsd, per thread, ns", "ours_a_thread_ns"),
                    Figure("ctypes as usually written, per thread, ns", "by_hand_a_thread_ns"),
                    Figure("bare ctypes call, ns", "bare_call_ns"),
                    Figure("vitalsd, per thread ÷ bare call", "ours_to_bare_call"),
                    Figure("the same, a tenth of the threads running ÷ bare call", "a_tenth_running_to_bare_call"),
                    Figure("ctypes as usually written ÷ vitalsd", "by_hand_to_ours"),
                ),
            ),
        ),
        (Goal("vitalsd, per thread ÷ bare call", {}, "ours_to_bare_call", "<=", 4),),
        "Python's share of a snapshot is less than two bare calls per thread; the rest of the cost on a Mac is that "
        "of the kernel.",
    ),
    LOCK: Section(
        "darwin_gil.py",
        ("--rounds", "10"),
        "Time of one snapshot of the own process on macOS, over the simulated libSystem: the calls keep the "
        "interpreter lock, or each call releases it, which is the default of ctypes. Without other work, and beside a "
        "thread that computes.",
        (
            Table(
                "{threads} threads",
                (
                    Figure("alone, lock kept: median, ms", "idle.kept_ms"),
                    Figure("alone, lock released: median, ms", "idle.released_ms"),
                    Figure("alone: released ÷ kept", "idle.released_to_kept"),
                    Figure("alone, lock kept: longest, ms", "idle.worst_ms.kept"),
                    Figure("alone, lock released: longest, ms", "idle.worst_ms.released"),
                    Figure("beside a busy thread, lock kept: median, ms", f"{BUSY}.kept_ms"),
                    Figure("beside a busy thread, lock released: median, ms", f"{BUSY}.released_ms"),
                    Figure("beside a busy thread: released ÷ kept", f"{BUSY}.released_to_kept"),
                    Figure("beside a busy thread, lock kept: longest, ms", f"{BUSY}.worst_ms.kept"),
                    Figure("beside a busy thread, lock released: longest, ms", f"{BUSY}.worst_ms.released"),
                ),
            ),
        ),
        (),
        "The short calls keep the lock. Otherwise a snapshot inside a busy Python program would take many times as "
        "long, because each call would wait for the lock.",
    ),
    HOST: Section(
        "host.py",
        ("--rounds", "2", "--seconds", "2"),
        "Slowdown of a Python program with a thread that always computes, with a sidecar inside (`vitalsd.start()`) "
        "that records 50 threads once a second, and with the sidecar stopped, in turn. The slowdown is the time that "
        "the thread neither ran nor was ready to run: it waited for the interpreter lock.",
        (
            Table(
                "{threads} threads, every {interval_s:g} s",
                (
                    Figure("slowdown, median, %", "slowdown_percent"),
                    Figure("slowdown, longest round, %", "worst_percent"),
                    Figure("CPU of the sidecar's threads, % of a core", "sidecar_cpu_percent"),
                    Figure("waiting without a sidecar, %", "blocked_without_percent"),
                ),
            ),
        ),
        (),
        "A sidecar inside a program does not slow it down noticeably while it records.",
    ),
    GUI: Section(
        "gui.py",
        ("--rounds", "2"),
        "Delay of the event loop of a desktop client, with a timer of 5 ms: for each call of the client library, made "
        "on another thread or in the event loop itself. *Longest gap* is the longest time between two ticks less 5 "
        "ms. *Exit* is from the last statement of the program to its end. The event loop is that of Qt, offscreen, "
        "where PySide6 is installed, otherwise asyncio's.",
        (
            Table(
                "`{call}`, {made_in}",
                (
                    Figure("call, ms", "call_ms", "call_spread_ms"),
                    Figure("longest gap, ms", "longest_gap_ms", "longest_gap_spread_ms"),
                    Figure("exit, ms", "exit_ms", "exit_spread_ms"),
                ),
                run_per_line=True,
            ),
        ),
        (),
        "Call `start`, `spawn`, `fetch` and `BugReport` on a thread of their own. Then the user interface does not "
        "freeze; only `start` on a thread causes one short delay, by its imports. `mark` is fast enough for the event "
        "loop.",
    ),
    STARTUP: Section(
        "startup.py",
        ("--rounds", "2"),
        "Time from the start of `vitalsd serve` to its first answer, and its resident memory then. Compared with a "
        "bare FastAPI application of one route. Both start in turn; the ratio is the median of the ratios of "
        "neighbours.",
        (
            Table(
                "measured",
                (
                    Figure("vitalsd: first answer, ms", "first_answer_ms", "first_answer_spread_ms"),
                    Figure("bare application: first answer, ms", "bare_first_answer_ms", "bare_first_answer_spread_ms"),
                    Figure("first answer: vitalsd ÷ bare application", "ratio", "ratio_spread"),
                    Figure("vitalsd: resident memory, MiB", "rss_mib"),
                    Figure("bare application: resident memory, MiB", "bare_rss_mib"),
                    Figure("difference, MiB", "rss_difference_mib"),
                ),
            ),
        ),
        (Goal("first answer: vitalsd ÷ bare application", {}, "ratio", "<=", 1.15),),
        "A sidecar starts and weighs what its web framework does. Start it with the program, not at the click on a "
        "report button.",
    ),
}

SUMMARY: Sequence[tuple[str, str, Row, str, str]] = (
    ("Recording 50 threads once a second, with black box", RECORDER, EACH_SECOND, "recorder_percent", "% of a core"),
    (
        "Recording 1000 threads once a second",
        RECORDER,
        MANY_EACH_SECOND,
        "recorder_percent",
        "% of a core",
    ),
    ("15 minutes of 1000 threads in memory, all of them running", MEMORY, ALL_RUN, "product_mib", "MiB"),
    ("One snapshot of 1000 threads, every thread read, cold", SAMPLING, THOUSAND, "cold.full_us", "µs of CPU"),
    ("The same with psutil", SAMPLING, THOUSAND, "cold.psutil_us", "µs of CPU"),
    ("Mean error of a thread's CPU, window of 1 s", ACCURACY, {"window_ms": 1000}, "ours.mean", "points"),
    ("The same with ticks, as psutil reads them", ACCURACY, {"window_ms": 1000}, "ticks.mean", "points"),
    ("Answers about 1000 threads per second and core", ANSWERING, {}, "trailing_per_second_per_core", ""),
    ("Slowdown of a busy Python program with a sidecar inside", HOST, {}, "slowdown_percent", "%"),
    ("Resident memory of a sidecar", STARTUP, {}, "rss_mib", "MiB"),
    ("Start of a sidecar to its first answer", STARTUP, {}, "first_answer_ms", "ms"),
)
"""Most important figures: label, section, settings of the run, figure, unit."""

COSTS: Sequence[tuple[str, str, Row, str, str]] = (
    ("1000 threads that all run, cold: recorder ÷ C program", SAMPLING, WORST, "cold.product_to_floor", ""),
    ("100 threads, mostly fixed cost, cold, every thread read ÷ C program", SAMPLING, FEW, "cold.full_to_floor", ""),
    ("50 threads four times a second: recorder with black box ÷ C program", RECORDER, FAST, "recorder_to_floor", ""),
    ("Of that: a Python thread that only wakes as often", RECORDER, FAST, "empty_wake_up_percent", "% of a core"),
    ("An answer about 1000 threads", ANSWERING, {}, "ours_us", "µs"),
    ("Of that: parser and server alone, an application of three lines", ANSWERING, {}, "h11_us", "µs"),
    ("200 clients at once: last answers after the end of their window, p99", ANSWERING, {}, "late_p99_ms", "ms"),
    ("Resident memory: a Python process with a web framework", STARTUP, {}, "rss_mib", "MiB"),
    ("First answer", STARTUP, {}, "first_answer_ms", "ms"),
)
"""Figures of which another program has better ones, or that a user may want lower: fields as in `SUMMARY`."""


WHERE = {"thread": "on a thread", "loop": "in the event loop"}
"""Names of the places where `gui.py` makes a call."""


def run(program: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run a benchmark and return the JSON lines that it printed."""
    print(f"{program} {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, HERE / program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """Return nested figures under dotted names."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        cells |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return cells


def number(value: float | None) -> str:
    """Return a figure as text, with thousands separated; "n/a" for one that was not measured."""
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column is text, the others are figures."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---", *("---:",) * (len(head) - 1)), *lines))


def figures(table: Table, rows: Sequence[Row]) -> str:
    """Return the Markdown of a table, without the figures that no run has; empty if no run has any."""
    shown = [each for each in table.figures if any(each.name in row for row in rows)]
    runs = [row for row in rows if any(each.name in row for each in shown)]
    cells = [[_cell(row, each) for row in runs] for each in shown]
    labels = [table.run.format_map({**row, "made_in": WHERE.get(row.get("made_in", ""))}) for row in runs]
    names = [each.label for each in shown]
    if table.run_per_line:
        labels, names, cells = names, labels, [list(column) for column in zip(*cells, strict=True)]
    return markdown(("", *labels), [(name, *line) for name, line in zip(names, cells, strict=True)]) if cells else ""


def _cell(row: Row, figure: Figure) -> str:
    """Return a figure and, in parentheses, the spread of its rounds."""
    spread = row.get(figure.spread)
    return number(row.get(figure.name)) + (f" ({number(spread)})" if spread is not None else "")


def goals(title: str, rows: Sequence[Row], *, recorded: bool = False) -> list[tuple[str, str, str, str]]:
    """
    Return a line for each goal of a section: label, limit, figure, result.

    Args:
        title: the title of the section.
        rows: its runs, flat.
        recorded: leave out a goal without a figure, because an earlier run did not measure it.

    Raises:
        KeyError: a new run did not measure the figure of a goal.
    """
    lines = []
    for label, wanted, name, direction, limit in SECTIONS[title].goals:
        found = [row[name] for row in rows if wanted.items() <= row.items() and name in row]
        if not found and not recorded:
            raise KeyError(f"{title}: no {name} with {dict(wanted)}")
        for value in found:
            if value is None:  # The contender is not installed here: there is no Rust.
                continue
            met = value <= limit if direction == "<=" else value >= limit
            sign = "≤" if direction == "<=" else "≥"
            lines.append((label, f"{sign} {limit:g}", number(value), "met" if met else "**not met**"))
    return lines


def selected(chosen: Sequence[tuple[str, str, Row, str, str]], flats: Results) -> str:
    """Return a Markdown table of chosen figures, without those that were not measured."""
    lines = []
    for label, title, wanted, name, unit in chosen:
        for row in flats[title]:
            if row.get(name) is not None and wanted.items() <= row.items():
                lines.append((label, f"{number(row[name])} {unit}".strip()))
                break
    return markdown(("", "measured"), lines)


def plots(results: Results) -> Mapping[str, tuple[str, str]]:
    """Return for the title of a section the file name and the content of its plot."""
    most = next(row for row in results[SAMPLING] if THOUSAND.items() <= row.items())
    warm = most["warm"]
    names = {
        "product": ("vitalsd, recorder", True),
        "floor": ("C program, every thread", False),
        "full": ("vitalsd, every thread", True),
        "rust": ("simple reader in Rust", False),
        "psutil": ("psutil with names", False),
    }
    cost = [(label, warm[f"{name}_us"], ours) for name, (label, ours) in names.items() if f"{name}_us" in warm]
    error = []
    for row in results[ACCURACY]:
        if "ours" in row:
            error.append((f"vitalsd, {row['window_ms']} ms", max(row["ours"]["mean"], 0.001), True))
            error.append((f"ticks, {row['window_ms']} ms", max(row["ticks"]["mean"], 0.001), False))
    return {
        SAMPLING: (
            "snapshot-cost.svg",
            bars(f"CPU time of one snapshot of {most['threads']} threads, warm, µs", cost, " µs"),
        ),
        ACCURACY: ("accuracy.svg", bars("Mean error of cpu_percent of a 30 % thread, points", error, "")),
    }


def page(measured: Mapping[str, Any], *, recorded: bool = False) -> str:
    """
    Return the content of docs/performance.md.

    Args:
        measured: the content of docs/performance.json: `when`, `results`, and `later`, the dates of sections that were
            measured after the others.
        recorded: as in `goals`.
    """
    flats = {title: [flat(row) for row in rows] for title, rows in measured["results"].items()}
    verdicts = {title: goals(title, rows, recorded=recorded) for title, rows in flats.items()}
    every = [line for lines in verdicts.values() for line in lines]
    met = sum(line[-1] == "met" for line in every)
    parts = [
        "# Performance",
        f"Measured on {measured['when']}. `make bench` repeats that and writes this page and `performance.json`, with "
        "the same figures; `python benchmarks/suite.py --write-only` writes the page from that file. Goals are "
        "ratios between programs that take turns in one run: machines differ, and this one is shared, so compare "
        "ratios. Where a figure is followed by one in parentheses, it is the median of its rounds, and the one in "
        f"parentheses is their interquartile range. {met} of {len(every)} goals are met.",
        "## Summary",
        selected(SUMMARY, flats),
    ]
    pictures = plots(measured["results"])
    for title, rows in flats.items():
        section = SECTIONS[title]
        later = measured.get("later", {}).get(title)
        command = f"Command: `python benchmarks/{section.program}`" + (f" (measured on {later})" if later else "")
        parts += [f"## {title}", section.compared, command]
        if title in pictures:
            parts.append(f"![{title}](images/{pictures[title][0]})")
        parts += filter(None, (figures(table, rows) for table in section.tables))
        if verdicts[title]:
            parts.append(markdown(("Goal", "limit", "measured", "result"), verdicts[title]))
        parts.append(f"**For a user:** {section.meaning}")
    parts += [
        "## Known costs",
        "What another program does better, or what a user may wish cheaper.",
        selected(COSTS, flats),
    ]
    return "\n\n".join(part if part.startswith(("|", "#", "!")) else filled(part) for part in parts) + "\n"


def filled(paragraph: str) -> str:
    """Return a paragraph in lines of at most 120 characters."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def measure(*, quick: bool) -> dict[str, Any]:
    """Run every benchmark and return the content of docs/performance.json."""
    results = {title: run(each.program, each.quick if quick else ()) for title, each in SECTIONS.items()}
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()} {platform.release()}"
    when = f"{datetime.now(UTC):%Y-%m-%d}, {machine}, Python {platform.python_version()}"
    return {"when": when + (", few rounds (`--quick`)" if quick else ""), "results": results}


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="take few rounds")
    mode.add_argument(
        "--only",
        action="append",
        metavar="PROGRAM",
        choices=[each.program for each in SECTIONS.values()],
        help="measure this program anew and keep the other recorded figures",
    )
    mode.add_argument("--write-only", action="store_true", help="write the page from the recorded figures")
    mode.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    options = parser.parse_args()
    recorded = bool(options.write_only or options.check or options.only)
    record = DOCS / "performance.json"
    measured = json.loads(record.read_text(encoding="utf-8")) if recorded else measure(quick=options.quick)
    for title, section in SECTIONS.items():
        if options.only and section.program in options.only:
            measured["results"][title] = run(section.program, ())
            measured.setdefault("later", {})[title] = f"{datetime.now(UTC):%Y-%m-%d}"
    files = {DOCS / "images" / file: content for file, content in plots(measured["results"]).values()}
    files[DOCS / "performance.md"] = page(measured, recorded=recorded)
    if options.only or not recorded:
        files[record] = json.dumps(measured, indent=1) + "\n"
    if options.check:
        stale = [path.name for path, text in files.items() if path.read_text(encoding="utf-8") != text]
        for name in stale:
            print(f"{name} is not up to date: run python benchmarks/suite.py --write-only", file=sys.stderr)
        return 1 if stale else 0
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
