"""
Runs the whole suite and writes docs/performance.md, docs/performance.json and the plots in docs/images/.

    python benchmarks/suite.py [--quick]

Every program is one interleaved run of its own; `--quick` takes few rounds, to see that all of it works.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plot import bars

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

SAMPLING = "Sampling another process (Linux)"
MACOS = "A snapshot of its own threads on macOS (over the simulator)"
THOUSAND = {"threads": 1000, "busy": 4}
WORST = {"threads": 1000, "busy": 999}
FEW = {"threads": 100}
FAST = {"threads": 50, "interval_s": 0.25}
EMPTY = "empty_wake_up_percent"
ALL_RUN = {"snapshots": 900, "running_percent": 100}

SUITE: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    SAMPLING: ("sampling.py", (), ("--rounds", "5")),
    "The recorder": ("recorder.py", (), ("--seconds", "4", "--rounds", "1")),
    "The record in memory": ("memory.py", (), ("--snapshots", "200")),
    "Answering": ("answering.py", (), ("--rounds", "1", "--requests", "50")),
    "Accuracy": ("accuracy.py", (), ("--rounds", "25")),
    MACOS: ("darwin_snapshot.py", (), ("--rounds", "40")),
    "The interpreter lock on macOS (over the simulator)": ("darwin_gil.py", (), ("--rounds", "10")),
    "Inside a program": ("host.py", (), ("--rounds", "2", "--seconds", "2")),
    "In a program with a user interface": ("gui.py", (), ("--rounds", "2")),
    "Start and size": ("startup.py", (), ("--rounds", "2")),
}


def run(program: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON lines that a program of the suite printed."""
    print(f"{program} {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, HERE / program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under dotted names."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        cells |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return cells


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown table, a figure a line and a run a column, for each shape of rows."""
    shapes: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in map(flat, rows):
        shapes.setdefault(tuple(row), []).append(row)
    written = []
    for names, same in shapes.items():
        lines = ["| |" + " |" * len(same), "|---|" + "---:|" * len(same)]
        lines += [f"| {name} | " + " | ".join(str(row[name]) for row in same) + " |" for name in names]
        written.append("\n".join(lines))
    return "\n\n".join(written)


GOALS: Sequence[tuple[str, str, Mapping[str, Any], str, str, float]] = (
    ("all of 1000 threads, warm, of the C floor", SAMPLING, THOUSAND, "warm.full_to_floor", "<=", 1.75),
    ("the same, cold", SAMPLING, THOUSAND, "cold.full_to_floor", "<=", 1.35),
    (
        "the same with what is done once a second, names and a count of the threads",
        SAMPLING,
        THOUSAND,
        "cold.full_with_names_to_floor",
        "",
        0,
    ),
    ("psutil with names, of ours, warm", SAMPLING, THOUSAND, "warm.psutil_to_full", ">=", 15),
    ("the same, cold", SAMPLING, THOUSAND, "cold.psutil_to_full", ">=", 8),
    ("a naive reader in Rust, of ours, warm", SAMPLING, THOUSAND, "warm.rust_to_full", ">=", 8),
    ("the same, cold", SAMPLING, THOUSAND, "cold.rust_to_full", ">=", 4),
    ("hot-first, of the C floor, warm", SAMPLING, THOUSAND, "warm.product_to_floor", "<=", 0.5),
    ("the same where every thread runs, cold, of all threads read", SAMPLING, WORST, "cold.product_to_full", "<=", 1.1),
    (
        "recorder in memory, 50 threads at 4 Hz, % of a core",
        "The recorder",
        {"threads": 50, "interval_s": 0.25},
        "in_memory_percent",
        "<=",
        0.15,
    ),
    (
        "its black box beside that",
        "The recorder",
        {"threads": 50, "interval_s": 0.25},
        "black_box_percent",
        "",
        0,
    ),
    (
        "recorder, 1000 threads at 4 Hz, % of a core",
        "The recorder",
        {"threads": 1000, "interval_s": 0.25},
        "recorder_percent",
        "<=",
        1,
    ),
    ("15 minutes of 1000 threads that all run, MiB", "The record in memory", ALL_RUN, "product_mib", "<=", 8),
    ("objects as psutil returns them, of ours", "The record in memory", ALL_RUN, "objects_to_product", ">=", 14),
    ("`response_model`, of ours, 1000 threads", "Answering", {}, "response_model_to_ours", ">=", 5),
    ("ours, of a tiny answer", "Answering", {}, "ours_to_tiny", "<=", 3),
    ("snapshots a request, 200 callers at once", "Answering", {}, "snapshots_per_request", "<=", 0.25),
    ("their windows longer than asked, p99, ms", "Answering", {}, "overshoot_p99_ms", "<=", 20),
    ("trailing answers a second on one core", "Answering", {}, "trailing_per_second_per_core", ">=", 3000),
    (
        "one of them, of an answer of three lines by the same parser (100 µs where 3000 was aimed at)",
        "Answering",
        {},
        "ours_to_h11",
        "<=",
        3.3,
    ),
    ("the user of a new connection, of a trailing answer", "Answering", {}, "peer_to_ours", "<=", 0.05),
    ("p99 of p50", "Answering", {}, "p99_to_p50", "<=", 4),
    ("mean error at 50 ms, points", "Accuracy", {"window_ms": 50}, "ours.mean", "<=", 1.5),
    ("mean error at 1 s, points", "Accuracy", {"window_ms": 1000}, "ours.mean", "<=", 0.15),
    *(
        (f"{words}, at {window_ms} ms", "Accuracy", {"window_ms": window_ms}, name, direction, limit)
        for words, name, direction, limit in (
            ("error of ticks, of ours", "ticks_to_ours", ">=", 3.0),
            ("own process, mean error, points", "own_process.mean", "<=", 0.05),
            ("samples that the error bar covers", "covered", ">=", 0.99),
            ("the same of the own process", "own_covered", ">=", 0.99),
            ("the bar, of the 99th percentile of the error", "bar_to_p99", "<=", 3.0),
        )
        for window_ms in (50, 250, 1000)
    ),
    ("a thread on macOS, in bare ctypes calls (it takes three)", MACOS, {}, "ours_to_bare_call", "<=", 4),
    ("a program with a sidecar inside slows down, %", "Inside a program", {}, "slowdown_percent", "<=", 0.5),
    ("first answer, of a bare FastAPI application", "Start and size", {}, "ratio", "<=", 1.1),
    ("memory above that application, MiB", "Start and size", {}, "rss_difference_mib", "<=", 10),
)
"""What was aimed at: words, section, line, figure, direction (none: to be stated), limit."""


def verdict(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table of the goals, and what came of them. Raises `KeyError`: a figure is not there any more."""
    lines = ["| | goal | measured | |", "|---|---:|---:|---|"]
    for words, title, wanted, name, direction, limit in GOALS:
        rows = [row for row in map(flat, results[title]) if wanted.items() <= row.items() and name in row]
        if not rows:
            raise KeyError(f"{title}: no {name} with {dict(wanted)}")
        for value in (row[name] for row in rows):
            if value is None:  # there is no Rust here
                continue
            if not direction:
                lines.append(f"| {words} | stated | {value:g} | |")
            else:
                met = value <= limit if direction == "<=" else value >= limit
                sign = "≤" if direction == "<=" else "≥"
                lines.append(f"| {words} | {sign} {limit:g} | {value:g} | {'met' if met else '**not met**'} |")
    return "\n".join(lines)


LOSSES: Sequence[tuple[str, str, Mapping[str, Any], str]] = (
    (
        "where every thread runs nothing can be proved and every name is read: cold, of the C floor",
        SAMPLING,
        WORST,
        "cold.product_to_floor",
    ),
    (
        "few threads are mostly fixed cost: 100, cold, all of them read, of the C floor",
        SAMPLING,
        FEW,
        "cold.full_to_floor",
    ),
    (
        "50 threads four times a second, of a C program that does nothing but read them",
        "The recorder",
        FAST,
        "recorder_to_floor",
    ),
    ("of that, a thread of Python that wakes as often and does nothing, % of a core", "The recorder", FAST, EMPTY),
    ("an answer, µs, against an application of three lines on the same parser ...", "Answering", {}, "ours_us"),
    ("... which is dear itself: h11 alone, µs", "Answering", {}, "h11_us"),
    ("the last of 200 callers of one window has his answer late by, p99, ms", "Answering", {}, "late_p99_ms"),
    ("a sidecar is a Python process with a web framework: resident, MiB", "Start and size", {}, "rss_mib"),
    ("and its first answer, ms", "Start and size", {}, "first_answer_ms"),
)


def losses(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table of what something else does better."""
    lines = ["| | |", "|---|---:|"]
    for words, title, wanted, name in LOSSES:
        for row in map(flat, results[title]):
            if row.get(name) is not None and all(row.get(key) == each for key, each in wanted.items()):
                lines.append(f"| {words} | {row[name]:g} |")
                break
    return "\n".join(lines)


def plots(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Mapping[str, tuple[str, str]]:
    """Titles of sections, and the file and content of the plot for each."""
    most = next(row for row in results[SAMPLING] if all(row[key] == each for key, each in THOUSAND.items()))
    warm = most["warm"]
    names = {
        "product": ("vitalsd, recorder", True),
        "floor": ("the floor in C, all threads", False),
        "full": ("vitalsd, all threads", True),
        "rust": ("a naive reader in Rust", False),
        "psutil": ("psutil with names", False),
    }
    cost = [(label, warm[f"{name}_us"], ours) for name, (label, ours) in names.items() if f"{name}_us" in warm]
    error = []
    for row in results["Accuracy"]:
        if "ours" in row:
            error.append((f"vitalsd, {row['window_ms']} ms", max(row["ours"]["mean"], 0.001), True))
            error.append((f"ticks, {row['window_ms']} ms", max(row["ticks"]["mean"], 0.001), False))
    return {
        SAMPLING: (
            "snapshot-cost.svg",
            bars(f"CPU time of one snapshot of {most['threads']} threads, warm, µs", cost, " µs"),
        ),
        "Accuracy": ("accuracy.svg", bars("Mean error of cpu_percent of a 30 % thread, points", error, "")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    results = {title: run(name, few if quick else full) for title, (name, full, few) in SUITE.items()}
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()} {platform.release()}"
    head = f"{datetime.now(UTC):%Y-%m-%d}, {machine}, Python {platform.python_version()}"
    parts = [
        "# Performance",
        "Written by `make bench`" + (" in its quick form" if quick else "") + f": {head}. The figures beside it in "
        "`performance.json` are the same ones. Machines differ and are shared: quote ratios, not absolutes. What "
        "each program measures, and against what, stands at its head in `benchmarks/`.",
    ]
    pictures = plots(results)
    (DOCS / "images").mkdir(exist_ok=True)
    for title, rows in results.items():
        parts += [f"## {title}", f"`python benchmarks/{SUITE[title][0]}`"]
        if title in pictures:
            file, content = pictures[title]
            (DOCS / "images" / file).write_text(content, encoding="utf-8")
            parts.append(f"![{title}](images/{file})")
        parts.append(tables(rows))
    parts += ["## Where it loses", "What something else does better, or what one might wish cheaper.", losses(results)]
    parts += ["## Goals", "What was aimed at, and whether this run got there.", verdict(results)]
    (DOCS / "performance.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (DOCS / "performance.json").write_text(json.dumps({"when": head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
