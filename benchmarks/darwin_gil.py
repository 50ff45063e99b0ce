"""
Measure whether a Mach call should release the interpreter lock, over the simulator, beside a thread that computes.

    python benchmarks/darwin_gil.py [--threads 50] [--rounds 200]

`kept` is the source as it is: the short calls on the own task keep the lock (ctypes.PyDLL). In `released`, every call
releases it (ctypes.CDLL, the default). To take it again may need the switch interval of 5 ms, if the other thread
wakes up in time to take it. Wall time of a snapshot, in turns: median, and the longest of each.
"""

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.darwin.simulator import Simulator, build
from vitalsd.sources.darwin.libsystem import load
from vitalsd.sources.darwin.mach_source import MachSource


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    end = threading.Event()

    def compute() -> None:
        while not end.is_set():
            sum(range(1000))

    with tempfile.TemporaryDirectory() as directory:
        simulator = Simulator(build(Path(directory)), Path(directory))
        simulator.hide_real_threads()
        for i in range(arguments.threads):
            simulator.add_thread((1 << 40) + i, user_ns=i * 1000, system_ns=i * 1000, name=f"worker {i}".encode())
        with patch.object(ctypes, "PyDLL", ctypes.CDLL):
            released = load(str(simulator.path))
        sources = {"kept": MachSource(lib=simulator.lib), "released": MachSource(lib=released)}
        taken: dict[str, dict[str, list[float]]] = {"idle": {}, "beside_a_busy_thread": {}}
        for beside, figures in taken.items():
            if beside != "idle":
                threading.Thread(target=compute, daemon=True).start()
            for _ in range(arguments.rounds):
                for name, source in sources.items():
                    begun = time.perf_counter()
                    source.snapshot()
                    figures.setdefault(name, []).append((time.perf_counter() - begun) * 1000)
        end.set()
    result: dict[str, object] = {"threads": arguments.threads}
    for beside, figures in taken.items():
        medians = {name: statistics.median(values) for name, values in figures.items()}
        result[beside] = {f"{name}_ms": round(value, 3) for name, value in medians.items()} | {
            "released_to_kept": round(medians["released"] / medians["kept"], 1),
            "worst_ms": {name: round(max(values), 1) for name, values in figures.items()},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
