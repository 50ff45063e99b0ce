"""
Measure the delay of a program with a user interface: how long calls block, the gaps of its event loop, its exit.

    python benchmarks/gui.py [--rounds 20] [--call mark]

A process has an event loop with a timer of 5 ms in the main thread. It makes one call on another thread, and the
figure is the longest time between two ticks, less 5 ms: imports and the interpreter lock delay the loop although the
call is elsewhere. In another process it makes the call in the loop itself, and the figure is the time for which the
call blocks. `nothing` is the same process without a call, in the same rounds: the delay of the machine. With PySide6
the loop is that of Qt, offscreen; otherwise it is asyncio's. `exit_ms` is from the last statement of the program to
its end as its parent sees it. Medians of the rounds, and their interquartile range.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from spread import spread

SETUP = {"fetch": "vitalsd.spawn(port=0)", "report": "vitalsd.spawn(port=0)", "mark": "vitalsd.spawn(port=0)"}
"""Statements that run in the loop before a call and are not measured."""
CALLS: Mapping[str, str] = {
    "nothing": "None",
    "start": "vitalsd.start(port=0)",
    "spawn": "vitalsd.spawn(port=0)",
    "mark": "vitalsd_client.mark('clicked')",
    "fetch": "vitalsd_client.fetch(window_ms=500)",
    "report": "vitalsd_client.BugReport('viewer', window_ms=500).save('.')",
}
WHERE = ("thread", "loop")

HOST = """
import sys, threading, time
call, setup, where, toolkit = sys.argv[1:]
import vitalsd, vitalsd_client
kept = [eval(setup)]
ticks, took, over = [], [], []
def work():
    begin = time.perf_counter()
    kept.append(eval(call))
    took.append(time.perf_counter() - begin)
def begin():
    if where == "loop":
        work()
    else:
        threading.Thread(target=work, daemon=True).start()
def tick():
    ticks.append(time.perf_counter())
    if len(ticks) == 60:
        begin()
    # A while after the call is over, what it started still runs.
    return bool(took) and len(ticks) > 60 and ticks[-1] - ticks[59] > took[0] + 0.7
if toolkit == "qt":
    from PySide6.QtCore import QCoreApplication, QTimer, Qt
    app = QCoreApplication([])
    timer = QTimer(timerType=Qt.TimerType.PreciseTimer, interval=5)
    timer.timeout.connect(lambda: app.quit() if tick() else None)
    timer.start()
    app.exec()
else:
    import asyncio
    async def main():
        while not tick():
            await asyncio.sleep(0.005)
    asyncio.run(main())
gaps = [later - earlier for earlier, later in zip(ticks[55:], ticks[56:])]
print(1000 * took[0], 1000 * max(gaps) - 5, time.time(), flush=True)
"""


def once(call: str, where: str, toolkit: str) -> tuple[float, float, float]:
    """Return how long the call took, the longest gap of the loop less its interval, and the exit, all in ms."""
    with tempfile.TemporaryDirectory() as state:
        done = subprocess.run(
            [sys.executable, "-c", HOST, CALLS[call], SETUP.get(call, "None"), where, toolkit],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=state,
            env={
                **os.environ,
                "HOME": state,
                "VITALSD_STATE_DIR": state,
                "VITALSD_RUNTIME_DIR": state,
                "QT_QPA_PLATFORM": "offscreen",
            },
        )
        ended = time.time()
        took, gap, at = map(float, done.stdout.split())
        stop_sidecars(Path(state))
    return took, gap, 1000 * (ended - at)


def stop_sidecars(runtime: Path) -> None:
    """End the sidecars that a program left behind, or the next one shares the machine with them."""
    from vitalsd.discovery.runtime_file import discover

    for each in discover(directories=[runtime]):
        os.kill(each.pid, signal.SIGTERM)
    while discover(directories=[runtime]):
        time.sleep(0.02)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--call", choices=CALLS, action="append", help="this one alone, beside nothing; may be repeated"
    )
    arguments = parser.parse_args()
    rounds, calls = arguments.rounds, {"nothing", *(arguments.call or CALLS)}
    toolkit = "qt" if importlib.util.find_spec("PySide6") else "asyncio"
    taken: dict[tuple[str, str], list[tuple[float, float, float]]] = {
        (call, where): [] for call in CALLS for where in WHERE if call in calls and (call, where) != ("nothing", "loop")
    }
    for number in range(rounds + 1):
        for (call, where), values in taken.items():
            result = once(call, where, toolkit)
            if number:  # the first of each warms the page cache
                values.append(result)
    for (call, where), values in taken.items():
        took, gaps, exits = ([row[column] for row in values] for column in range(3))
        print(
            json.dumps(
                {
                    "loop": toolkit,
                    "call": call,
                    "made_in": where,
                    "rounds": rounds,
                    "call_ms": round(statistics.median(took), 1),
                    "call_spread_ms": spread(took, 1),
                    "longest_gap_ms": round(statistics.median(gaps), 1),
                    "longest_gap_spread_ms": spread(gaps, 1),
                    "exit_ms": round(statistics.median(exits), 1),
                    "exit_spread_ms": spread(exits, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
