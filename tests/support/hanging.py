"""
Beat every 50 ms as a Python client, and hang on command: hanging.py REFERENCE SLOT LIMIT_MS LIBRARY PLACE.

REFERENCE is the JSON of `SignalsPage.reference`, or ``own`` for a page of its own. PLACE is ``beside``, or ``inside``:
then a thread of this process looks for hangs, and prints each as a line ``hang JSON``. A line of stdin ``KIND MS``
makes the loop hang. After each gap of more than half of the limit it prints ``gap NS CPU_NS WAIT_NS``, as
programs/hanging.c does.
"""

import asyncio
import ctypes
import json
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable

from vitalsd.contract.signals_page import MappedPage, SignalsPage, heartbeat_slots, name_words
from vitalsd.recording.hangs import PERIOD_NS, HangDetector
from vitalsd.sources.linux.source import LinuxSource

FIRST, SLOT = 16, 16
BEAT, GAP, GAP_END, LIMIT, OWNER, STATE, NAME = 0, 1, 2, 3, 4, 6, 8


class Loop:
    """The thread that beats."""

    def __init__(self, words: "memoryview[int]", slot: int, limit_ns: int) -> None:
        self._words, self._at, self._limit_ns = words, FIRST + SLOT * slot, limit_ns
        self._last = self._cpu = self._waited = 0
        self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        for i, word in enumerate(name_words("ui")):
            words[self._at + NAME + i] = word
        words[self._at + LIMIT] = limit_ns
        words[self._at + OWNER] = os.getpid() << 32 | threading.get_native_id()
        words[self._at + STATE] = 1

    def beat(self) -> None:
        words, at, now, cpu = self._words, self._at, time.monotonic_ns(), time.thread_time_ns()
        waited = int(os.pread(self._schedstat, 128, 0).split()[1])
        gap = now - self._last if self._last else 0
        if gap > self._limit_ns:
            words[at + GAP], words[at + GAP_END] = gap, now
        words[at + BEAT] = now
        if gap > self._limit_ns // 2:
            say(f"gap {gap} {cpu - self._cpu} {waited - self._waited}")
        self._last, self._cpu, self._waited = now, cpu, waited


def main() -> None:
    reference, slot, limit_ms, library, place = sys.argv[1:]
    page = SignalsPage() if reference == "own" else None
    words = MappedPage(page.reference if page else json.loads(reference)).words
    if place == "inside":
        assert page is not None
        threading.Thread(target=watch, args=(page,), daemon=True).start()
    # A PyDLL keeps the interpreter lock while its functions run.
    kept = ctypes.PyDLL(library)
    loop = Loop(words, int(slot), int(limit_ms) * 1_000_000)
    while True:
        readable, _, _ = select.select([0], [], [], 0.05)
        loop.beat()
        if not readable:
            continue
        line = os.read(0, 256).decode()
        if not line:
            return
        kind, ms = line.split()
        loop.beat()
        hang(kind, int(ms), kept)
        loop.beat()


def say(line: str) -> None:
    """Print a line, whole, whatever other threads print."""
    os.write(1, (line + "\n").encode())


def hang(kind: str, ms: int, kept: ctypes.PyDLL) -> None:
    """Hang this thread."""
    match kind:
        case "lock":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire(timeout=ms / 1000)
        case "queue":
            empty: queue.SimpleQueue[None] = queue.SimpleQueue()
            try:
                empty.get(timeout=ms / 1000)
            except queue.Empty:
                return
        case "sleep":
            time.sleep(ms / 1000)
        case "python":
            until = time.monotonic() + ms / 1000
            while time.monotonic() < until:
                pass
        case "asyncio":
            asyncio.run(asyncio.sleep(ms / 1000))
        case "own_busy":
            kept.spin_ms(ms)
        case "own_asleep":
            kept.sleep_ms(ms)
        case "other_busy":
            beside(lambda: kept.spin_ms(ms))
        case "other_asleep":
            beside(lambda: kept.sleep_ms(ms))
        case _:
            raise SystemExit(2)


def beside(call: Callable[[], object]) -> None:
    """Make a call in another thread; this one then waits for the interpreter lock, not for the thread."""
    begun = threading.Event()

    def run() -> None:
        begun.set()
        call()

    threading.Thread(target=run, daemon=True).start()
    begun.wait()
    until = time.monotonic() + 0.02  # the switch interval is 5 ms, so the other thread gets the lock
    while time.monotonic() < until:
        pass


def watch(page: SignalsPage) -> None:
    """Look for hangs, as the thread of the sampler does."""
    source, detector = LinuxSource(), HangDetector(own_tid=threading.get_native_id())
    due_ns = time.monotonic_ns()
    while True:
        due_ns = max(due_ns + PERIOD_NS, time.monotonic_ns())
        time.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)
        content = page.read()
        assert all(slot.limit_ns for slot in heartbeat_slots(content))
        for found in detector.look(time.monotonic_ns(), content, source.look_at):
            say(f"hang {json.dumps(found._asdict())}")


if __name__ == "__main__":
    main()
