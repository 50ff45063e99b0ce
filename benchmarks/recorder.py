"""
Measure what recording costs: CPU of a sidecar that records, beside one that does not, in one run.

    python benchmarks/recorder.py [--seconds 10] [--rounds 3] [--threads 50 1000] [--interval 1.0 0.25]

Sidecars with recorder and black box, with the recorder alone and with neither watch the same target at the same time.
So does the floor, a C program that wakes as often and only reads: every thread, and once a second the figures of the
process and of the machine. Beside them a Python program wakes as often and does nothing. All of them share the load of
the machine. Figures are percent of one core, by the CPU clock of each process; medians of the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from sampling import build
from spread import spread

BUSY = ("4", "100", "20000")
"""Arguments of the target: threads that work, µs of work and µs of sleep in turn."""

EMPTY = """
import sys, threading, time
def wake():
    while True:
        time.sleep(float(sys.argv[1]))
threading.Thread(target=wake, daemon=True).start()
threading.Event().wait()
"""
"""Program with a thread that wakes as often as the recorder's and does nothing."""

SIDECARS = {"recorder": (), "without_black_box": ("--no-black-box",), "off": ("--record-interval", "0")}


def sidecar(pid: int, interval_s: float, state: str, *options: str) -> tuple[subprocess.Popen[str], str]:
    """Start a sidecar that watches `pid`; return it and its address."""
    command = [sys.executable, "-m", "vitalsd", "serve", "--pid", str(pid), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--record-interval", f"{interval_s}", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": state, "VITALSD_STATE_DIR": state, "VITALSD_RUNTIME_DIR": state},
    )
    assert process.stderr is not None
    return process, "http://" + process.stderr.readline().split("http://")[1].split("/")[0]


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process, ns (Linux: its CPU clock)."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def trailing_ms(url: str, count: int = 200) -> float:
    """Return the median time of a trailing answer, ms."""
    took = []
    with httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(count):
            begun = time.perf_counter()
            client.get("/metrics", params={"mode": "trailing", "window_ms": 2000}).raise_for_status()
            took.append((time.perf_counter() - begun) * 1000)
    return statistics.median(took)


def percents(processes: dict[str, subprocess.Popen[str]], seconds: float) -> dict[str, float]:
    """Return the CPU of each process over the next `seconds`, percent of a core."""
    before, begun = {name: cpu_ns(each.pid) for name, each in processes.items()}, time.monotonic_ns()
    time.sleep(seconds)
    elapsed = time.monotonic_ns() - begun
    return {name: 100 * (cpu_ns(each.pid) - before[name]) / elapsed for name, each in processes.items()}


def compare(
    programs: dict[str, Path], threads: int, interval_s: float, *, seconds: float, rounds: int
) -> dict[str, float | None]:
    """Return one line of the result."""
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())

        def run(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        command = [str(programs["target"]), str(threads), *BUSY]
        target = run(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert target.stdout is not None
        target.stdout.readline()
        processes, url = {}, ""
        for name, options in SIDECARS.items():
            process, address = sidecar(target.pid, interval_s, state, *options)
            processes[name], url = run(process), url or address
        floor = [str(programs["floor"]), str(target.pid), str(round(interval_s * 1000))]
        processes["floor"] = run(subprocess.Popen(floor, text=True))
        processes["empty"] = run(subprocess.Popen([sys.executable, "-c", EMPTY, f"{interval_s}"], text=True))
        time.sleep(3)
        taken = [percents(processes, seconds) for _ in range(rounds)]
        middle = {name: statistics.median(each[name] for each in taken) for name in processes}
        recorders = [each["recorder"] - each["off"] for each in taken]
        in_memories = [each["without_black_box"] - each["off"] for each in taken]
        recorder = statistics.median(recorders)
        black_box = statistics.median(each["recorder"] - each["without_black_box"] for each in taken)
        return {
            "threads": threads,
            "interval_s": interval_s,
            "recorder_percent": round(recorder, 3),
            "recorder_spread_percent": spread(recorders, 3),
            "in_memory_percent": round(statistics.median(in_memories), 3),
            "in_memory_spread_percent": spread(in_memories, 3),
            "black_box_percent": round(black_box, 3),
            "idle_sidecar_percent": round(middle["off"], 3),
            "empty_wake_up_percent": round(middle["empty"], 3),
            "c_floor_percent": round(middle["floor"], 3),
            "recorder_to_floor": round(recorder / middle["floor"], 2),
            "trailing_ms": round(trailing_ms(url), 2),
        }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--interval", type=float, nargs="+", default=[1.0, 0.25])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs = build(Path(directory))
        for threads in arguments.threads:
            for interval_s in arguments.interval:
                line = compare(programs, threads, interval_s, seconds=arguments.seconds, rounds=arguments.rounds)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
