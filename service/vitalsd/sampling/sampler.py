"""
Measure one target for many callers.

Each target is read on one thread of its own (`vitalsd.sampling.target_reader`), so the event loop never blocks, and a
read that hangs in the kernel delays no other target; the callers of that target get an error after 5 s.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from vitalsd.admission import OWNER, Peer
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.hangs import HeartbeatStatus
from vitalsd.recording.recorder import NoRecorder, Recorder, RecorderConfig
from vitalsd.sampling.target_reader import SNAPSHOT_REUSE_NS, TargetReader
from vitalsd.sampling.windows import Windows
from vitalsd.snapshot import Identity, Measurement, Part, Snapshot, measure
from vitalsd.sources import platform_name
from vitalsd.sources.base import KernelError, Source
from vitalsd.worker_thread import HungError, StoppedError, Worker, consume_exception

if TYPE_CHECKING:
    from vitalsd.recording.replay import Replay

__all__ = ["Sampler", "sample"]

T = TypeVar("T")


def sample(source: Source, window_ms: int, *, parts: Part = Part.NONE) -> Measurement:
    """Measure one window of `source`, blocking, for callers without an event loop. Raise `SourceError`."""
    first = source.snapshot(parts=parts, names=False)
    time.sleep(window_ms / 1000)
    return measure(first, source.snapshot(parts=parts))


class _Pending:
    """Take a snapshot once for several callers. Until it is begun, it will be late enough for each caller."""

    def __init__(self, parts: Part) -> None:
        self.parts = parts
        self._since_ns: int | None = None
        self.future: asyncio.Future[Snapshot]

    def take(self, reader: TargetReader) -> Snapshot:
        """Take the snapshot, on the sampler's thread."""
        self._since_ns = time.monotonic_ns()
        return reader.take(self.parts, names=False)

    def is_after(self, not_before_ns: int) -> bool:
        since_ns = self._since_ns
        return since_ns is None or since_ns >= not_before_ns


