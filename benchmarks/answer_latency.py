"""
Measure how long after the end of its window an answer arrives, over a real socket.

Compared with a program that calls ``psutil.Process.threads()``, sleeps and calls it again, and reads the name of each
thread from ``/proc``. Both take turns in one run, so that a busy machine slows both. Latency is the time until the
answer is complete, less the window.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

TARGET = """
import threading
for i in range({threads} - 1):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def by_hand(process: psutil.Process, window_ms: int) -> bytes:
    """Return the same figures through psutil, as JSON."""
    before = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    begun = time.monotonic()
    time.sleep(window_ms / 1000)
    after = process.threads()
    elapsed = time.monotonic() - begun
    threads = [
        {
            "tid": thread.id,
            "name": Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().rstrip("\n"),
            "cpu_percent": 100 * (thread.user_time + thread.system_time - before.get(thread.id, 0)) / elapsed,
        }
        for thread in after
    ]
    memory = process.memory_info()
    return json.dumps({"rss_kb": memory.rss // 1024, "threads": threads}).encode()


def late_ms(ask: Callable[[], object], window_ms: int) -> float:
    """Return the latency of one answer beyond its window, ms."""
    begun = time.perf_counter()
    ask()
    return (time.perf_counter() - begun) * 1000 - window_ms


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=50)
    parser.add_argument("--window-ms", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()

    target = subprocess.Popen(
        [sys.executable, "-c", TARGET.format(threads=options.threads)], stdout=subprocess.PIPE, text=True
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "vitalsd", "serve", "--port", "0", "--no-black-box", "--pid", str(target.pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert target.stdout is not None
        assert server.stderr is not None
        target.stdout.readline()
        line = server.stderr.readline()
        while not (found := re.search(r"http://\S+", line)):
            assert line, "vitalsd ended"
            line = server.stderr.readline()
        url = found[0]
        process = psutil.Process(target.pid)
        ours: list[float] = []
        theirs: list[float] = []
        with httpx.Client(trust_env=False, timeout=90) as client:
            for _ in range(options.rounds + 3):
                ours.append(
                    late_ms(
                        lambda: client.get(url, params={"window_ms": options.window_ms}).raise_for_status(),
                        options.window_ms,
                    )
                )
                theirs.append(late_ms(lambda: by_hand(process, options.window_ms), options.window_ms))
        # The first rounds open connections and descriptors.
        ours, theirs = ours[3:], theirs[3:]
    finally:
        server.terminate()
        target.kill()
        server.wait()
        target.wait()

    print(f"{options.threads} threads, window {options.window_ms} ms, {options.rounds} rounds each, in turn")
    for name, figures in (("vitalsd over HTTP", ours), ("psutil and sleep, in-process", theirs)):
        print(f"  {name:30} late by {statistics.median(figures):6.2f} ms median, {max(figures):6.2f} ms worst")
    print(f"  ratio of the medians: {statistics.median(ours) / statistics.median(theirs):.2f}")


if __name__ == "__main__":
    main()
