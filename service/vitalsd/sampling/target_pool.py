"""Keep one `Sampler` for each process that clients ask for, and stream windows of them."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vitalsd.admission import OWNER, BusyError, Peer, Shares
from vitalsd.contract.limits import OTHER_PROCESSES, STREAM_QUEUE
from vitalsd.recording.recorder import TargetRecorder
from vitalsd.sampling.sampler import Sampler
from vitalsd.snapshot import Identity, Measurement, Snapshot
from vitalsd.sources.base import Source, SourceError, TargetGoneError

if TYPE_CHECKING:
    from vitalsd.recording.replay import Replay

__all__ = ["PooledTarget", "Stream", "Targets"]


class PooledTarget(Protocol):
    """A process that is measured: live (`Sampler`) or read back from a file (`vitalsd.recording.replay`)."""

    replay: "Replay | None"
    """The file that is replayed, perhaps of another machine; ``None``: a process of this machine."""

    @property
    def platform(self) -> str: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def recorder(self) -> TargetRecorder: ...
    @property
    def snapshots_taken(self) -> int: ...
    async def identity(self) -> Identity: ...
    async def window(self, window_ms: int, *, extras: bool = False, peer: Peer = OWNER) -> Measurement: ...
    async def snapshot(self) -> Snapshot: ...
    async def confirm(self) -> None: ...
    async def hangs(self) -> bool: ...
    async def close(self) -> None: ...


class Stream:
    """
    Window after window of one target, for one reader: an async iterator of `Measurement`.

    A reader that is too slow loses the oldest, counted in `dropped`; it never holds up the sampler.
    It ends with the `SourceError` that says why there is no more.
    """

    def __init__(self, target: PooledTarget, interval_ms: int, peer: Peer = OWNER) -> None:
        self._target = target
        self._peer = peer
        self._interval_ms = interval_ms
        self._waiting: deque[Measurement] = deque(maxlen=STREAM_QUEUE)
        self._news = asyncio.Event()
        self._error: SourceError | None = None
        self._producer = asyncio.create_task(self._produce())
        self.dropped = 0

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Measurement:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._producer.done():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    async def close(self) -> None:
        """End it; a reader that waits gets no more."""
        self._producer.cancel()
        with suppress(asyncio.CancelledError):
            await self._producer
        self._news.set()

    async def _produce(self) -> None:
        try:
            while True:
                try:
                    measurement = await self._target.window(self._interval_ms, peer=self._peer)
                except BusyError:  # the stream stays open and misses one
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
    """Callers by peer."""
    expiry: asyncio.TimerHandle | None = None
    """Closes it; there is one while it has no users."""

    @property
    def is_busy(self) -> bool:
        """Whether its thread is at work."""
        return self.sampler.worker.busy_since_ns is not None


class Targets:
    """
    Keep the samplers of all processes that clients ask for.

    Args:
        default: the target of this sidecar; it stays open.
        open_source: opens any other pid; closed again after `idle_s` without a caller.
        limit: of other targets in use at once by one kind of client, see `Shares`. If so many are open, the target that
            has been idle for the longest is closed.
        name: of the process for which the default target waits if there is none; ``None``: it waits for none.
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
        Give the target with this `pid`, or the default one. It stays open as long as the context.

        Raises:
            BusyError: `peer` uses too many other targets at once, or reads of too many hang.
        """
        if pid is None or pid == self.default.pid:
            yield self.default
            return
        await self._forget_if_gone(pid)
        pooled = self._enter(pid, peer)
        try:
            yield pooled.sampler
        except SourceError:
            # The pid may be another process the next time, so the next caller opens it anew. Unless a read of it
            # hangs: its thread is kept, or each caller would leave another one behind.
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
        """Return whether a read of any of them does not return."""
        samplers = [pooled.sampler for pooled in self._pooled.values()]
        return await self.default.hangs() or any([await sampler.hangs() for sampler in samplers])

    async def start(self) -> None:
        """Open the default target, so that it is recorded from now on. Later callers get the error if that fails."""
        with suppress(SourceError):
            await self.default.identity()

    def retarget(self, target: PooledTarget) -> None:
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

    async def _forget_if_gone(self, pid: int) -> None:
        """Close the target of `pid` if it has exited: the pid may be that of another process by now."""
        pooled = self._pooled.get(pid)
        if pooled is None or pooled.sampler.pid is None:
            return
        try:
            await pooled.sampler.confirm()
        except TargetGoneError:
            if self._pooled.get(pid) is pooled and pooled.users:
                del self._pooled[pid]  # the last of them closes it
            elif self._pooled.get(pid) is pooled:
                self._drop(pid)
        except SourceError:
            pass  # the caller gets it from `identity`

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
        Close the target that has been idle for the longest, if there are `limit`.

        A target of which a read hangs is not closed, because its thread stays. Raises `BusyError` if all
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
        if pooled.is_busy:  # with a read that no caller waits for: it hangs
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
