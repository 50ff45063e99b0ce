"""
What a snapshot of another Linux process costs, beside the C floor, psutil and a naive reader in Rust.

    python benchmarks/sampling.py [--threads 100 1000] [--rounds 40] [--busy 4]

All contenders watch one target and take turns, snapshot by snapshot, pinned to one CPU. Warm is back to
back; cold is after 100 ms of rest, as in a recorder, when each thread's state is out of cache. Figures
are medians of CPU time. The last line is the worst case of what the recorder does: every thread runs once a
second, so that it can hardly ever be proved that most of them did not.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spread import spread

HERE = Path(__file__).parent
NATIVE = HERE / "native"
REST_S = 0.1


def compiler() -> list[str]:
    return ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]


def build(directory: Path) -> dict[str, Path]:
    """The native programs; the one in Rust only where rustc is."""
    built = {}
    for name in ("target", "floor", "duty"):
        built[name] = directory / name
        subprocess.run([*compiler(), "-O2", "-pthread", "-o", built[name], NATIVE / f"{name}.c"], check=True)
    if shutil.which("rustc"):
        built["naive"] = directory / "naive"
        subprocess.run(["rustc", "-O", "-o", built["naive"], NATIVE / "naive.rs"], check=True)
    return built


def build_library(directory: Path, name: str) -> Path:
    """One of the native programs as a shared library, whose `main` another program can call."""
    library = directory / f"{name}.so"
    options = ("-O2", "-pthread", "-shared", "-fPIC")
    subprocess.run([*compiler(), *options, "-o", library, NATIVE / f"{name}.c"], check=True)
    return library


class Contender:
    """A program that takes a snapshot when told to."""

    def __init__(self, command: list[str]) -> None:
        cpu = max(os.sched_getaffinity(0))  # type: ignore[attr-defined, unused-ignore]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),  # type: ignore[attr-defined, unused-ignore]
        )
        self.taken: dict[str, list[int]] = {"warm": [], "cold": []}
        self.snapshot()

    def snapshot(self) -> int:
        """CPU time of one snapshot, ns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def compare(
    programs: dict[str, Path], threads: int, busy: int, rounds: int, *, period_us: int = 20_000
) -> dict[str, object]:
    """Median and spread in µs of each contender, and the ratios of medians to the floor and to vitalsd."""
    target = subprocess.Popen(
        [programs["target"], str(threads), str(busy), "100", str(period_us)], stdout=subprocess.PIPE, text=True
    )
    assert target.stdout is not None
    pid = target.stdout.readline().strip()
    python = [sys.executable, str(HERE / "contender.py")]
    contenders = {
        "floor": Contender([str(programs["floor"]), pid]),
        "full": Contender([*python, "full", pid]),
        "product": Contender([*python, "product", pid]),
        "psutil": Contender([*python, "psutil", pid]),
    }
    if "naive" in programs:
        contenders["rust"] = Contender([str(programs["naive"]), pid])
    for _ in range(rounds):
        for contender in contenders.values():
            time.sleep(REST_S)
            contender.taken["cold"].append(contender.snapshot())
            contender.taken["warm"] += [contender.snapshot() for _ in range(3)]
    target.kill()
    target.wait()
    result: dict[str, object] = {"threads": threads, "busy": busy, "rounds": rounds}
    for heat in ("warm", "cold"):
        medians = {name: statistics.median(contender.taken[heat]) / 1000 for name, contender in contenders.items()}
        spreads = {name: spread(contender.taken[heat]) / 1000 for name, contender in contenders.items()}
        result[heat] = {
            **{f"{name}_us": round(value, 1) for name, value in medians.items()},
            **{f"{name}_spread_us": round(value, 1) for name, value in spreads.items()},
            "full_to_floor": round(medians["full"] / medians["floor"], 2),
            "product_to_floor": round(medians["product"] / medians["floor"], 2),
            "product_to_full": round(medians["product"] / medians["full"], 2),
            "psutil_to_full": round(medians["psutil"] / medians["full"], 1),
            "rust_to_full": round(medians["rust"] / medians["full"], 1) if "rust" in medians else None,
        }
    for contender in contenders.values():
        contender.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs = build(Path(directory))
        for threads in arguments.threads:
            print(json.dumps(compare(programs, threads, arguments.busy, arguments.rounds)), flush=True)
        most = max(arguments.threads)
        print(json.dumps(compare(programs, most, most - 1, arguments.rounds, period_us=1_000_000)), flush=True)


if __name__ == "__main__":
    main()
