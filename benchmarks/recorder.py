"""
What recording costs: CPU of a sidecar with the recorder on, beside one with it off, in one run.

    python benchmarks/recorder.py [--seconds 20] [--threads 50 1000] [--interval 1.0 0.25]

Both sidecars watch the same target at the same time, so whatever the machine does they share. Figures
are percent of one core, from the process CPU clock of each sidecar. The black box is on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import httpx

TARGET = """
import sys, threading, time
def idle():
    time.sleep(3600)
def busy():
    while True:
        end = time.thread_time() + 0.0001
        while time.thread_time() < end: pass
        time.sleep(0.02)
threading.stack_size(65536)
for number in range(int(sys.argv[1]) - 1):
    threading.Thread(target=busy if number < 4 else idle, daemon=True).start()
print("ready", flush=True)
time.sleep(3600)
"""


def sidecar(pid: int, interval_s: float, state: str) -> tuple[subprocess.Popen[str], str]:
    """A sidecar watching `pid`, and its address."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vitalsd",
            "serve",
            "--pid",
            str(pid),
            "--port",
            "0",
            "--record-interval",
            f"{interval_s}",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": state, "VITALSD_STATE_DIR": state, "VITALSD_RUNTIME_DIR": state},
    )
    assert process.stderr is not None
    return process, "http://" + process.stderr.readline().split("http://")[1].split("/")[0]


def cpu_ns(pid: int) -> int:
    """CPU time of a process, ns (Linux: its CPU clock)."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def trailing_ms(url: str, count: int = 200) -> float:
    """Median time of a trailing answer, ms."""
    took = []
    with httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(count):
            begun = time.perf_counter()
            client.get("/metrics", params={"mode": "trailing", "window_ms": 2000}).raise_for_status()
            took.append((time.perf_counter() - begun) * 1000)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--interval", type=float, nargs="+", default=[1.0, 0.25])
    arguments = parser.parse_args()
    for threads in arguments.threads:
        target = subprocess.Popen([sys.executable, "-c", TARGET, str(threads)], stdout=subprocess.PIPE, text=True)
        assert target.stdout is not None
        target.stdout.readline()
        for interval_s in arguments.interval:
            with tempfile.TemporaryDirectory() as state:
                (on, url), (off, _) = sidecar(target.pid, interval_s, state), sidecar(target.pid, 0, state)
                time.sleep(2)
                before = cpu_ns(on.pid), cpu_ns(off.pid), time.monotonic_ns()
                time.sleep(arguments.seconds)
                after = cpu_ns(on.pid), cpu_ns(off.pid), time.monotonic_ns()
                elapsed = after[2] - before[2]
                percent_on, percent_off = (100 * (after[i] - before[i]) / elapsed for i in (0, 1))
                result = {
                    "threads": threads,
                    "interval_s": interval_s,
                    "on_percent": round(percent_on, 3),
                    "off_percent": round(percent_off, 3),
                    "recorder_percent": round(percent_on - percent_off, 3),
                    "trailing_ms": round(trailing_ms(url), 2),
                }
                print(json.dumps(result), flush=True)
                for process in (on, off):
                    process.terminate()
                    process.wait()
        target.kill()
        target.wait()


if __name__ == "__main__":
    main()
