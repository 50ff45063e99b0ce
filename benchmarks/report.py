"""
Measure how long a bug report takes, from the call to the zip on the disk.

Compared with a program that sleeps through its window of 2 s between two snapshots and then writes. Both take turns in
one run, in a process of ``--threads`` threads that a warm sidecar records. The first report of a process is shown
apart, because it loads modules that the later ones have.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vitalsd_client import BugReport, fetch

WINDOW_MS = 2000


def took_ms(call: Callable[[], object]) -> float:
    """Return the time of a call, ms."""
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1000


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-s", type=float, default=10, help="what the recorder has before the first report, s")
    options = parser.parse_args()

    for _ in range(options.threads - 1):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="v") as scratch:
        os.environ |= {"VITALSD_RUNTIME_DIR": f"{scratch}/run", "VITALSD_STATE_DIR": f"{scratch}/state"}
        sidecar = subprocess.Popen(
            [sys.executable, "-m", "vitalsd", "serve", "--port", "0", "--pid", str(os.getpid())],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert sidecar.stderr is not None
            sidecar.stderr.readline()
            time.sleep(options.warm_s)
            run(Path(scratch), options.threads, options.rounds)
        finally:
            sidecar.terminate()
            sidecar.wait()


def run(scratch: Path, threads: int, rounds: int) -> None:
    """Measure in a process of `threads` threads, and print the result."""

    def report() -> None:
        made = BugReport("ryll", window_ms=WINDOW_MS)
        path = made.save(scratch)
        assert "runtime-history.json" in made.preview(), made.preview()
        path.unlink()

    def waiting() -> None:
        made = BugReport("ryll", window_ms=WINDOW_MS, mode="wait")
        made.save(scratch).unlink()

    first_ms = took_ms(report)
    ours, theirs, answers = [], [], []
    for i in range(rounds):
        ours.append(took_ms(report))
        answers.append(took_ms(lambda: fetch(WINDOW_MS)))
        if i < max(1, rounds // 5):  # it is the sleep that is long
            theirs.append(took_ms(waiting))
    print(f"{threads} threads, window {WINDOW_MS} ms, {rounds} reports")
    print(f"  the first report of the process {first_ms:8.1f} ms")
    for name, figures in (("call to zip", ours), ("call to zip, waiting", theirs), ("fetch alone", answers)):
        print(f"  {name:31} {statistics.median(figures):8.1f} ms median, {max(figures):8.1f} ms worst")
    print(f"  ratio of the medians: {statistics.median(ours) / statistics.median(theirs):.3f}")


if __name__ == "__main__":
    main()
