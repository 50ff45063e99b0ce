"""
What a macOS snapshot of 1000 threads costs in Python, in units of one bare ctypes call.

    python benchmarks/darwin_snapshot.py [--threads N] [--rounds N]

Runs over the simulated libSystem, so on Linux. The goal (docs/macos.md): per thread at most four bare
calls of the signature of ``thread_info``, that is the three calls a thread needs (two readings and a
release) and one for all the bookkeeping. What the simulated kernel itself costs is measured by the
same loop in C, and subtracted. The rounds of all measurements are interleaved, and the best of each
counts: on a shared machine everything else is somebody else's time.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from darwin.simulator import Simulator, build
from vitalsd.sources.libsystem import FUNCTIONS
from vitalsd.sources.mach import MachSource

GOAL = 4.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        simulator = Simulator(build(Path(directory)), Path(directory))
        return measure(simulator, arguments.threads, arguments.rounds)


def measure(simulator: Simulator, threads: int, rounds: int) -> int:
    source = MachSource(lib=simulator.lib)
    simulator.hide_real_threads()
    for i in range(threads):
        simulator.add_thread((1 << 40) + i, user_ns=i * 1000, system_ns=i * 1000, name=f"worker {i}".encode())
    assert len(source.snapshot().tids) == threads
    nothing = ctypes.PyDLL(simulator.path).sim_nothing
    nothing.argtypes, nothing.restype = FUNCTIONS["thread_info"].argtypes, FUNCTIONS["thread_info"].restype
    nothing_in_c = simulator.function("sim_nothing_cost_in_c")
    snapshot_in_c = simulator.function("sim_cost_in_c")
    calls = range(3 * threads)

    def bare_calls() -> int:
        # As thread_info: a port, a flavor, and two addresses.
        address = 0x7000_0000_0000
        begun = time.perf_counter_ns()
        for _ in calls:
            nothing(0x1103, 5, address, address)
        return time.perf_counter_ns() - begun

    def empty_loop() -> int:
        begun = time.perf_counter_ns()
        for _ in calls:
            pass
        return time.perf_counter_ns() - begun

    def snapshot() -> int:
        begun = time.perf_counter_ns()
        source.snapshot()
        return time.perf_counter_ns() - begun

    def changing_snapshot() -> int:
        for i in range(0, threads, 10):
            simulator.advance_thread((1 << 40) + i, user_ns=1000)
        return snapshot()

    best: dict[str, int] = {}
    kinds: dict[str, Callable[[], int]] = {
        "bare": bare_calls,
        "loop": empty_loop,
        "c": snapshot_in_c,
        "python": snapshot,
        "changing": changing_snapshot,
        "nothing": lambda: int(nothing_in_c(3 * threads)),
    }
    gc.disable()
    for _ in range(rounds):
        for kind, run in kinds.items():
            ns = run()
            best[kind] = min(ns, best.get(kind, ns))
    bare_ns = (best["bare"] - best["loop"] - best["nothing"]) / len(calls)
    ours_ns = (best["python"] - best["c"]) / threads
    changing_ns = (best["changing"] - best["c"]) / threads
    print(f"snapshot of {threads} threads           {best['python'] / 1e3:8.0f} µs")
    print(f"  of that the simulated kernel     {best['c'] / 1e3:8.0f} µs")
    print(f"  per thread, ours                 {ours_ns:8.0f} ns")
    print(f"one bare ctypes call               {bare_ns:8.0f} ns")
    print(f"per thread, in bare calls          {ours_ns / bare_ns:8.2f}    goal: at most {GOAL:.0f}")
    print(f"  with a tenth of them running     {changing_ns / bare_ns:8.2f}")
    return ours_ns > GOAL * bare_ns


if __name__ == "__main__":
    sys.exit(main())
