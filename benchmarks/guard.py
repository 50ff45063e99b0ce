"""
Has it become slower? Runs the suite in its quick form and compares ratios with those in docs/performance.json.

    python benchmarks/guard.py [--slack 1.6]

Only ratios between contenders of one interleaved run are compared: a machine that is twice as slow does not
change them. Exit status 1, and the lines that are worse, if any is.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite import DOCS, SUITE, flat, run

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
NOISE = 0.05
"""What a ratio near zero may differ by, whatever the slack."""


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured: the settings of a line."""
    return tuple(row.get(name) for name in ("threads", "busy", "interval_s", "window_ms", "running_percent"))


def worse(recorded: Mapping[str, Any], now: Mapping[str, Any], slack: float) -> list[str]:
    """Sentences about the ratios of one line that are worse by more than `slack`."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slack", type=float, default=1.6, help="how much worse is worse (default: %(default)s)")
    slack = parser.parse_args().slack
    recorded = json.loads(Path(DOCS / "performance.json").read_text(encoding="utf-8"))["results"]
    compared, bad = 0, []
    for title, (program, _, few) in SUITE.items():
        before = {(key(row), *sorted(row)): flat(row) for row in recorded.get(title, [])}
        for row in run(program, few):
            known = before.get((key(row), *sorted(row)))
            if known is not None:
                compared += 1
                bad += [f"{title}, {key(row)}: {each}" for each in worse(known, flat(row), slack)]
    print("\n".join(bad) or f"{compared} lines compared, none worse by more than {slack:g} times")
    if not compared:
        raise SystemExit("nothing could be compared: run make bench first")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
