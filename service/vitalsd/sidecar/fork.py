"""
A fork of the host: the threads of the sidecar rest meanwhile, and the child lets go of its copy.

What SQLite, the allocator or an import has locked on another thread at the moment of a fork stays locked in the child.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable

from vitalsd.worker_thread import Worker

__all__ = ["ForkHooks", "Pausable", "PausableLoop", "pause_all"]

IMPORTLIB = "<frozen importlib._bootstrap>"
"""File name of the frames of an import."""
FORK_S = 0.5
"""A fork waits so long for each thread that reads or writes; one that hangs does not hold it up for more."""
IMPORT_S = 5.0
"""A fork waits so long for a thread of the sidecar that imports: the lock of that import would stay in the child."""


class PausableLoop:
    """
    The event loop of a sidecar, which rests while the host forks.

    Args:
        loop: runs on another thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._resting = threading.Lock()
        """Held until `resume`. Not an Event, which has a lock of its own that could stay held in the child."""

    def pause(self, timeout_s: float) -> bool:
        """Let the callback under way end and none begin until `resume`; False if it takes longer."""
        rests, resting = threading.Event(), threading.Lock()
        resting.acquire()

        def rest() -> None:
            rests.set()
            resting.acquire()

        try:
            self._loop.call_soon_threadsafe(rest)
        except RuntimeError:  # it is closed
            return False
        if rests.wait(timeout_s):
            self._resting = resting
            return True
        resting.release()
        return False

    def resume(self) -> None:
        """After a `pause` that was granted; in the child as well."""
        self._resting.release()


Pausable = Worker | PausableLoop
"""What uses SQLite, the kernel or an import on a thread of its own, and rests while the host forks."""


def pause_all(each: Iterable[Pausable]) -> list[Pausable]:
    """
    Pause one after the other, and return those that rest now until their `resume`.

    One that takes longer than `FORK_S` is left out, or, while a thread of the sidecar imports, `IMPORT_S` in all.

    Args:
        each: asked for the next one only once the one before rests, or does not.
    """
    deadline = time.monotonic() + IMPORT_S

    def rests(pausable: Pausable) -> bool:
        while not pausable.pause(FORK_S):
            if time.monotonic() >= deadline or not _imports():
                return False
        return True

    paused = [pausable for pausable in each if rests(pausable)]
    while _imports() and time.monotonic() < deadline:  # a thread of the client, which does not rest
        time.sleep(0.001)
    return paused


def _imports() -> bool:
    """Return whether another thread of the sidecar is importing a module now."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("vitalsd") and thread is not threading.current_thread():
            frame = frames.get(thread.ident or 0)
            while frame is not None:
                if frame.f_code.co_filename == IMPORTLIB:
                    return True
                frame = frame.f_back
    return False


class ForkHooks:
    """
    What a process does at each fork from `install` on.

    Args:
        pause: called in the parent before a fork; what it returns is resumed after it, in parent and child.
        in_child: called in the child then.
    """

    def __init__(self, pause: Callable[[], list[Pausable]], in_child: Callable[[], None]) -> None:
        self._pause = pause
        self._in_child = in_child
        self._installed = False
        self._forking = threading.local()

    def install(self) -> None:
        """Have the interpreter call the hooks. A second call does nothing."""
        if not self._installed:
            os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._child)
            self._installed = True

    def _before(self) -> None:
        forks: list[list[Pausable]] = self._forking.__dict__.setdefault("forks", [])
        # A signal handler may fork in the middle of a fork: then all rests already.
        forks.append([] if any(forks) else self._pause())

    def _after(self) -> None:
        forks = self._forking.__dict__.get("forks")
        for paused in reversed(forks.pop() if forks else []):
            paused.resume()

    def _child(self) -> None:
        self._after()
        self._in_child()
