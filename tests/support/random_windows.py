"""
Take windows of targets with threads that act at random, and write them in the format of `oracle.py`.

    python random_windows.py PROGRAM WINDOWS SEED | python oracle.py

Every other target obeys commands and rests while it is read, so that its own clocks are the reference; the others run
freely, and are stopped and continued. Each snapshot ends several windows, which begin at earlier snapshots.
"""

import json
import random
import signal
import subprocess
import sys
from collections import deque
from contextlib import closing, suppress
from typing import Any

from vitalsd.contract.encoding import encode
from vitalsd.recording.history import history
from vitalsd.recording.series import Record
from vitalsd.snapshot import Part, Snapshot, measure
from vitalsd.sources.base import SourceError
from vitalsd.sources.linux.source import LinuxSource

SNAPSHOTS = 400
"""Number of snapshots of one target."""
WINDOWS = 12
"""Number of windows that end at one snapshot."""
BEGINNINGS = 60
"""Number of snapshots to keep as beginnings of windows."""


def put(kind: str, content: str = "") -> None:
    """Write a line of the format."""
    sys.stdout.write(f"{kind} {content}\n")


class Obedient:
    """Control a target that obeys commands."""

    def __init__(self, program: str, seed: int) -> None:
        self.process = subprocess.Popen(
            [program, "obey", str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._random = random.Random(seed)
        self._number = 0
        self.read()

    def read(self) -> int:
        """Write a line with its clocks, and return its number."""
        assert self.process.stdout is not None
        monotonic, cpu, executions, *threads = self.process.stdout.readline().split()
        found = {}
        for thread in threads:
            tid, cpu_ns, name = thread.split(":")
            found[tid] = [int(cpu_ns), bytes.fromhex(name).decode("utf-8", "backslashreplace")]
        self._number += 1
        put("T", json.dumps([self._number, int(monotonic), int(cpu), int(executions), found]))
        return self._number

    def step(self) -> int:
        """Send a random command, and return the number of the line with the clocks after it."""
        pick = self._random
        thread, kind = pick.randrange(-1, 12), pick.random()
        if kind < 0.40:
            command = f"burn {thread} {pick.choice((50, 300, 1000, 4000, 20_000))}"
        elif kind < 0.62:
            command = f"born {pick.choice((0, 100, 3000))}"
        elif kind < 0.76:
            command = f"exit {thread}"
        elif kind < 0.90:
            command = f"name {thread} " + pick.choice(("worker", "a) R 1 (", "b c", "(", ")", "Z 0"))
        elif kind < 0.93:
            command = f"exec {thread}"
        elif kind < 0.94:
            command = "leave"
        else:
            command = "rest"
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        return self.read()


class Free:
    """Control a target that runs freely."""

    def __init__(self, program: str, seed: int) -> None:
        self.process = subprocess.Popen([program, "free", str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._random = random.Random(seed)
        self._stopped = False

    def step(self) -> int:
        """Stop, continue or wait at random, and return -1."""
        if self._random.random() < 0.05:
            self._stopped = not self._stopped
            self.process.send_signal(signal.SIGSTOP if self._stopped else signal.SIGCONT)
        if self._random.random() < 0.3:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self._random.random() * 0.004)
        return -1


def windows_of(target: Obedient | Free, pick: random.Random, wanted: int) -> int:
    """Write windows of one target, and the table of its record; return how many windows."""
    put("N")
    taken: deque[tuple[int, Snapshot]] = deque(maxlen=BEGINNINGS)
    written = 0
    with closing(LinuxSource(target.process.pid, fd_budget=pick.choice((0, 4, 500)))) as source:
        record = Record(source.identity(), interval_ns=1_000_000)
        for _ in range(SNAPSHOTS):
            number = target.step()
            named, parts = pick.random() < 0.7, Part.DETAIL if pick.random() < 0.3 else Part.NONE
            snapshot = source.snapshot(parts=parts, names=named)
            record.append(snapshot)
            for first_number, first in pick.sample(list(taken), min(len(taken), WINDOWS)):
                if written < wanted:
                    written += 1
                    write(source, (first_number, first), (number, snapshot), named=named, basic=pick.random() < 0.2)
            taken.append((number, snapshot))
    put("H", history(record, top=100).to_json().decode())
    put("H", history(record, top=100, step_ns=20_000_000).to_json().decode())
    return written


def write(
    source: LinuxSource, first: tuple[int, Snapshot], last: tuple[int, Snapshot], *, named: bool, basic: bool
) -> None:
    """Write the line of one window."""
    m = measure(first[1], last[1])

    def answer(detail: Any) -> str:
        return encode(m, source.identity(), requested_ms=1, detail=detail).decode()

    put("W", f"[{first[0]},{last[0]},{json.dumps(named)},{answer('full')},{answer('basic') if basic else 'null'}]")


def main() -> None:
    """Run the command line."""
    program, wanted, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    pick = random.Random(seed)
    written = 0
    while written < wanted:
        seed += 1
        target: Obedient | Free = (Obedient if seed % 2 else Free)(program, seed)
        try:
            written += windows_of(target, pick, wanted - written)
        except SourceError as error:
            said = f"target {seed}, with status {target.process.poll()}: {type(error).__name__}: {error}"
            raise SystemExit(said) from None
        finally:
            target.process.kill()
            target.process.communicate()
        print(f"{written} windows", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
