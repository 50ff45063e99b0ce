"""
Detect slowdowns: run the suite in its quick form and compare its ratios with those in docs/performance.json.

    python benchmarks/guard.py [--slack 1.6]

Only ratios between the programs of one interleaved run are compared, because a machine that is twice as slow does not
change them. Prints the lines that are worse and exits with status 1, if there are any.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite import DOCS, SECTIONS, flat, run

SMALLER_IS_BETTER = {
    "warm.full_to_floor",
    "cold.full_to_floor",
    "cold.full_with_names_to_floor",
    "warm.product_to_floor",
    "cold.product_to_floor",
    "recorder_to_floor",
    "ours_to_h11",
    "ours_to_tiny",
    "snapshots_per_request",
    "ours_to_bare_call",
    "ratio",
}
LARGER_IS_BETTER = {
    "warm.psutil_to_full",
    "cold.psutil_to_full",
    "objects_to_product",
    "response_model_to_ours",
    "ticks_to_ours",
    "by_hand_to_ours",
    "covered",
}
SETTINGS = ("threads", "busy", "interval_s", "window_ms", "running_percent", "call", "made_in")
NOISE = 0.05
"""Difference that a ratio near zero may have, independent of the slack."""


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the settings of a line, which identify it within its section."""
    return tuple(row.get(name) for name in SETTINGS)


def worse(recorded: Mapping[str, Any], now: Mapping[str, Any], slack: float) -> list[str]:
    """Return a sentence for each ratio of a line that is worse by more than the factor `slack`."""
    found = []
    for name, value in now.items():
        before = recorded.get(name)
        if before is None or value is None:
            continue
        if (name in SMALLER_IS_BETTER and value > before * slack + NOISE) or (
            name in LARGER_IS_BETTER and value < before / slack - NOISE
        ):
            found.append(f"{name}: {before} recorded, {value} now")
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slack", type=float, default=1.6, help="factor by which a ratio may be worse (default: %(default)s)"
    )
    slack = parser.parse_args().slack
    recorded = json.loads(Path(DOCS / "performance.json").read_text(encoding="utf-8"))["results"]
    compared, bad = 0, []
    for title, section in SECTIONS.items():
        for row in run(section.program, section.quick):
            for known in recorded.get(title, []):
                # The benchmark may measure figures that were not recorded, and not the reverse.
                if key(known) == key(row) and set(known) <= set(row):
                    compared += 1
                    bad += [f"{title}, {key(row)}: {each}" for each in worse(flat(known), flat(row), slack)]
    print("\n".join(bad) or f"{compared} lines compared, none worse by more than {slack:g} times")
    if not compared:
        raise SystemExit("nothing could be compared: run make bench first")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
