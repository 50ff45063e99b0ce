"""
Check windows and tables of a sampler against invariants. It shares no code with vitalsd.

    python oracle.py < LINES

Each line is a letter and JSON:

    T [number, monotonic_ns, process_ns, executions, {tid: [cpu_ns, name]}]   clocks of the resting target
    W [first, last, named, full, basic]      a window between the times of two such lines (-1: the target did not rest):
                                             the answer of detail=full, and the basic one of the same window or null
    H table                                  a table as /history has it
    N                                        another target: the earlier clocks are discarded

The output is a JSON object with the counts; ``violations`` holds the texts of the first ones. The exit status is 1 if
there are any.
"""

import json
import math
import sys
from typing import Any

DIGITS = 0.0011
"""Rounding error of two numbers with three decimals, percent."""
REST_NS = 1_000_000
"""CPU time that a resting target may use until it is read, ns: for its answer and for thread switches."""
TABLE_MS = 12.0
"""Tolerance of a table, which states no errors, ms: two scheduler ticks of 4 ms, and the time of a read."""
SHOWN = 20
"""Violations to report with their text."""


class Oracle:
    """Check lines, and count what was checked and violated."""

    def __init__(self) -> None:
        self.truths: dict[int, tuple[int, int, int, dict[int, tuple[int, str]]]] = {}
        self.counts = dict.fromkeys(("windows", "basic", "tables", "cells", "unknown", "compared", "names", "execs"), 0)
        self.counts |= {"unnoticed_execs": 0, "unnoticed_execs_of_several": 0}
        self.violations: list[str] = []
        self.violated = 0

    def fail(self, words: str) -> None:
        """Record a violation."""
        self.violated += 1
        if len(self.violations) < SHOWN:
            self.violations.append(words)

    def truth(self, line: list[Any]) -> None:
        """Read a line T."""
        number, monotonic_ns, process_ns, executions, threads = line
        self.truths[number] = (monotonic_ns, process_ns, executions, {int(t): tuple(v) for t, v in threads.items()})

    def window(self, line: list[Any]) -> None:
        """Check a line W."""
        first, last, named, full, basic = line
        self.counts["windows"] += 1
        process, threads, books = full["process"], full["threads"], full["accounting"]
        total, total_error = process["cpu_percent"], process["cpu_percent_error"]
        where = f"window {self.counts['windows']}"
        figures = [total, total_error, *(t["cpu_percent"] for t in threads)]
        if not all(f is None or (math.isfinite(f) and f >= 0) for f in figures):
            self.fail(f"{where}: a figure is negative or not finite: {figures}")
            return
        for thread in threads:
            used, error = thread["cpu_percent"], thread["cpu_percent_error"]
            if (used is None) != (error is None):
                self.fail(f"{where}: a figure without an error or the reverse: {thread}")
            elif used is None:
                self.counts["unknown"] += 1
            elif used - error > total + total_error + DIGITS:
                self.fail(
                    f"{where}: thread {thread['tid']} used {used} +- {error}, its process {total} +- {total_error}"
                )
        known = [thread for thread in threads if thread["cpu_percent"] is not None]
        parts = books["living_percent"] + books["exited_percent"] + books["unattributed_percent"]
        if abs(parts - total) > 4 * DIGITS or books["process_percent"] != total:
            self.fail(f"{where}: the books do not balance: {books}")
        if abs(sum(t["cpu_percent"] for t in known) - books["living_percent"]) > DIGITS * (1 + len(known)):
            self.fail(f"{where}: the threads are not what lives: {books}")
        if basic is not None:
            self.basic(where, full, basic)
        if first < 0 or last < 0:
            return
        self.compare(where, first, last, full, named=named)

    def basic(self, where: str, full: dict[str, Any], basic: dict[str, Any]) -> None:
        """Check that the basic answer is consistent with the full one."""
        self.counts["basic"] += 1
        shown = [
            (t["tid"], 0.0 if t["cpu_percent"] is None or t["born_in_window"] else t["cpu_percent"])
            for t in full["threads"]
        ]
        if [(t["tid"], t["cpu_percent"]) for t in basic["threads"]] != shown:
            self.fail(f"{where}: the basic answer has other figures than the full one")
        if basic["process"]["cpu_percent"] != full["process"]["cpu_percent"]:
            self.fail(f"{where}: the basic answer has another total than the full one")

    def compare(self, where: str, first: int, last: int, full: dict[str, Any], *, named: bool) -> None:
        """Compare a window between two rests of the target with the target's own clocks."""
        elapsed_ns = full["window"]["measured_ms"] * 1e6
        before, after = self.truths[first], self.truths[last]
        executed = before[2] != after[2]
        threads = full["threads"]
        tids = {thread["tid"] for thread in threads}
        if tids != set(after[3]):
            self.fail(f"{where}: threads {sorted(tids)}, and there are {sorted(after[3])}")
            return
        if named:
            self.counts["names"] += 1
            wrong = [
                (t["tid"], t["name"], after[3][t["tid"]][1]) for t in threads if t["name"] != after[3][t["tid"]][1]
            ]
            if wrong:
                self.fail(f"{where}: names, shown and right: {wrong}")

        def differs(percent: float, error: float, used_ns: int) -> bool:
            allowed_ns: float = (error + DIGITS) * elapsed_ns / 100 + REST_NS
            return bool(abs(percent * elapsed_ns / 100 - used_ns) > allowed_ns)

        process = full["process"]
        if differs(process["cpu_percent"], process["cpu_percent_error"], after[1] - before[1]):
            self.fail(
                f"{where}: process {process['cpu_percent']} %, and it used {after[1] - before[1]} ns of {elapsed_ns}"
            )
        idle = all(t["cpu_percent"] == 0 for t in threads) and set(before[3]) == set(after[3]) and not executed
        if idle and after[1] - before[1] > REST_NS + len(tids) * full["resolution"]["lag_ns"]:
            self.fail(f"{where}: all threads idle, and the process used {after[1] - before[1]} ns")
        if executed:
            self.counts["execs"] += 1
            noticed = all(t["cpu_percent"] is None for t in threads)
            self.counts["unnoticed_execs"] += not noticed
            # The only thread of a process is the same one after an exec; of several, any may be the main one.
            if noticed or len(before[3]) > 1 or len(tids) > 1:
                self.counts["unnoticed_execs_of_several"] += not noticed
                return
        for thread in threads:
            if thread["cpu_percent"] is None:
                continue
            self.counts["compared"] += 1
            # A number that was given again: then its clock began anew, and the thread was born in the window.
            used_ns = after[3][thread["tid"]][0]
            if not thread["born_in_window"]:
                used_ns -= before[3].get(thread["tid"], (0, ""))[0]
            if used_ns >= 0 and differs(thread["cpu_percent"], thread["cpu_percent_error"], used_ns):
                self.fail(
                    f"{where}: thread {thread['tid']} {thread['cpu_percent']} %, and it used {used_ns} of {elapsed_ns}"
                )

    def table(self, table: dict[str, Any]) -> None:
        """Check a line H."""
        self.counts["tables"] += 1
        for thread in table["threads"]:
            for cell, total, elapsed_ms in zip(
                thread["cpu_percent"], table["cpu_percent"], table["elapsed_ms"], strict=True
            ):
                self.counts["cells"] += 1
                if cell is not None and (cell - total) * elapsed_ms / 100 > TABLE_MS:
                    self.fail(
                        f"table {self.counts['tables']}: thread {thread['tid']} {cell} % of a process at {total} %"
                    )


def main() -> int:
    """Check standard input, print the result, and return the exit status."""
    oracle = Oracle()
    for line in sys.stdin:
        kind, content = line[0], line[2:]
        if kind == "T":
            oracle.truth(json.loads(content))
        elif kind == "W":
            oracle.window(json.loads(content))
        elif kind == "H":
            oracle.table(json.loads(content))
        else:
            oracle.truths.clear()
    print(json.dumps({**oracle.counts, "violated": oracle.violated, "violations": oracle.violations}))
    return 1 if oracle.violated else 0


if __name__ == "__main__":
    sys.exit(main())