class Sampler:
    """
    Measure one target for many callers of one event loop.

    Args:
        open_source: opens the target; called on the sampler's own thread.
        recording: how to record it; ``None``: it is not recorded.
        platform: the platform to name until the target has been opened; default: the running one.
        name: name of the sampler's thread, as debuggers show it.
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        *,
        recording: RecorderConfig | None = None,
        platform: str | None = None,
        name: str = "vitalsd-sampler",
    ) -> None:
        self.worker = Worker(name)
        """The sampler's thread."""
        self.replay: Replay | None = None
        self._platform = platform or platform_name()
        self._reader = TargetReader(open_source, recording, self.worker)
        self._windows = Windows(self._snapshot, self._snapshot_at, self._reader.gone)
        self._opening: asyncio.Future[Identity] | None = None
        self._pending: _Pending | None = None
        self._closing = False

    @property
    def platform(self) -> str:
        """Name of the platform; also known if the target cannot be opened."""
        identity = self._reader.identity
        return identity.platform if identity else self._platform

    @property
    def pid(self) -> int | None:
        """Process id of the target; ``None``: it has not been opened."""
        identity = self._reader.identity
        return identity.pid if identity else None

    @property
    def recorder(self) -> Recorder | NoRecorder:
        """What records the target, once it has been opened."""
        if self._reader.recorder is not None:
            return self._reader.recorder
        if self._reader.records:
            return NoRecorder("nothing has been recorded yet: there is no process to record, or it cannot be read")
        return NoRecorder("nothing is being recorded (--record-interval 0)")

    @property
    def heartbeats(self) -> Sequence[HeartbeatStatus]:
        """The heartbeats that the target has opened."""
        return () if self._reader.signals is None else self._reader.signals.statuses

    @property
    def gauges(self) -> Mapping[str, float]:
        """The gauges that the target has set, as they are now."""
        return {} if self._reader.signals is None else self._reader.signals.gauges

    @property
    def hang_counts(self) -> Mapping[tuple[str, HangCause], int]:
        """Number of hangs of the target by heartbeat and cause, see `SignalsReader.hang_counts`."""
        return {} if self._reader.signals is None else self._reader.signals.hang_counts

    @property
    def snapshots_taken(self) -> int:
        """Number of snapshots of the target that were taken."""
        return self._reader.snapshots_taken

    async def identity(self) -> Identity:
        """Return the identity of the target, which is opened and recorded from then on. Raise `SourceError`."""
        identity = self._reader.identity
        if identity is None:
            if self._opening is None:
                self._opening = asyncio.wrap_future(self.worker.submit(self._reader.open))
                self._opening.add_done_callback(self._opened)
            identity = await self._answered(self._opening)
        return identity

    async def window(self, window_ms: int, *, parts: Part = Part.NONE, peer: Peer = OWNER) -> Measurement:
        """
        Measure the coming `window_ms` milliseconds.

        A window ends early once no caller waits for it.

        Args:
            window_ms: length of the window.
            parts: what its snapshots have beside their counters.
            peer: the client that waits; it has a limited number of windows.

        Raises:
            SourceError: the target cannot be read, exited inside the window, or a read of it hangs.
            BusyError: `peer` waits for too many windows that have nothing in common.
        """
        await self.identity()
        return await self._windows.measure(window_ms, parts, peer)

    async def snapshot(self) -> Snapshot:
        """Return the counters, with figures, of now or of a few milliseconds ago. Raise `SourceError`."""
        await self.identity()
        return await self._snapshot(time.monotonic_ns() - SNAPSHOT_REUSE_NS, Part.FIGURES)

    async def check_alive(self) -> None:
        """Read the target as it is now, not a few milliseconds ago. Raise `SourceError`, as when it has exited."""
        await self.identity()
        await self._snapshot(time.monotonic_ns(), Part.NONE)

    async def hangs(self) -> bool:
        """Return whether a read of the target does not return."""
        return await self.worker.hangs()

    async def close(self, timeout_s: float = 1.0) -> None:
        """Release the target and end its record. A kernel call that hangs is left to its daemon thread."""
        if self._closing:
            return
        self._closing = True
        self._windows.close()
        # No executor here: at the exit of the interpreter an executor refuses work.
        await asyncio.wait({asyncio.wrap_future(self.worker.submit(self._reader.close))}, timeout=timeout_s)
        self.worker.stop(0.1)

    def discard(self) -> None:
        """Drop the record, if the thread has ended after `close`; for a client that makes no more requests."""
        if self._closing and self.worker.stop(0):
            self._reader.discard()

    async def _snapshot(self, not_before_ns: int, parts: Part) -> Snapshot:
        """Return a snapshot not older than `not_before_ns`: the last one, the one under way, or a new one."""
        last = self._reader.last_since(not_before_ns, parts)
        if last is not None:
            return last
        pending = self._pending
        if pending is None or parts & ~pending.parts or not pending.is_after(not_before_ns):
            pending = self._pending = _Pending(parts)
            pending.future = asyncio.wrap_future(self.worker.submit(partial(pending.take, self._reader)))
            pending.future.add_done_callback(partial(self._taken, pending))
        return await self._answered(pending.future)

    async def _snapshot_at(self, at_ns: int, not_before_ns: int, parts: Part) -> Snapshot:
        """Return a snapshot that the sampler's thread takes at `at_ns`, even if the event loop is busy then."""
        taken = asyncio.wrap_future(self.worker.submit(partial(self._reader.take_since, not_before_ns, parts), at_ns))
        taken.add_done_callback(consume_exception)
        try:
            await asyncio.sleep(max(0, at_ns - time.monotonic_ns()) / 1e9)
            return await self._answered(taken)
        finally:
            taken.cancel()

    async def _answered(self, future: asyncio.Future[T]) -> T:
        try:
            return await self.worker.await_or_hang(future)
        except HungError:
            process = f"process {self.pid}" if self.pid else "the process"
            raise KernelError(str(HungError(f"{process}: a read"))) from None
        except StoppedError:
            raise self._reader.gone() from None

    def _opened(self, future: asyncio.Future[Identity]) -> None:
        self._opening = None
        consume_exception(future)

    def _taken(self, pending: _Pending, future: asyncio.Future[Snapshot]) -> None:
        if self._pending is pending:
            self._pending = None
        consume_exception(future)
