"""
Windows over one target: when to take snapshots, and who shares them.

All kernel reads of one target happen on one thread of its own, so the event loop never blocks, and a
kernel that hangs on one target holds up no other; whoever asks for that one is told so after 5 s.
Callers whose windows start or end within a few milliseconds share the snapshots: a thousand of them
cost about what one costs. The recorder's snapshots are taken on the same thread and shared alike, but end no
window: their names may be 2 s old.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from vitalsd.admission import OWNER, Busy, Peer, Shares
from vitalsd.recording.recorder import NotRecording, Recorder, Recording
from vitalsd.recording.series import Mark, Record
from vitalsd.snapshot import Identity, Measurement, Snapshot, contradiction, measure
from vitalsd.sources import platform_name
from vitalsd.sources.base import KernelError, Source, SourceError, TargetGone
from vitalsd.worker_thread import Hung, Stopped, Worker, seen

if TYPE_CHECKING:
    from vitalsd.recording.replay import Replay

__all__ = ["MAX_WINDOWS", "Sampler", "sample"]

SHARE_NS = 10_000_000
"""A snapshot this young serves another window too ..."""
SHARE_PART = 20
"""... unless that is more than 1/20 of the window."""
CROWD = 8
"""With so many windows of one target open, any snapshot within 1/20 of the window will do, and ..."""
CROWD_NS = 5_000_000
"""... one this young, or as young as half the window."""
MAX_WINDOWS = 64
"""Of one target at once and for one kind of client; see `Shares`. Clients that share a window use one each."""
T = TypeVar("T")


def sample(source: Source, window_ms: int, *, extras: bool = False) -> Measurement:
    """One window of `source`, blocking, for callers without an event loop. Raises `SourceError`."""
    first = source.snapshot(extras=extras, names=False)
    time.sleep(window_ms / 1000)
    return measure(first, source.snapshot(extras=extras))


class Sampler:
    """
    Measures one target for many callers of one event loop.

    Args:
        open_source: opens the target; called on the sampler's own thread.
        recording: whether and how to record it; ``None`` for not at all.
        platform: which it is until the target has been opened; default: the running one.
        name: of that thread, as debuggers show it.
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        *,
        recording: Recording | None = None,
        platform: str | None = None,
        name: str = "vitalsd-sampler",
    ) -> None:
        self._open_source = open_source
        self._platform = platform or platform_name()
        self._recording = recording
        self._worker = Worker(name)
        self._source: Source | None = None
        self._closing = False
        self._closed = False
        self._identity: Identity | None = None
        self._opening: asyncio.Future[Identity] | None = None
        self._last: Snapshot | None = None
        self._named = False
        """Whether the names in it are those of now: the recorder does without."""
        self._reading = 0
        """See `Snapshot.reading`."""
        self._contradicted = False
        """Whether the last two snapshots contradicted each other."""
        self._pending: _Pending | None = None
        self._windows: dict[_Key, _Window] = {}
        self._shares = Shares(MAX_WINDOWS)
        self.recorder: Recorder | None = None
        self.snapshots_taken = 0
        self.replay: Replay | None = None

    @property
    def platform(self) -> str:
        """As answers about the target name it, even if it cannot be opened."""
        return self._identity.platform if self._identity else self._platform

    @property
    def record(self) -> Record | None:
        """What was recorded of it; ``None`` without a recorder."""
        return self.recorder.record if self.recorder else None

    @property
    def pid(self) -> int | None:
        """The target, once it has been opened."""
        return self._identity.pid if self._identity else None

    @property
    def busy(self) -> bool:
        """Whether its thread is at work."""
        return self._worker.busy_since_ns is not None

    async def identity(self) -> Identity:
        """Which process this is. Opens the target, and starts recording it, if need be. Raises `SourceError`."""
        if self._identity is None:
            if self._opening is None:
                self._opening = asyncio.wrap_future(self._worker.submit(self._open))
                self._opening.add_done_callback(self._opened)
            self._identity = await self._answered(self._opening)
        return self._identity

    async def window(self, window_ms: int, *, extras: bool = False, peer: Peer = OWNER) -> Measurement:
        """
        Measure the coming `window_ms` milliseconds.

        A window ends early once no caller waits for it.

        Args:
            window_ms: length of the window.
            extras: also read what only ``detail=full`` shows.
            peer: the client that waits; it has a limited number of windows.

        Raises:
            SourceError: the target cannot be read, exited inside the window, or a read of it hangs.
            Busy: `peer` waits for too many windows that have nothing in common.
        """
        await self.identity()
        window_ns = window_ms * 1_000_000
        slack_ns = self._slack_ns(window_ns)
        first = await self._snapshot(time.monotonic_ns() - slack_ns, extras)
        if self._closing:
            raise self._left()
        key = (first, window_ms, extras)
        window = self._windows.get(key)
        if (window is None or not window.waiting[peer]) and not self._shares.take(peer):
            raise Busy(f"{MAX_WINDOWS} different windows of this process are open already")
        if window is None:
            window = self._windows[key] = _Window(asyncio.create_task(self._finish(first, window_ns, slack_ns, extras)))
            window.task.add_done_callback(partial(self._finished, key, window))
        window.waiting[peer] += 1
        try:
            return await asyncio.shield(window.task)
        except asyncio.CancelledError:
            if window.task.cancelled() and self._closing:  # it has exited, and the next of its name is measured
                raise self._left() from None
            raise
        finally:
            self._leave(key, window, peer)

    async def snapshot(self) -> Snapshot:
        """The counters, with extras, as they are now or were a few milliseconds ago. Raises `SourceError`."""
        await self.identity()
        return await self._snapshot(time.monotonic_ns() - SHARE_NS, extras=True)

    async def confirm(self) -> None:
        """Read the target as it is now, and not a few milliseconds ago. Raises `SourceError`: it has exited, say."""
        await self.identity()
        await self._snapshot(time.monotonic_ns(), False)

    def mark(self, label: str) -> Mark:
        """
        Put a label on the recorder's clock; from any thread.

        Raises:
            ValueError: the label is unfit, see `Record.mark`.
            NotRecording: there is no recorder.
        """
        return self._recorded().mark(label)

    async def mark_async(self, label: str) -> Mark:
        """The same, for the event loop."""
        return await self._recorded().mark_async(label)

    def crashed(self, ended: str) -> None:
        """Note that the target, which is this process, ends by a crash; from any thread."""
        if self.recorder is not None:
            self.recorder.crashed(ended)

    def why_not_recorded(self) -> str:
        """Why there is no record, where there is none."""
        if self._recording is None or self._recording.interval_s <= 0:
            return "nothing is being recorded (--record-interval 0)"
        return "nothing has been recorded yet: there is no process to record, or it cannot be read"

    def _recorded(self) -> Recorder:
        if self.recorder is None:
            raise NotRecording(self.why_not_recorded())
        return self.recorder

    async def responds(self) -> None:
        """Return once the sampler's thread has got through all that was given to it before."""
        await self._worker.result(lambda: None)

    async def hangs(self) -> bool:
        """Whether a read of the target does not return."""
        return await self._worker.hangs()

    async def record_hangs(self) -> bool:
        """Whether a write of its record does not return."""
        return self.recorder is not None and await self.recorder.hangs()

    def recording_info(self) -> dict[str, Any] | None:
        """State of the recorder as ``/info`` shows it; ``None`` without one."""
        return self.recorder.info() if self.recorder else None

    def forget(self) -> None:
        """In a forked child: leave target and record to the parent."""
        if self.recorder is not None:
            self.recorder.forget()

    def abandon(self) -> None:
        """End the thread of a sampler that was never used."""
        self._worker.stop(0)

    def discard(self) -> None:
        """Drop what was recorded, if its thread has ended after `close`; for who knows that nobody asks any more."""
        if self._closing and self._worker.stop(0):
            self._source = self._last = self.recorder = None

    def pause(self, timeout_s: float) -> bool:
        """Before a fork: let the read under way end and none begin until `resume`; False if it takes longer."""
        return self._worker.pause(timeout_s)

    def resume(self) -> None:
        """After a `pause` that was granted; in the child likewise."""
        self._worker.resume()

    async def close(self, timeout_s: float = 1.0) -> None:
        """Release the target and end its record. A kernel call that hangs is left to its daemon thread."""
        if self._closing:
            return
        self._closing = True
        for window in list(self._windows.values()):
            window.task.cancel()
        # No executor here: at the exit of the interpreter none takes work any more.
        await asyncio.wait({asyncio.wrap_future(self._worker.submit(self._close))}, timeout=timeout_s)
        self._worker.stop(0.1)

    def _finished(self, key: "_Key", window: "_Window", task: asyncio.Task[Measurement]) -> None:
        if self._windows.get(key) is window:
            del self._windows[key]
        seen(task)

    def _leave(self, key: "_Key", window: "_Window", peer: Peer) -> None:
        """Take one caller out of a window, and end a window that has no caller left."""
        window.waiting[peer] -= 1
        if not window.waiting[peer]:
            del window.waiting[peer]
            self._shares.release(peer)
        if not window.waiting and not window.task.done():
            if self._windows.get(key) is window:
                del self._windows[key]
            window.task.cancel()

    def _slack_ns(self, window_ns: int) -> int:
        """
        How far a snapshot may lie from where a window begins or ends.

        Windows of one length have then at most `CROWD` + 2 * `SHARE_PART` beginnings, however many ask.
        """
        if len(self._windows) < CROWD:
            return min(SHARE_NS, window_ns // SHARE_PART)
        return max(window_ns // SHARE_PART, min(CROWD_NS, window_ns // 2))

    async def _finish(self, first: Snapshot, window_ns: int, slack_ns: int, extras: bool) -> Measurement:
        """The second snapshot is due on the sampler's thread, whatever the event loop is busy with by then."""
        end_ns = first.monotonic_ns + window_ns
        take = partial(self._take_after, end_ns - slack_ns, extras)
        closing = asyncio.wrap_future(self._worker.submit(take, end_ns))
        closing.add_done_callback(seen)
        try:
            await asyncio.sleep(max(0, end_ns - time.monotonic_ns()) / 1e9)
            return measure(first, await self._answered(closing))
        finally:
            closing.cancel()

    async def _snapshot(self, not_before_ns: int, extras: bool) -> Snapshot:
        """A snapshot not older than `not_before_ns`: the last one, the one under way, or a new one."""
        last = self._fresh(not_before_ns, extras)
        if last is not None:
            return last
        pending = self._pending
        if pending is None or extras > pending.extras or not pending.is_after(not_before_ns):
            pending = self._pending = _Pending(extras)
            pending.future = asyncio.wrap_future(self._worker.submit(partial(self._take_pending, pending)))
            pending.future.add_done_callback(partial(self._settled, pending))
        return await self._answered(pending.future)

    def _fresh(self, not_before_ns: int, extras: bool) -> Snapshot | None:
        last = self._last
        if last is not None and last.monotonic_ns >= not_before_ns and (last.extras is not None or not extras):
            return last
        return None

    async def _answered(self, future: asyncio.Future[T]) -> T:
        try:
            return await self._worker.answer(future)
        except Hung:
            whom = f"process {self.pid}" if self.pid else "the process"
            raise KernelError(str(Hung(f"{whom}: a read"))) from None
        except Stopped:
            raise self._left() from None

    def _left(self) -> TargetGone:
        return TargetGone(f"target {self.pid} has exited, or is not measured any more")

    def _opened(self, future: asyncio.Future[Identity]) -> None:
        self._opening = None
        seen(future)

    def _settled(self, pending: "_Pending", future: asyncio.Future[Snapshot]) -> None:
        if self._pending is pending:
            self._pending = None
        seen(future)

    # On the sampler's thread

    def _open(self) -> Identity:
        if self._source is None:
            self._source = self._open_source()
        identity = self._source.identity()
        if self._recording is not None and self._recording.interval_s > 0 and self.recorder is None:
            self.recorder = Recorder(identity, self._recording)
            self._worker.every(self.recorder.interval_ns, self._beat)
        return identity

    def _take_pending(self, pending: "_Pending") -> Snapshot:
        pending.since_ns = time.monotonic_ns()
        return self._take(pending.extras, names=False)

    def _take_after(self, not_before_ns: int, extras: bool) -> Snapshot:
        """The end of a window, whose names are those of its threads."""
        last = self._fresh(not_before_ns, extras)
        return last if last is not None and self._named else self._take(extras)

    def _take(self, extras: bool, *, names: bool = True) -> Snapshot:
        assert self._source is not None
        if self._closed:
            raise self._left()
        try:
            why, last = None, self._read(extras, names)
            if self._last is not None and (why := contradiction(self._last, last)) is not None:
                self._reading += 1
                self._source.restart()
                last = self._read(extras, names)
            self._last, self._named = last, names
            self._identity = self._source.identity()
        except TargetGone as error:
            # Whoever is told that it is gone may look at once into the record for how it ended.
            if self.recorder is not None:
                self.recorder.failed(error)
            raise
        if self.recorder is not None:
            self.recorder.identify(self._identity)
            if why is not None and not self._contradicted:  # else a kernel that counts wrong would fill the record
                self.recorder.contradicted(why, last)
        self._contradicted = why is not None
        return last

    def _read(self, extras: bool, names: bool) -> Snapshot:
        assert self._source is not None
        snapshot = self._source.snapshot(extras=extras, names=names)
        self.snapshots_taken += 1
        return replace(snapshot, reading=self._reading) if self._reading else snapshot

    def _beat(self) -> bool:
        assert self.recorder is not None
        if self._closed:  # due between the release of the target and the end of the thread
            return False
        last = self._last
        fresh = last is not None and time.monotonic_ns() - last.monotonic_ns < SHARE_NS
        try:
            snapshot = last if last is not None and fresh else self._take(False, names=False)
        except SourceError as error:
            return self.recorder.failed(error)
        self.recorder.observe(snapshot)
        return True

    def _close(self) -> None:
        if self.recorder is not None:
            if self.recorder.ended is None:
                # One last look: a target that has just died is not to pass for one that was left alive.
                self._last = None
                self._beat()
            self.recorder.close()
        self._closed = True
        if self._source is not None:
            self._source.close()


_Key = tuple[Snapshot, int, bool]
"""Of a window: its first snapshot, its length in ms, and whether it has extras."""


@dataclass(slots=True, eq=False)
class _Window:
    """A window under way, and how many callers of each peer wait for it."""

    task: asyncio.Task[Measurement]
    waiting: Counter[Peer] = field(default_factory=Counter)


class _Pending:
    """A snapshot that has been asked for. Until it is begun, it is later than whatever anybody wants it to be."""

    def __init__(self, extras: bool) -> None:
        self.extras = extras
        self.since_ns: int | None = None
        self.future: asyncio.Future[Snapshot]

    def is_after(self, not_before_ns: int) -> bool:
        since_ns = self.since_ns
        return since_ns is None or since_ns >= not_before_ns
