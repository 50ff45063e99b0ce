"""
Burn a known part of a core with threads that record their CPU time by their own CPU clocks.

Readings are compared with this record and not with the requested part, which a thread does not get on a busy machine.
A CPU clock never goes back, so the last entry before an instant and the first one after it are bounds of the CPU time
that the thread had used then, however it was scheduled.

`CpuLoadProcess` burns in a process of its own, ``vitalsd burn``: it obeys words on standard input, answers each with a
line of JSON, and ends when standard input does.
"""

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vitalsd.sidecar.frozen import own_command, with_own_path

__all__ = [
    "CpuLoad",
    "CpuLoadProcess",
    "CpuLoadThreads",
    "Log",
    "allocate_touched",
    "bounds_ns",
    "burn_for_doctor",
    "name_this_thread",
]

PERIOD_S = 0.02
"""Period in which a thread burns its percentage and then sleeps, s."""
PIECE = bytes(1 << 20)
"""Input of crc32, which releases the interpreter's lock for it, so that the threads run in parallel."""
LOG_EVERY_NS = 150_000
"""Least time between two entries of the record while a thread burns, ns."""
ANSWER_S = 15.0
"""A thread or a process has this long to complete its record, s: on a busy machine it may not run at once."""

Log = list[tuple[int, int, int]]
"""Entries of a thread: the monotonic clock before, its CPU time, the monotonic clock after; ns."""


class CpuLoad(Protocol):
    """Burn CPU time with threads, in this process or another."""

    @property
    def pid(self) -> int:
        """Process id of the process with the threads."""
        ...

    @property
    def tids(self) -> Mapping[str, int]:
        """Thread ids by name."""
        ...

    def logs(self) -> Mapping[str, Log]:
        """Return the record of each thread, by name, from its start to an entry later than this call."""
        ...


def bounds_ns(log: Log, earliest_ns: int, latest_ns: int) -> tuple[int, int]:
    """Return the least CPU time, ns, that a thread had used at monotonic `earliest_ns`, and the most at `latest_ns`."""
    before = bisect_right(log, earliest_ns, key=lambda entry: entry[2]) - 1
    after = bisect_left(log, latest_ns, key=lambda entry: entry[0])
    return log[before][1] if before >= 0 else 0, log[min(after, len(log) - 1)][1]


def name_this_thread(name: str) -> None:
    """Give the calling thread a name in the kernel, of at most 15 bytes."""
    if sys.platform == "darwin":
        ctypes.PyDLL(None).pthread_setname_np(name.encode())
    else:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
            file.write(name)


class _LoadThread(threading.Thread):
    """Burn `percent` of a core; at 0, sleep except to write the record."""

    def __init__(self, percent: int) -> None:
        super().__init__(name=f"burn-{percent}", daemon=True)
        self._percent = percent
        self._news = threading.Event()
        self._over = False
        self.ready = threading.Event()
        self.log: Log = []

    def run(self) -> None:
        name_this_thread(self.name)
        self._note()
        self.ready.set()
        while not self._over:
            self._news.clear()
            begun = time.monotonic()
            self._burn()
            rest_s = None if self._percent == 0 else PERIOD_S - (time.monotonic() - begun)
            if rest_s is None or (rest_s > 0 and self._percent < 100):
                self._news.wait(rest_s)
                self._note()

    def note_down(self, deadline: float) -> None:
        """Return once there is an entry later than now."""
        asked_ns = time.monotonic_ns()
        while self.log[-1][0] <= asked_ns:
            self._news.set()
            if time.monotonic() > deadline or not self.is_alive():
                raise TimeoutError(f"{self.name} did not get to run")
            time.sleep(0.001)

    def end(self) -> None:
        self._over = True
        self._news.set()
        self.join()

    def _burn(self) -> None:
        until_ns = time.thread_time_ns() + round(PERIOD_S * 1e7) * self._percent
        while self._percent and time.thread_time_ns() < until_ns:
            zlib.crc32(PIECE)
            if time.monotonic_ns() - self.log[-1][2] > LOG_EVERY_NS:
                self._note()
        self._note()

    def _note(self) -> None:
        before = time.monotonic_ns()
        self.log.append((before, time.thread_time_ns(), time.monotonic_ns()))


