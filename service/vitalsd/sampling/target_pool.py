"""Keep one `Sampler` for each process that clients ask for, and stream windows of them."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vitalsd.admission import OWNER, BusyError, Peer, Shares
from vitalsd.contract.limits import OTHER_PROCESSES, STREAM_QUEUE
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.hangs import HeartbeatStatus
from vitalsd.recording.recorder import TargetRecorder
from vitalsd.sampling.sampler import Sampler
from vitalsd.snapshot import Identity, Measurement, Part, Snapshot
from vitalsd.sources.base import Source, SourceError, TargetGoneError

if TYPE_CHECKING:
    from vitalsd.recording.replay import Replay

__all__ = ["PooledTarget", "Stream", "Targets"]


class PooledTarget(Protocol):
    """Measure a process: a live one (`Sampler`) or one from a file (`vitalsd.recording.replay`)."""

    replay: "Replay | None"
    """The file that is replayed, perhaps of another machine; ``None``: a process of this machine."""

    @property
    def platform(self) -> str:
        """Name of the platform."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id; ``None``: not opened yet, or replayed."""
        ...

    @property
    def recorder(self) -> TargetRecorder:
        """The recorder of the target; one that is not recorded has a `NoRecorder`."""
        ...

    @property
    def heartbeats(self) -> Sequence[HeartbeatStatus]:
        """The heartbeats that the target has opened; a replay has none."""
        ...

    @property
    def gauges(self) -> Mapping[str, float]:
        """The gauges that the target has set, as they are now; a replay has none."""
        ...

    @property
    def hang_counts(self) -> Mapping[tuple[str, HangCause], int]:
        """Number of hangs of the target by heartbeat and cause; a replay has none."""
        ...

    @property
    def snapshots_taken(self) -> int:
        """Number of snapshots of the target that were taken."""
        ...

    async def identity(self) -> Identity:
        """Return the identity of the target. Raise `SourceError`."""
        ...

    async def window(self, window_ms: int, *, parts: Part = Part.NONE, peer: Peer = OWNER) -> Measurement:
        """Measure the coming `window_ms` milliseconds. Raise `SourceError` or `BusyError`, see `Sampler.window`."""
        ...

    async def snapshot(self) -> Snapshot:
        """Return the counters, with figures, of now or of a few milliseconds ago. Raise `SourceError`."""
        ...

    async def check_alive(self) -> None:
        """Return if the target can be read now. Raise `SourceError`, as when it has exited."""
        ...

    async def hangs(self) -> bool:
        """Return whether a read of the target does not return."""
        ...

    async def close(self) -> None:
        """Release the target and end its record."""
        ...


