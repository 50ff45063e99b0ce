"""
Measure Python's share of a macOS snapshot of 1000 threads, in units of one bare ctypes call.

    python benchmarks/darwin_snapshot.py [--threads N] [--rounds N]

Compared with a snapshot as ctypes is usually written: a structure and a counter per call, thread after thread. Runs
over the simulated libSystem, so on Linux. The goal (docs/macos-proof.md): per thread at most four bare calls with the
signature of ``thread_info``, three for the calls that a thread needs (two readings and a release) and one for all the
rest. A bare call has ``argtypes``; the source does without, which halves the cost. The cost of the simulated kernel is
measured by the same loop in C and subtracted. Rounds are interleaved, and the best round of each counts, because the
machine is shared.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.darwin.simulator import Simulator, build
from vitalsd.sources.darwin.apple_headers import (
    KERN_SUCCESS,
    THREAD_EXTENDED_INFO,
    THREAD_IDENTIFIER_INFO,
    thread_extended_info,
    thread_identifier_info,
)
from vitalsd.sources.darwin.functions import FUNCTIONS
from vitalsd.sources.darwin.mach_source import MachSource


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        simulator = Simulator(build(Path(directory)), Path(directory))
        print(json.dumps(measure(simulator, arguments.threads, arguments.rounds)))


def by_hand(path: str) -> dict[int, tuple[str, int, int]]:
    """Return name, CPU time in ns and state of each thread of this process, by id."""
    library = ctypes.PyDLL(path)
    task = ctypes.c_uint32.in_dll(library, "mach_task_self_")
    ports = ctypes.POINTER(ctypes.c_uint32)()
    number = ctypes.c_uint32()
    library.task_threads(task, ctypes.byref(ports), ctypes.byref(number))
    threads = {}
    for i in range(number.value):
        info, identifier = thread_extended_info(), thread_identifier_info()
        count = ctypes.c_uint32(ctypes.sizeof(info) // 4)
        code = library.thread_info(ports[i], THREAD_EXTENDED_INFO, ctypes.byref(info), ctypes.byref(count))
        count = ctypes.c_uint32(ctypes.sizeof(identifier) // 4)
        id_code = library.thread_info(ports[i], THREAD_IDENTIFIER_INFO, ctypes.byref(identifier), ctypes.byref(count))
        library.mach_port_deallocate(task, ports[i])
        if code == id_code == KERN_SUCCESS:
            cpu_ns = info.pth_user_time + info.pth_system_time
            threads[identifier.thread_id] = (info.pth_name.decode(errors="replace"), cpu_ns, info.pth_run_state)
    address = ctypes.c_size_t(ctypes.cast(ports, ctypes.c_void_p).value or 0)
    library.vm_deallocate(task, address, ctypes.c_size_t(4 * number.value))
    return threads


def measure(simulator: Simulator, threads: int, rounds: int) -> dict[str, float]:
    """Return the costs of a snapshot as multiples of a bare call, from the best rounds."""
    source = MachSource(lib=simulator.lib)
    simulator.hide_real_threads()
    for i in range(threads):
        simulator.add_thread((1 << 40) + i, user_ns=i * 1000, system_ns=i * 1000, name=f"worker {i}".encode())
    ours, plain = source.snapshot(), by_hand(simulator.path)
    assert list(plain.values()) == list(
        zip(ours.roster.names, ours.thread_cpu_ns, (each[2] for each in plain.values()), strict=True)
    )
    assert len(ours.roster) == threads
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

    def plain_snapshot() -> int:
        begun = time.perf_counter_ns()
        by_hand(simulator.path)
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
        "by_hand": plain_snapshot,
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
    by_hand_ns = (best["by_hand"] - best["c"]) / threads
    return {
        "threads": threads,
        "snapshot_us": round(best["python"] / 1e3),
        "of_that_the_kernel_us": round(best["c"] / 1e3),
        "ours_a_thread_ns": round(ours_ns),
        "by_hand_a_thread_ns": round(by_hand_ns),
        "bare_call_ns": round(bare_ns),
        "ours_to_bare_call": round(ours_ns / bare_ns, 2),
        "a_tenth_running_to_bare_call": round(changing_ns / bare_ns, 2),
        "by_hand_to_ours": round(by_hand_ns / ours_ns, 1),
    }


if __name__ == "__main__":
    main()
