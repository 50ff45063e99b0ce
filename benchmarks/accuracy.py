"""
Measure how far a thread's `cpu_percent` is from the truth, over HTTP, beside the ticks that psutil reads.

The thread belongs to another process, and then to the process of the sidecar.

    python benchmarks/accuracy.py [--windows 50 250 1000] [--rounds 60]

The truth is the CPU clock of the thread, which writes it down at the edges of its bursts and asks no clock inside
them. Between two edges the thread is assumed to use the CPU evenly. If it was preempted it did not, so the log also
has bounds of its CPU time. The clocks of the own process are exact to a microsecond: answers with bounds wider than
0.1 points are left out there. Errors are percentage points of a core. `covered` is the share of answers with all
possible values within the stated error; `bar` is its median, beside the 99th percentile of the error.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from sampling import HERE, build, build_library

BURST_US, PERIOD_US = 3300, 11000
"""Load of 30 % of a core; `true_percent` is the measured load."""

SHORT_MS = 200
"""Shorter windows are measured more often, because the mean of sixty windows of 50 ms varies by a third."""

KNOWN_POINTS = 0.1
"""Largest uncertainty of the truth beside the clocks of the own process, percentage points to either side."""

STAMP_NS = 1000
"""An instant of an answer is up to this much later, ns: it is cut to the microsecond."""

Log = list[tuple[int, int]]


class Truth(NamedTuple):
    """CPU time in ns, or CPU in percent: the best estimate, and the bounds of the possible values."""

    likely: float
    least: float
    most: float


def cpu_at(log: Log, instant_ns: int) -> Truth:
    """Return the CPU time at an instant between two edges."""
    after = bisect_right(log, instant_ns, key=lambda edge: edge[0])
    (t0, c0), (t1, c1) = log[after - 1], log[after]
    likely = c0 + (c1 - c0) * (instant_ns - t0) / (t1 - t0)
    return Truth(likely, max(c0, c1 - (t1 - instant_ns)), min(c1, c0 + (instant_ns + STAMP_NS - t0)))


def percent_of(log: Log, begin_ns: int, end_ns: int) -> Truth:
    """Return the CPU of a window."""
    first, last, share = cpu_at(log, begin_ns), cpu_at(log, end_ns), 100 / (end_ns - begin_ns)
    return Truth(
        share * (last.likely - first.likely),
        share * max(0.0, last.least - first.most),
        share * (last.most - first.least),
    )


class Duty:
    """Run a program with a thread that works in bursts, and read its log; `address` is its first line, if it serves."""

    def __init__(self, command: Sequence[str], state: str, *, serves: bool) -> None:
        self.process = subprocess.Popen(
            [*command, str(BURST_US), str(PERIOD_US)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(state),
            preexec_fn=None if serves else partial(pinned, max),
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip() if serves else ""
        self.tid = int(self.process.stdout.readline())
        self.log: Log = []

    def edges(self) -> Log:
        """Return all edges so far, and one more beyond now."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        now_ns = time.monotonic_ns()
        while not self.log or self.log[-1][0] <= now_ns:
            time.sleep(2 * PERIOD_US / 1e6)
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            numbers = list(map(int, self.process.stdout.readline().split()))
            self.log = self.log[-10_000:] + list(zip(numbers[::2], numbers[1::2], strict=True))
        return self.log


def environment(state: str) -> dict[str, str]:
    """Return the environment of a sidecar with its state in `state`."""
    return {"PATH": "/usr/bin:/bin", "HOME": state, "VITALSD_STATE_DIR": state, "VITALSD_RUNTIME_DIR": state}


def pinned(which: Callable[[set[int]], int]) -> None:
    """
    Keep this process on one core, so that the thread and the sidecar are on different ones.

    If both share a core, each read interrupts the thread, and the kernel updates its account of it: the sidecar would
    look better than it is.
    """
    if sys.platform == "linux":
        os.sched_setaffinity(0, {which(os.sched_getaffinity(0))})


@contextmanager
def alongside(state: str) -> Iterator[tuple[Duty, str]]:
    """Run the thread in a process of its own; yield it, and the address of a sidecar that watches it."""
    target = Duty([str(build(Path(state))["duty"])], state, serves=False)
    pid = str(target.process.pid)
    command = [sys.executable, "-m", "vitalsd", "serve", "--pid", pid, "--port", "0", "--record-interval", "0"]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(state), preexec_fn=partial(pinned, min)
    )
    assert server.stderr is not None
    yield target, "http://" + server.stderr.readline().split("http://")[1].split("/")[0]
    for each in (server, target.process):
        each.terminate()
        each.communicate()