class Stream:
    """
    Measure window after window of one target, for one reader: an async iterator of `Measurement`.

    Without backpressure: a reader that is too slow loses the oldest windows, counted in `dropped`, and never delays the
    sampler. The iterator ends with the `SourceError` of the target.
    """

    def __init__(self, target: PooledTarget, interval_ms: int, peer: Peer = OWNER, parts: Part = Part.NONE) -> None:
        self._parts = parts
        self._target = target
        self._peer = peer
        self._interval_ms = interval_ms
        self._waiting: deque[Measurement] = deque(maxlen=STREAM_QUEUE)
        self._news = asyncio.Event()
        self._error: SourceError | None = None
        self._producer = asyncio.create_task(self._produce())
        self.dropped = 0

    def __aiter__(self) -> "Stream":
        """Return this stream: there is one reader."""
        return self

    async def __anext__(self) -> Measurement:
        """Wait for the next window. Raise `SourceError` once the target ends, `StopAsyncIteration` after `close`."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._producer.done():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    async def close(self) -> None:
        """End the stream; a reader that waits gets no other window."""
        self._producer.cancel()
        with suppress(asyncio.CancelledError):
            await self._producer
        self._news.set()

    async def _produce(self) -> None:
        try:
            while True:
                try:
                    measurement = await self._target.window(self._interval_ms, parts=self._parts, peer=self._peer)
                except BusyError:  # the stream stays open and lacks this window
                    self.dropped += 1
                    await asyncio.sleep(self._interval_ms / 1000)
                    continue
                self.dropped += len(self._waiting) == STREAM_QUEUE
                self._waiting.append(measurement)
                self._news.set()
        except SourceError as error:
            self._error = error
        finally:
            self._news.set()


@dataclass(slots=True, eq=False)
class _PooledSampler:
    sampler: Sampler
    users: Counter[Peer] = field(default_factory=Counter)
    """Number of callers by peer."""
    expiry: asyncio.TimerHandle | None = None
    """Timer that closes the sampler; ``None`` while it has users."""

    @property
    def is_busy(self) -> bool:
        """Whether its thread is executing a call."""
        return self.sampler.worker.busy_since_ns is not None


class Targets:
    """
    Keep the samplers of all processes that clients ask for.

    Args:
        default: the target of this sidecar; it stays open.
        open_source: opens any other pid; it is closed after `idle_s` without a caller.
        limit: number of other targets that one kind of client may use at once, see `Shares`. If so many are open, the
            one that has been idle for the longest is evicted.
        name: name of the process for which the default target waits; ``None``: it waits for none.
    """

    def __init__(
        self,
        default: PooledTarget,
        open_source: Callable[[int], Source],
        *,
        idle_s: float = 10,
        limit: int = OTHER_PROCESSES,
        name: str | None = None,
    ) -> None:
        self.default = default
        self.name = name
        self._open_source = open_source
        self._idle_s = idle_s
        self._limit = limit
        self._shares = Shares(limit)
        self._pooled: dict[int, _PooledSampler] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def target(self, pid: int | None, peer: Peer = OWNER) -> AsyncIterator[PooledTarget]:
        """
        Yield the target with this `pid`, or the default one; it stays open for as long as the context.

        Raises:
            BusyError: `peer` uses too many other targets at once, or reads of too many hang.
        """
        if pid is None or pid == self.default.pid:
            yield self.default
            return
        await self._close_if_gone(pid)
        pooled = self._enter(pid, peer)
        try:
            yield pooled.sampler
        except SourceError:
            # The pid may be that of another process at the next call, so the next caller opens it anew. If a read of
            # it hangs, it stays: otherwise each caller would leave another thread that hangs.
            if not await pooled.sampler.hangs() and self._pooled.get(pid) is pooled:
                del self._pooled[pid]
            raise
        finally:
            pooled.users[peer] -= 1
            if not pooled.users[peer]:
                del pooled.users[peer]
                self._shares.release(peer)
            if not pooled.users and self._pooled.get(pid) is pooled:
                pooled.expiry = asyncio.get_running_loop().call_later(self._idle_s, self._expire, pid)
            elif not pooled.users:
                self._release(pooled)

    async def hangs(self) -> bool:
        """Return whether a read of any target does not return."""
        samplers = [pooled.sampler for pooled in self._pooled.values()]
        return await self.default.hangs() or any([await sampler.hangs() for sampler in samplers])

    async def start(self) -> None:
        """Open the default target, so that it is recorded from now on. Later callers get the error if that fails."""
        with suppress(SourceError):
            await self.default.identity()

    def set_default(self, target: PooledTarget) -> None:
        """Measure `target` by default from now on; the one before is closed."""
        closing = asyncio.ensure_future(self.default.close())
        self.default = target
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Release all targets."""
        for pid in list(self._pooled):
            self._drop(pid)
        await asyncio.gather(self.default.close(), *self._closing)

    async def _close_if_gone(self, pid: int) -> None:
        """Close the target of `pid` if it has exited: the pid may be that of another process now."""
        pooled = self._pooled.get(pid)
        if pooled is None or pooled.sampler.pid is None:
            return
        try:
            await pooled.sampler.check_alive()
        except TargetGoneError:
            if self._pooled.get(pid) is pooled and pooled.users:
                del self._pooled[pid]  # its last user closes it
            elif self._pooled.get(pid) is pooled:
                self._drop(pid)
        except SourceError:
            pass  # `identity` raises it to the caller

    def _enter(self, pid: int, peer: Peer) -> _PooledSampler:
        pooled = self._pooled.get(pid)
        joins = pooled is None or not pooled.users[peer]
        if joins and not self._shares.take(peer):
            raise BusyError(f"{self._limit} other processes are being sampled already")
        try:
            if pooled is None:
                self._make_room()
                pooled = self._pooled[pid] = _PooledSampler(
                    Sampler(lambda: self._open_source(pid), name=f"vitalsd-{pid}")
                )
        except BaseException:
            self._shares.release(peer)
            raise
        if pooled.expiry is not None:
            pooled.expiry.cancel()
            pooled.expiry = None
        pooled.users[peer] += 1
        return pooled

    def _make_room(self) -> None:
        """
        Evict the target that has been idle for the longest, if there are `limit`.

        A target with a read that hangs is not closed, because its thread would stay. Raise `BusyError` if all targets
        are such.
        """
        if len(self._pooled) < self._limit:
            return
        idle = [(pooled.expiry.when(), pid) for pid, pooled in self._pooled.items() if pooled.expiry is not None]
        able = [each for each in idle if not self._pooled[each[1]].is_busy]
        if able:
            self._drop(min(able)[1])
        elif len(idle) >= self._limit:
            raise BusyError(f"reads of {len(idle)} other processes hang")

    def _expire(self, pid: int) -> None:
        pooled = self._pooled[pid]
        if pooled.is_busy:  # no caller waits for this read, so it hangs
            pooled.expiry = asyncio.get_running_loop().call_later(self._idle_s, self._expire, pid)
        else:
            self._drop(pid)

    def _drop(self, pid: int) -> None:
        pooled = self._pooled.pop(pid)
        if pooled.expiry is not None:
            pooled.expiry.cancel()
        self._release(pooled)

    def _release(self, pooled: _PooledSampler) -> None:
        task = asyncio.ensure_future(pooled.sampler.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
