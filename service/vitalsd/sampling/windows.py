"""
Measure windows of one target, and share their snapshots among callers with requests at about the same time.

Windows that begin or end within a few milliseconds of each other share the snapshots, so a thousand callers cost about
as much as one. All of this runs on the event loop; `vitalsd.sampling.sampler` takes the snapshots.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from vitalsd.admission import BusyError, Peer, Shares
from vitalsd.contract.limits import WINDOWS
from vitalsd.sampling.target_reader import SNAPSHOT_REUSE_NS
from vitalsd.snapshot import Measurement, Part, Snapshot, measure
from vitalsd.sources.base import TargetGoneError
from vitalsd.worker_thread import consume_exception

__all__ = ["Windows"]

REUSE_PART = 20
"""A snapshot serves another window only if it is at most 1/20 of that window old."""
BUSY_WINDOW_COUNT = 8
"""With this many windows of one target open, `SNAPSHOT_REUSE_NS` no longer limits the age of a reused snapshot."""
BUSY_REUSE_NS = 5_000_000
"""With `BUSY_WINDOW_COUNT` windows open, a snapshot up to this old serves any window of twice that or more, ns."""

Key = tuple[Snapshot, int, Part]
"""Identifies a window: its first snapshot, its length in ms, and what its snapshots have."""


@dataclass(slots=True, eq=False)
class _Window:
    """Hold a window under way, and the number of callers of each peer that wait for it."""

    task: asyncio.Task[Measurement]
    waiting: Counter[Peer] = field(default_factory=Counter)


class Windows:
    """
    Measure and share the windows of one target.

    Args:
        take: returns a snapshot, with these parts, that is not older than a monotonic time in ns.
        take_at: returns one that is taken at a monotonic time (the first argument), or one since the second.
        gone: returns the error for a target that is not measured any more.
    """

    def __init__(
        self,
        take: Callable[[int, Part], Awaitable[Snapshot]],
        take_at: Callable[[int, int, Part], Awaitable[Snapshot]],
        gone: Callable[[], TargetGoneError],
    ) -> None:
        self._take = take
        self._take_at = take_at
        self._gone = gone
        self._open: dict[Key, _Window] = {}
        self._shares = Shares(WINDOWS)
        self._closed = False

    def __len__(self) -> int:
        """Return the number of open windows."""
        return len(self._open)

    @property
    def callers(self) -> int:
        """Number of places that callers occupy, see `Shares`."""
        return len(self._shares)

    async def measure(self, window_ms: int, parts: Part, peer: Peer) -> Measurement:
        """Measure the coming `window_ms` milliseconds, see `Sampler.window`."""
        window_ns = window_ms * 1_000_000
        slack_ns = self._slack_ns(window_ns)
        first = await self._take(time.monotonic_ns() - slack_ns, parts)
        if self._closed:
            raise self._gone()
        key = (first, window_ms, parts)
        window = self._open.get(key)
        if (window is None or not window.waiting[peer]) and not self._shares.take(peer):
            raise BusyError(f"{WINDOWS} different windows of this process are open already")
        if window is None:
            window = self._begin(key, window_ns, slack_ns)
        window.waiting[peer] += 1
        try:
            return await asyncio.shield(window.task)
        except asyncio.CancelledError:
            if window.task.cancelled() and self._closed:  # it has exited, and the next process of its name is measured
                raise self._gone() from None
            raise
        finally:
            self._leave(key, window, peer)

    def close(self) -> None:
        """End all windows; their callers get the error that the target is gone."""
        self._closed = True
        for window in list(self._open.values()):
            window.task.cancel()

    def _slack_ns(self, window_ns: int) -> int:
        """
        Return how far, in ns, a snapshot may lie from the beginning or end of a window.

        Windows of one length thus have at most `BUSY_WINDOW_COUNT` + 2 * `REUSE_PART` beginnings, for any number of
        callers.
        """
        if len(self._open) < BUSY_WINDOW_COUNT:
            return min(SNAPSHOT_REUSE_NS, window_ns // REUSE_PART)
        return max(window_ns // REUSE_PART, min(BUSY_REUSE_NS, window_ns // 2))

    def _begin(self, key: Key, window_ns: int, slack_ns: int) -> _Window:
        first, _, parts = key

        async def finish() -> Measurement:
            end_ns = first.monotonic_ns + window_ns
            return measure(first, await self._take_at(end_ns, end_ns - slack_ns, parts))

        window = self._open[key] = _Window(asyncio.create_task(finish()))
        window.task.add_done_callback(partial(self._end, key, window))
        return window

    def _end(self, key: Key, window: _Window, task: asyncio.Task[Measurement]) -> None:
        if self._open.get(key) is window:
            del self._open[key]
        consume_exception(task)

    def _leave(self, key: Key, window: _Window, peer: Peer) -> None:
        """Take one caller out of a window, and end a window that has no caller left."""
        window.waiting[peer] -= 1
        if not window.waiting[peer]:
            del window.waiting[peer]
            self._shares.release(peer)
        if not window.waiting and not window.task.done():
            if self._open.get(key) is window:
                del self._open[key]
            window.task.cancel()
