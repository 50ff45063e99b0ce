"""
Pause the threads of the sidecar while its host forks, and release the sidecar's copy in the child.

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
"""A fork waits at most this long for each thread that reads or writes, s: one that hangs must not block the host."""
IMPORT_S = 5.0
"""A fork waits at most this long for a thread of the sidecar that imports, s: the child would inherit the held lock."""


class PausableLoop:
    """
    Pause the event loop of a sidecar while the host forks.

    Args:
        loop: the event loop, which runs on another thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._resting = threading.Lock()
        """Held until `resume`. An Event would not do: its own lock could stay held in the child."""

    def pause(self, timeout_s: float) -> bool:
        """Let the callback under way end and none begin until `resume`; False after `timeout_s` seconds."""
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
        """Let callbacks run again after a `pause` that returned True; in the child as well."""
        self._resting.release()


Pausable = Worker | PausableLoop
"""What uses SQLite, the kernel or an import on a thread of its own, and can be paused while the host forks."""


def pause_all(each: Iterable[Pausable]) -> list[Pausable]:
    """
    Pause one after the other, and return those that are paused now, until their `resume`.

    One that takes longer than `FORK_S` is left out. While a thread of the sidecar imports, the limit is `IMPORT_S` for
    all of them together.

    Args:
        each: what to pause; its next one is requested only after the one before has been paused or left out.
    """
    deadline = time.monotonic() + IMPORT_S

    def rests(pausable: Pausable) -> bool:
        while not pausable.pause(FORK_S):
            if time.monotonic() >= deadline or not _imports():
                return False
        return True

    paused = [pausable for pausable in each if rests(pausable)]
    while _imports() and time.monotonic() < deadline:  # a thread of the client, which is not paused
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
    Run callbacks at each fork of this process, from `install` on.

    Args:
        pause: called in the parent before a fork; what it returns is resumed after the fork, in parent and child.
        in_child: called in the child after the fork.
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
        # A signal handler may fork in the middle of a fork: then all threads are paused already.
        forks.append([] if any(forks) else self._pause())

    def _after(self) -> None:
        forks = self._forking.__dict__.get("forks")
        for paused in reversed(forks.pop() if forks else []):
            paused.resume()

    def _child(self) -> None:
        self._after()
        self._in_child()
