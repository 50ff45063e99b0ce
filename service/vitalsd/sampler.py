"""
Windows over one target: when to take snapshots, and who shares them.

All kernel reads of one target happen on one thread of its own, so the event loop never blocks, and a
kernel that hangs on one target holds up no other. Callers whose windows start or end within a few
milliseconds share the snapshots: a thousand of them cost about what one costs.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from vitalsd.snapshot import Identity, Measurement, Snapshot, measure
from vitalsd.sources import Source, SourceError

__all__ = ["Busy", "KernelThread", "Sampler", "Targets", "sample"]

SHARE_NS = 10_000_000
"""A snapshot this young serves another window too ..."""
SHARE_PART = 20
"""... unless that is more than 1/20 of the window."""

T = TypeVar("T")


class Busy(Exception):
    """More is under way than the limits allow; try again later."""


def sample(source: Source, window_ms: int, *, extras: bool = False) -> Measurement:
    """One window of `source`, blocking, for callers without an event loop. Raises `SourceError`."""
    first = source.snapshot(extras=extras)
    time.sleep(window_ms / 1000)
    return measure(first, source.snapshot(extras=extras))


class KernelThread:
    """
    One daemon thread that runs what it is given, in order.

    Not an executor: that one's threads are joined when the interpreter exits, and a kernel call that
    hangs would hang the exit of the host program.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """Run `call` on the thread; the future has its result or its exception."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - handed to whoever waits, not swallowed
                    future.set_exception(error)

        self._calls.put(run)
        return future

    def stop(self, timeout_s: float) -> bool:
        """End the thread after what it was given before; False if it is still at that after `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class Sampler:
    """
    Measures one target for many callers of one event loop.

    Args:
        open_source: opens the target; called on the sampler's own thread, once.
        name: of that thread, as debuggers show it.
    """

    def __init__(self, open_source: Callable[[], Source], *, name: str = "vitalsd-sampler") -> None:
        self._open_source = open_source
        self._thread = KernelThread(name)
        self._source: Source | None = None
        self._identity: Identity | None = None
        self._last: Snapshot | None = None
        self._pending: asyncio.Future[Snapshot] | None = None
        self._pending_since_ns = 0
        self._pending_extras = False
        self._windows: dict[tuple[Snapshot, int, bool], asyncio.Task[Measurement]] = {}
        self.snapshots_taken = 0

    @property
    def pid(self) -> int | None:
        """The target, once it has been opened."""
        return self._identity.pid if self._identity else None

    async def identity(self) -> Identity:
        """Which process this is. Opens the target if need be. Raises `SourceError`."""
        if self._identity is None:
            self._identity = await asyncio.wrap_future(self._thread.submit(self._open))
        return self._identity

    async def window(self, window_ms: int, *, extras: bool = False) -> Measurement:
        """
        Measure the coming `window_ms` milliseconds.

        Raises:
            SourceError: the target cannot be read, or exited inside the window.
        """
        await self.identity()
        window_ns = window_ms * 1_000_000
        slack_ns = min(SHARE_NS, window_ns // SHARE_PART)
        first = await self._snapshot(time.monotonic_ns() - slack_ns, extras)
        key = (first, window_ms, extras)
        task = self._windows.get(key)
        if task is None:
            task = asyncio.create_task(self._finish(first, window_ns, slack_ns, extras))
            self._windows[key] = task
            task.add_done_callback(lambda task: self._finished(key, task))
        return await asyncio.shield(task)

    async def close(self, timeout_s: float = 1.0) -> None:
        """Release the target. A kernel call that hangs is left to its daemon thread."""
        for task in list(self._windows.values()):
            task.cancel()
        self._thread.submit(self._close)
        await asyncio.to_thread(self._thread.stop, timeout_s)

    def _finished(self, key: tuple[Snapshot, int, bool], task: asyncio.Task[Measurement]) -> None:
        self._windows.pop(key, None)
        if not task.cancelled():
            task.exception()  # looked at, or asyncio logs it when all who asked have left

    async def _finish(self, first: Snapshot, window_ns: int, slack_ns: int, extras: bool) -> Measurement:
        end_ns = first.monotonic_ns + window_ns
        await asyncio.sleep(max(0, end_ns - time.monotonic_ns()) / 1e9)
        last = await self._snapshot(end_ns - slack_ns, extras)
        if last.monotonic_ns <= first.monotonic_ns:
            last = await self._snapshot(time.monotonic_ns(), extras)
        return measure(first, last)

    async def _snapshot(self, not_before_ns: int, extras: bool) -> Snapshot:
        """A snapshot not older than `not_before_ns`: the last one, the one under way, or a new one."""
        last = self._last
        if last is not None and last.monotonic_ns >= not_before_ns and (last.extras is not None or not extras):
            return last
        pending = self._pending
        if pending is None or self._pending_since_ns < not_before_ns or extras > self._pending_extras:
            pending = asyncio.wrap_future(self._thread.submit(lambda: self._take(extras)))
            pending.add_done_callback(self._taken)
            self._pending, self._pending_since_ns, self._pending_extras = pending, time.monotonic_ns(), extras
        return await asyncio.shield(pending)

    def _taken(self, pending: asyncio.Future[Snapshot]) -> None:
        if self._pending is pending:
            self._pending = None
        if not pending.cancelled() and pending.exception() is None:
            self._last = pending.result()

    # On the sampler's thread

    def _open(self) -> Identity:
        if self._source is None:
            self._source = self._open_source()
        return self._source.identity()

    def _take(self, extras: bool) -> Snapshot:
        assert self._source is not None
        self.snapshots_taken += 1
        return self._source.snapshot(extras=extras)

    def _close(self) -> None:
        if self._source is not None:
            self._source.close()


@dataclass(slots=True, eq=False)
class _Guest:
    sampler: Sampler
    users: int = 0
    expiry: asyncio.TimerHandle | None = None


class Targets:
    """
    The samplers of every process that is being asked for.

    Args:
        default: the target of this sidecar; it stays open.
        open_source: opens any other pid; closed again after `idle_s` without a caller.
        limit: of other targets open at once; beyond it `Busy` is raised.
    """

    def __init__(
        self,
        default: Sampler,
        open_source: Callable[[int], Source],
        *,
        idle_s: float = 10,
        limit: int = 32,
    ) -> None:
        self.default = default
        self._open_source = open_source
        self._idle_s = idle_s
        self._limit = limit
        self._guests: dict[int, _Guest] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def sampler(self, pid: int | None) -> AsyncIterator[Sampler]:
        """
        The sampler of `pid`, or the default one. It stays open as long as the context.

        Raises:
            Busy: too many targets at once.
        """
        if pid is None or pid == self.default.pid:
            yield self.default
            return
        guest = self._enter(pid)
        idle_s = self._idle_s
        try:
            yield guest.sampler
        except SourceError:
            idle_s = 0  # the pid may be another process the next time: do not hold on to this one
            raise
        finally:
            guest.users -= 1
            if guest.users == 0:
                guest.expiry = asyncio.get_running_loop().call_later(idle_s, self._expire, pid)

    async def close(self) -> None:
        """Release all targets."""
        for pid in list(self._guests):
            self._expire(pid)
        await asyncio.gather(self.default.close(), *self._closing)

    def _enter(self, pid: int) -> _Guest:
        guest = self._guests.get(pid)
        if guest is None:
            if len(self._guests) >= self._limit:
                raise Busy(f"{self._limit} other processes are being sampled already")
            guest = self._guests[pid] = _Guest(Sampler(lambda: self._open_source(pid), name=f"vitalsd-{pid}"))
        if guest.expiry is not None:
            guest.expiry.cancel()
            guest.expiry = None
        guest.users += 1
        return guest

    def _expire(self, pid: int) -> None:
        guest = self._guests.pop(pid)
        if guest.expiry is not None:
            guest.expiry.cancel()
        task = asyncio.ensure_future(guest.sampler.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
