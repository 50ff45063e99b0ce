"""
Measure a snapshot of another Linux process, beside the C floor, psutil and a simple reader in Rust.

    python benchmarks/sampling.py [--threads 100 1000] [--rounds 20] [--busy 4]

All contenders watch one target and take turns, some snapshots each, pinned to one CPU. Warm is back to back. Cold is
after 100 ms of rest, as in a recorder, when the state of each thread is out of cache. Each contender takes four cold
snapshots in a row, because a recorder does some work once a second and not at each of its four beats; a snapshot that
always does that work is `full_with_names`. Figures are medians of CPU time, ratios the medians of the ratios within a
round, because the load of the machine changes and affects neighbours alike. The last line is the worst case of the
recorder: every thread runs once a second and between any two snapshots, so nothing proves that most of them did not.
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
from collections.abc import Mapping
from pathlib import Path

from spread import spread

HERE = Path(__file__).parent
NATIVE = HERE / "native"
REST_S, COLD, WARM = 0.1, 4, 6


def compiler() -> list[str]:
    """Return the command of the C compiler: cc, else that of the ziglang package."""
    return ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]


def build(directory: Path) -> dict[str, Path]:
    """Build the native programs; the one in Rust only where rustc works: rustup's needs a toolchain."""
    built = {}
    for name in ("target", "floor", "duty"):
        built[name] = directory / name
        subprocess.run([*compiler(), "-O2", "-pthread", "-o", built[name], NATIVE / f"{name}.c"], check=True)
    if shutil.which("rustc") and subprocess.run(["rustc", "--version"], capture_output=True).returncode == 0:
        built["naive"] = directory / "naive"
        subprocess.run(["rustc", "-O", "-o", built["naive"], NATIVE / "naive.rs"], check=True)
    return built


def build_library(directory: Path, name: str) -> Path:
    """Return a native program as a shared library, with a `main` that another program can call."""
    library = directory / f"{name}.so"
    options = ("-O2", "-pthread", "-shared", "-fPIC")
    subprocess.run([*compiler(), *options, "-o", library, NATIVE / f"{name}.c"], check=True)
    return library


class Contender:
    """Run a program that takes a snapshot on request, and keep the CPU times."""

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
        self.rounds: dict[str, list[list[int]]] = {"warm": [], "cold": []}
        self.snapshot()

    def snapshot(self) -> int:
        """Return the CPU time of one snapshot, ns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def take(self, rest_s: float, cold: int) -> None:
        """Run one round: the cold snapshots, then the warm ones."""
        self.rounds["cold"].append([])
        for _ in range(cold):
            time.sleep(rest_s)
            self.rounds["cold"][-1].append(self.snapshot())
        self.rounds["warm"].append([self.snapshot() for _ in range(WARM)])

    def ratio(self, other: "Contender", heat: str) -> float:
        """Return the CPU time as a multiple of that of `other`."""
        rounds = zip(self.rounds[heat], other.rounds[heat], strict=True)
        return statistics.median(statistics.median(own) / statistics.median(others) for own, others in rounds)

    def close(self) -> None:
        """End the program."""
        self.process.communicate()


def compare(
    programs: Mapping[str, Path],
    threads: int,
    busy: int,
    rounds: int,
    *,
    period_us: int = 20_000,
    rest_s: float = REST_S,
    cold: int = COLD,
) -> dict[str, object]:
    """Return median and spread in µs of each contender, and the ratios to the floor and to vitalsd."""
    target = subprocess.Popen(
        [programs["target"], str(threads), str(busy), "100", str(period_us)], stdout=subprocess.PIPE, text=True
    )
    assert target.stdout is not None
    pid = target.stdout.readline().strip()
    python = [sys.executable, str(HERE / "contender.py")]
    floor = Contender([str(programs["floor"]), pid])
    full = Contender([*python, "full", pid])
    with_names = Contender([*python, "full_with_names", pid])
    product = Contender([*python, "product", pid])
    psutil = Contender([*python, "psutil", pid])
    rust = Contender([str(programs["naive"]), pid]) if "naive" in programs else None
    contenders = {
        "floor": floor,
        "full": full,
        "full_with_names": with_names,
        "product": product,
        "psutil": psutil,
        **({"rust": rust} if rust else {}),
    }
    for _ in range(rounds):
        for contender in contenders.values():
            contender.take(rest_s, cold)
    target.kill()
    target.wait()
    result: dict[str, object] = {"threads": threads, "busy": busy, "rounds": rounds}
    for heat in ("warm", "cold"):
        taken = {name: [ns / 1000 for each in one.rounds[heat] for ns in each] for name, one in contenders.items()}
        result[heat] = {
            **{f"{name}_us": round(statistics.median(each), 1) for name, each in taken.items()},
            **{f"{name}_spread_us": spread(each, 1) for name, each in taken.items()},
            "full_to_floor": round(full.ratio(floor, heat), 2),
            "full_with_names_to_floor": round(with_names.ratio(floor, heat), 2),
            "product_to_floor": round(product.ratio(floor, heat), 2),
            "product_to_full": round(product.ratio(full, heat), 2),
            "psutil_to_full": round(psutil.ratio(full, heat), 1),
            "rust_to_full": round(rust.ratio(full, heat), 1) if rust else None,
        }
    for contender in contenders.values():
        contender.close()
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs = build(Path(directory))
        for threads in arguments.threads:
            print(json.dumps(compare(programs, threads, arguments.busy, arguments.rounds)), flush=True)
        most = max(arguments.threads)
        # With one each and longer rests, a turn takes over a second: each contender finds that every thread has run.
        worst = compare(programs, most, most - 1, arguments.rounds, period_us=1_000_000, rest_s=2 * REST_S, cold=1)
        print(json.dumps(worst), flush=True)


if __name__ == "__main__":
    main()
