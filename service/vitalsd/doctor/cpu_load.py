"""
Threads that burn a known part of a core and keep a record of it by their own CPU clocks.

The record is the truth that readings are judged by, and not the part that was asked for: on a busy
machine a thread gets what is left. A CPU clock never goes back, so the last entry before an instant
and the first one after it are bounds of what the thread had burnt then, however it was scheduled.

`BurnerProcess` burns in a process of its own, ``vitalsd burn``: it obeys words on standard input, answers each with a
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
    "Burner",
    "BurnerProcess",
    "BurnerThreads",
    "Log",
    "bounds_ns",
    "burn_for_doctor",
    "name_this_thread",
    "touched",
]

PERIOD_S = 0.02
PIECE = bytes(1 << 20)
"""Worked on without the interpreter's lock, so that threads burn side by side and hold up no other thread."""
LOG_EVERY_NS = 150_000
ANSWER_S = 15.0

Log = list[tuple[int, int, int]]
"""Entries of a thread: the monotonic clock before, its CPU time, the monotonic clock after; ns."""


class Burner(Protocol):
    """Threads at work, in this process or another."""

    @property
    def pid(self) -> int: ...
    @property
    def tids(self) -> Mapping[str, int]:
        """Thread ids by name."""
        ...

    def logs(self) -> Mapping[str, Log]:
        """What each thread burnt, from before its start to beyond now."""
        ...


def bounds_ns(log: Log, earliest_ns: int, latest_ns: int) -> tuple[int, int]:
    """The least and the most CPU time that the thread can have had between two instants of the monotonic clock, ns."""
    before = bisect_right(log, earliest_ns, key=lambda entry: entry[2]) - 1
    after = bisect_left(log, latest_ns, key=lambda entry: entry[0])
    return log[before][1] if before >= 0 else 0, log[min(after, len(log) - 1)][1]


def name_this_thread(name: str) -> None:
    """Give the calling thread a name that the kernel knows, of at most 15 bytes."""
    if sys.platform == "darwin":
        ctypes.PyDLL(None).pthread_setname_np(name.encode())
    else:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
            file.write(name)


class _Duty(threading.Thread):
    """One thread at `percent` of a core; at 0 it sleeps but to write its record."""

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


class BurnerThreads:
    """
    Threads of this process, called ``burn-<percent>``, as a context manager.

    Args:
        duties: percent of a core, one thread each.
    """

    def __init__(self, duties: Sequence[int]) -> None:
        self.pid = os.getpid()
        self._threads = [_Duty(percent) for percent in duties]
        self.tids: dict[str, int] = {}

    def __enter__(self) -> "BurnerThreads":
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.ready.wait()
            assert thread.native_id is not None
            self.tids[thread.name] = thread.native_id
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            if thread.is_alive():
                thread.end()

    def logs(self) -> dict[str, Log]:
        deadline = time.monotonic() + ANSWER_S
        for thread in self._threads:
            thread.note_down(deadline)
        return {thread.name: thread.log for thread in self._threads}


class BurnerProcess:
    """
    Such threads in a process of their own, which ends with the context, and with this process.

    Raises:
        OSError: no process can be started, or it does not answer.
        NotRunnableError: this program cannot be run as vitalsd.
    """

    def __init__(self, duties: Sequence[int]) -> None:
        self.begun_ns = time.monotonic_ns()
        # Not `child_environment`: it ends before this process, whose files it can use in a one-file application.
        environ = dict(os.environ)
        program = with_own_path(own_command(), environ)
        self._process = subprocess.Popen(
            [*program, "burn", *map(str, duties)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the doctor, who then ends it.
            start_new_session=True,
            env=environ,
        )
        self.started_ns = time.monotonic_ns()
        """The process was born between `begun_ns` and this, by the monotonic clock."""
        self.pid = self._process.pid
        self.tids: dict[str, int] = {}

    def __enter__(self) -> "BurnerProcess":
        try:
            self.tids = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def logs(self) -> dict[str, Log]:
        """As `Burner.logs`, and the main thread's under ``main``."""
        return {name: [(a, b, c) for a, b, c in log] for name, log in self._ask("logs").items()}

    def note(self) -> None:
        """Let its main thread, which else does nothing, write down what it used so far."""
        self._ask("note")

    def hold(self, size: int) -> None:
        """Let it hold `size` bytes of touched memory more than it needs; 0: none."""
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


def touched(size: int) -> mmap.mmap:
    """Anonymous memory of `size` bytes, a multiple of the page size, every page of it written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def burn_for_doctor(duties: Sequence[int]) -> None:
    """
    Obey a `BurnerProcess` of another process until standard input ends.

    Args:
        duties: percent of a core, one thread each.
    """
    held: mmap.mmap | None = None
    own: Log = []
    with BurnerThreads(duties) as burner:
        print(json.dumps(burner.tids), flush=True)
        for line in sys.stdin:
            before = time.monotonic_ns()
            own.append((before, time.thread_time_ns(), time.monotonic_ns()))
            answer: Any = None
            match line.split():
                case ["logs"]:  # "note" is just an entry of this thread
                    answer = {"main": own, **burner.logs()}
                case ["hold", size]:
                    if held is not None:
                        held.close()
                    held = touched(int(size)) if int(size) else None
            print(json.dumps(answer), flush=True)