class CpuLoadThreads:
    """
    Burn with threads of this process, named ``burn-<percent>``, for as long as the context lasts.

    Args:
        duties: percent of a core, one thread each.
    """

    def __init__(self, duties: Sequence[int]) -> None:
        self.pid = os.getpid()
        self._threads = [_LoadThread(percent) for percent in duties]
        self.tids: dict[str, int] = {}

    def __enter__(self) -> "CpuLoadThreads":
        """Start the threads; `tids` has all of them then."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.ready.wait()
            assert thread.native_id is not None
            self.tids[thread.name] = thread.native_id
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        for thread in self._threads:
            if thread.is_alive():
                thread.end()

    def logs(self) -> dict[str, Log]:
        """Return the record of each thread. Raise `TimeoutError`: one did not run for `ANSWER_S`."""
        deadline = time.monotonic() + ANSWER_S
        for thread in self._threads:
            thread.note_down(deadline)
        return {thread.name: thread.log for thread in self._threads}


class CpuLoadProcess:
    """
    Burn with threads of a process of their own, which ends with the context, and with this process.

    Raises:
        OSError: the process cannot be started, or does not answer.
        NotRunnableError: this program cannot be run as vitalsd.
    """

    def __init__(self, duties: Sequence[int]) -> None:
        self.begun_ns = time.monotonic_ns()
        # Not `child_environment`: it ends before this process and can use the unpacked files of a one-file application.
        environ = dict(os.environ)
        program = with_own_path(own_command(), environ)
        self._process = subprocess.Popen(
            [*program, "burn", *map(str, duties)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C must reach the doctor alone, which then ends this process.
            start_new_session=True,
            env=environ,
        )
        self.started_ns = time.monotonic_ns()
        """Monotonic time at which the process had started, ns; at `begun_ns` it had not."""
        self.pid = self._process.pid
        self.tids: dict[str, int] = {}

    def __enter__(self) -> "CpuLoadProcess":
        """Wait until the threads burn; `tids` has all of them then."""
        try:
            self.tids = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the process by SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def logs(self) -> dict[str, Log]:
        """Return the record of each thread, that of the main thread under ``main``."""
        return {name: [(a, b, c) for a, b, c in log] for name, log in self._ask("logs").items()}

    def note(self) -> None:
        """Make its main thread, which otherwise does nothing, add an entry to its record."""
        self._ask("note")

    def hold(self, size: int) -> None:
        """Make it hold `size` bytes of touched memory more than it needs; 0: none."""
        self._ask(f"hold {size}")

    def _ask(self, order: str) -> Any:
        assert self._process.stdin is not None
        print(order, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(0, f"the process that burns ended with status {self._process.wait()}")
        return json.loads(line)


def allocate_touched(size: int) -> mmap.mmap:
    """Return anonymous memory of `size` bytes, a multiple of the page size, with every page written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def burn_for_doctor(duties: Sequence[int]) -> None:
    """
    Obey a `CpuLoadProcess` of another process until standard input ends.

    Args:
        duties: percent of a core, one thread each.
    """
    held: mmap.mmap | None = None
    own: Log = []
    with CpuLoadThreads(duties) as load:
        print(json.dumps(load.tids), flush=True)
        for line in sys.stdin:
            before = time.monotonic_ns()
            own.append((before, time.thread_time_ns(), time.monotonic_ns()))
            answer: Any = None
            match line.split():
                case ["logs"]:  # "note" needs no case: each order adds an entry for this thread
                    answer = {"main": own, **load.logs()}
                case ["hold", size]:
                    if held is not None:
                        held.close()
                    held = allocate_touched(int(size)) if int(size) else None
            print(json.dumps(answer), flush=True)