@contextmanager
def inside(state: str) -> Iterator[tuple[Duty, str]]:
    """Run the thread in a Python program with a sidecar inside; yield it, and the address of the sidecar."""
    command = [sys.executable, str(HERE / "duty_host.py"), str(build_library(Path(state), "duty"))]
    target = Duty(command, state, serves=True)
    yield target, target.address
    target.process.terminate()
    target.process.communicate()


def monotonic_ns(stamp: str) -> int:
    """Return an instant of the answer on the monotonic clock."""
    moment = datetime.fromisoformat(stamp)
    unix_ns = int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000
    return unix_ns - (time.time_ns() - time.monotonic_ns())


@dataclass
class Errors:
    """Errors in percentage points of answers with a known truth: ours, of ticks, our stated error; and the truth."""

    ours: list[float] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)
    bars: list[float] = field(default_factory=list)
    true: list[float] = field(default_factory=list)
    covered: int = 0
    """Answers with the truth within the stated error."""
    unknown: int = 0
    """Answers left out."""

    def of_known(self, count: int) -> float:
        """Return `count` as a fraction of the known answers."""
        return round(count / max(1, len(self.ours)), 3)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean and 99th percentile of the absolute values."""
    ordered = sorted(map(abs, values))
    return {"mean": round(statistics.mean(ordered), 3), "p99": round(ordered[(len(ordered) - 1) * 99 // 100], 3)}


def errors(
    start: Callable[[str], AbstractContextManager[tuple[Duty, str]]],
    window_ms: int,
    rounds: int,
    unsure_points: float = math.inf,
) -> Errors:
    """
    Compare answers over HTTP with the truth, and psutil at the same time.

    Args:
        start: runs the thread in a directory and yields it with the address of its sidecar.
        window_ms: window to ask for.
        rounds: number of windows; of those shorter than `SHORT_MS`, more in proportion.
        unsure_points: leave out answers if the truth is uncertain by more than this.
    """
    found = Errors()
    with tempfile.TemporaryDirectory() as state, start(state) as (target, url):
        process = psutil.Process(target.process.pid)

        def jiffies() -> tuple[int, float]:
            thread = next(thread for thread in process.threads() if thread.id == target.tid)
            return time.monotonic_ns(), thread.user_time + thread.system_time

        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            for _ in range(rounds * max(1, SHORT_MS // window_ms)):
                asked_ms = round(window_ms * random.uniform(0.9, 1.1))
                before = jiffies()
                answer = client.get("/metrics", params={"window_ms": asked_ms, "detail": "full"}).json()
                after = jiffies()
                log = target.edges()
                begin, end = (monotonic_ns(answer["window"][name]) for name in ("started_at", "ended_at"))
                truth = percent_of(log, begin, end)
                if truth.most - truth.least > 2 * unsure_points:
                    found.unknown += 1
                    continue
                thread = next(thread for thread in answer["threads"] if thread["tid"] == target.tid)
                percent, bar = thread["cpu_percent"], thread["cpu_percent_error"]
                found.ours.append(percent - truth.likely)
                found.true.append(truth.likely)
                found.bars.append(bar)
                found.covered += truth.least - bar <= percent <= truth.most + bar
                ticks = 100e9 * (after[1] - before[1]) / (after[0] - before[0])
                found.ticks.append(ticks - percent_of(log, before[0], after[0]).likely)
    return found


def of_another_process(window_ms: int, rounds: int) -> dict[str, object]:
    """Return the line for a thread of another process."""
    found = errors(alongside, window_ms, rounds)
    ours, ticks = summary(found.ours), summary(found.ticks)
    return {
        "window_ms": window_ms,
        "true_percent": round(statistics.mean(found.true), 1),
        "ours": ours,
        "ticks": ticks,
        "ticks_to_ours": round(ticks["mean"] / max(ours["mean"], 0.001), 1),
        "covered": found.of_known(found.covered),
        "bar": round(statistics.median(found.bars), 3),
        "bar_to_p99": round(statistics.median(found.bars) / max(ours["p99"], 0.001), 2),
    }


def of_the_own_process(window_ms: int, rounds: int) -> dict[str, object]:
    """Return the line for a thread of the sidecar's process."""
    found = errors(inside, window_ms, rounds, KNOWN_POINTS)
    covered = found.of_known(found.covered)
    return {
        "window_ms": window_ms,
        "own_process": summary(found.ours),
        "own_covered": covered,
        "left_out": found.unknown,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[50, 250, 1000])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    for window_ms in arguments.windows:
        print(json.dumps(of_another_process(window_ms, arguments.rounds)), flush=True)
    for window_ms in arguments.windows:
        print(json.dumps(of_the_own_process(window_ms, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
