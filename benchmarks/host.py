"""
Measure how much a sidecar inside a busy Python program slows it down, at one snapshot a second with 50 threads.

    python benchmarks/host.py [--rounds 6] [--seconds 5] [--threads 50]

A thread that never stops computing loses time only while it waits for the interpreter lock. The kernel reports that
time: elapsed time, less the time that it ran or was ready to run (/proc/self/task/TID/schedstat). So the figure is
exact, while the throughput of two runs differs by several percent for other reasons. With a sidecar inside and with it
stopped, in turn; medians. `sidecar_cpu_percent` is the CPU of the sidecar's threads, percent of one core.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

HOST = """
import json, sys, threading, time
import vitalsd
threading.stack_size(262144)
for number in range(int(sys.argv[1]) - 1):
    threading.Thread(target=threading.Event().wait, name=f"idle {number}", daemon=True).start()
me = threading.get_native_id()
def blocked():
    with open(f"/proc/self/task/{me}/schedstat") as file:
        ran, ready, _ = map(int, file.read().split())
    return time.perf_counter_ns() - ran - ready
def turn():
    total = number = 0
    begun, waited, cpu, mine = time.perf_counter_ns(), blocked(), time.process_time_ns(), time.thread_time_ns()
    while time.perf_counter_ns() - begun < float(sys.argv[3]) * 1e9:
        for number in range(20000):
            total += number * number % 7
    elapsed = time.perf_counter_ns() - begun
    others = time.process_time_ns() - cpu - (time.thread_time_ns() - mine)
    return 100 * (blocked() - waited) / elapsed, 100 * others / elapsed
vitalsd.start(port=0).stop()
turn()
for number in range(int(sys.argv[2])):
    without = turn()
    with vitalsd.start(port=0):
        time.sleep(0.5)
        inside = turn()
    print(json.dumps([inside, without]), flush=True)
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--threads", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        words = [str(arguments.threads), str(arguments.rounds), str(arguments.seconds)]
        done = subprocess.run(
            [sys.executable, "-c", HOST, *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={"PATH": "/usr/bin:/bin", "HOME": state, "VITALSD_STATE_DIR": state, "VITALSD_RUNTIME_DIR": state},
        )
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    result = {
        "threads": arguments.threads,
        "interval_s": 1.0,
        "slowdown_percent": round(statistics.median(inside[0] - without[0] for inside, without in pairs), 3),
        "worst_percent": round(max(inside[0] - without[0] for inside, without in pairs), 3),
        "sidecar_cpu_percent": round(statistics.median(inside[1] for inside, _ in pairs), 3),
        "blocked_without_percent": round(statistics.median(without[0] for _, without in pairs), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
