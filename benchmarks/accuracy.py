"""
How far a thread's cpu_percent is from the truth, over HTTP, beside the ticks that psutil reads.

    python benchmarks/accuracy.py [--windows 50 250 1000] [--rounds 60]

Truth: the thread writes down its own CPU clock at the edges of its bursts, and asks no clock inside
them; read at the two instants that the answer names. Errors in percentage points of a core. `covered` is the part of
answers whose error bar holds the truth; `bar` is its median beside the 99th percentile of the error.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import httpx
import psutil

from sampling import build
from vitalsd.sampler import sample
from vitalsd.sources import open_source

BURST_US, PERIOD_US = 3300, 11000
"""30 % of a core."""

Log = list[tuple[int, int]]


def cpu_at(log: Log, instant_ns: int) -> float:
    """CPU time at an instant, between two edges, ns."""
    after = bisect_right(log, instant_ns, key=lambda edge: edge[0])
    (t0, c0), (t1, c1) = log[after - 1], log[after]
    return c0 + (c1 - c0) * (instant_ns - t0) / (t1 - t0)


class Duty:
    """The native program that works in bursts, and its log."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [program, str(BURST_US), str(PERIOD_US)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.tid = int(self.process.stdout.readline())
        self.log: Log = []

    def edges(self) -> Log:
        """All edges so far, and one more beyond now."""
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


def monotonic_ns(stamp: str) -> int:
    """An instant of the answer on the monotonic clock."""
    moment = datetime.fromisoformat(stamp)
    unix_ns = int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000
    return unix_ns - (time.time_ns() - time.monotonic_ns())


def summary(errors: Sequence[float]) -> dict[str, float]:
    ordered = sorted(map(abs, errors))
    return {"mean": round(statistics.mean(ordered), 3), "p99": round(ordered[(len(ordered) - 1) * 99 // 100], 3)}


def over_http(window_ms: int, rounds: int) -> dict[str, object]:
    """Another process, asked over HTTP, and psutil at the same time."""
    ours: list[float] = []
    ticks: list[float] = []
    bars: list[float] = []
    with tempfile.TemporaryDirectory() as state:
        target = Duty(build(Path(state))["duty"])
        tid = target.tid
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vitalsd",
                "serve",
                "--pid",
                str(target.process.pid),
                "--port",
                "0",
                "--record-interval",
                "0",
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": state, "VITALSD_STATE_DIR": state, "VITALSD_RUNTIME_DIR": state},
        )
        assert server.stderr is not None
        url = "http://" + server.stderr.readline().split("http://")[1].split("/")[0]
        process = psutil.Process(target.process.pid)

        def jiffies() -> tuple[int, float]:
            thread = next(thread for thread in process.threads() if thread.id == tid)
            return time.monotonic_ns(), thread.user_time + thread.system_time

        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            for _ in range(rounds):
                asked_ms = round(window_ms * random.uniform(0.9, 1.1))
                before = jiffies()
                answer = client.get("/metrics", params={"window_ms": asked_ms, "detail": "full"}).json()
                after = jiffies()
                log = target.edges()
                begin, end = (monotonic_ns(answer["window"][name]) for name in ("started_at", "ended_at"))
                truth = 100 * (cpu_at(log, end) - cpu_at(log, begin)) / (end - begin)
                thread = next(thread for thread in answer["threads"] if thread["tid"] == tid)
                ours.append(thread["cpu_percent"] - truth)
                bars.append(thread["cpu_percent_error"])
                span_ns = after[0] - before[0]
                true_ticks = 100 * (cpu_at(log, after[0]) - cpu_at(log, before[0])) / span_ns
                ticks.append(100e9 * (after[1] - before[1]) / span_ns - true_ticks)
        for each in (server, target.process):
            each.terminate()
            each.communicate()
    errors, jiffy_errors = summary(ours), summary(ticks)
    return {
        "window_ms": window_ms,
        "ours": errors,
        "ticks": jiffy_errors,
        "ticks_to_ours": round(jiffy_errors["mean"] / max(errors["mean"], 0.001), 1),
        "covered": round(sum(abs(e) <= bar for e, bar in zip(ours, bars, strict=True)) / len(ours), 3),
        "bar": round(statistics.median(bars), 3),
    }


def in_process(window_ms: int, rounds: int) -> dict[str, object]:
    """A thread of this process, by its own CPU clock."""
    log: Log = []
    tids: list[int] = []
    end = threading.Event()

    def burn() -> None:
        tids.append(threading.get_native_id())
        while not end.is_set():
            until = time.thread_time_ns() + 6_000_000
            log.append((time.monotonic_ns(), time.thread_time_ns()))
            while (cpu_ns := time.thread_time_ns()) < until:
                now = time.monotonic_ns()
                if now - log[-1][0] > 200_000:
                    log.append((now, cpu_ns))
            log.append((time.monotonic_ns(), time.thread_time_ns()))
            time.sleep(0.014)

    thread = threading.Thread(target=burn)
    thread.start()
    source = open_source()
    errors = []
    for _ in range(rounds):
        log[:-1] = []
        measured = sample(source, round(window_ms * random.uniform(0.9, 1.1)))
        while log[-1][0] <= measured.last.monotonic_ns:
            time.sleep(0.03)
        index = list(measured.last.tids).index(tids[0])
        begin, last = measured.first.monotonic_ns, measured.last.monotonic_ns
        if log[0][0] < begin:
            truth = 100 * (cpu_at(log, last) - cpu_at(log, begin)) / (last - begin)
            errors.append(100 * measured.thread_cpu_ns[index] / measured.elapsed_ns - truth)
    end.set()
    thread.join()
    source.close()
    return {"window_ms": window_ms, "own_process": summary(errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[50, 250, 1000])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    for window_ms in arguments.windows:
        print(json.dumps(over_http(window_ms, arguments.rounds)), flush=True)
    for window_ms in arguments.windows:
        print(json.dumps(in_process(window_ms, min(30, arguments.rounds))), flush=True)


if __name__ == "__main__":
    main()
