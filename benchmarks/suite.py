"""
Runs the whole suite and writes docs/performance.md and docs/performance.json.

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

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

SUITE: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "Sampling another process (Linux)": ("sampling.py", (), ("--rounds", "6")),
    "The recorder": ("recorder.py", (), ("--seconds", "4", "--rounds", "1")),
    "Answering": ("answering.py", (), ("--rounds", "1", "--requests", "50")),
    "Accuracy": ("accuracy.py", (), ("--rounds", "10")),
    "Inside a program": ("host.py", (), ("--rounds", "2", "--seconds", "2")),
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
    for title, rows in results.items():
        parts += [f"## {title}", f"`python benchmarks/{SUITE[title][0]}`", tables(rows)]
    (DOCS / "performance.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (DOCS / "performance.json").write_text(json.dumps({"when": head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
