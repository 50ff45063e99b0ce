"""Record one process: feed record and black box, and note events such as missed snapshots or a stopped target."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Annotated, Literal, NamedTuple, NotRequired, Protocol

from typing_extensions import TypedDict

from vitalsd.contract.application import Application
from vitalsd.contract.shapes import Count, Doc
from vitalsd.contract.signals_page import SignalsPage
from vitalsd.recording.black_box import BlackBox
from vitalsd.recording.heartbeat_watch import Hang
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import State
from vitalsd.recording.series import Event, EventKind, Mark, Record
from vitalsd.snapshot import HALTED, SUSPEND_GRAIN_NS, Identity, Part, Snapshot, reaped_within
from vitalsd.sources.base import SourceError, TargetGoneError
from vitalsd.worker_thread import consume_exception

__all__ = ["NoRecorder", "NotRecordingError", "Recorder", "RecorderConfig", "RecorderJson", "TargetRecorder"]

FIGURES_EVERY_NS = 900_000_000
"""Least age of the last figures at which the recorder reads them again, ns: once a second, whatever the interval."""
CLOCK_STEP_NS = 500_000_000
"""Least step of the wall clock against the clock since boot, ns: with less it was slewed or read late, and not set."""
HANG_EVERY_NS = 5_000_000_000
"""Length, by which a hang that lasts must have grown for another report to the black box, ns."""
MARK_S = 0.05
"""A caller that sets a mark waits at most this long for the disk, s."""


class BlackBoxJson(TypedDict):
    """The record on disk."""

    run: Annotated[str | None, Doc("Its id in `/runs`.")]
    error: Annotated[str | None, Doc("Why nothing is written to disk any more; null while it is.")]
    dropped: Annotated[Count, Doc("Snapshots that did not get to disk.")]


class RecorderJson(TypedDict):
    """The record. A replay has the fields without a default alone."""

    interval_ms: Annotated[Count, Doc("Intended time between two snapshots, ms.")]
    snapshots: Annotated[Count, Doc("Snapshots in the record.")]
    marks: Annotated[Count, Doc("Marks in the record.")]
    ended: Annotated[str | None, Doc("Why there will be no more snapshots; null while there will.")]
    state: Annotated[State, Doc("running, or how the target ended.")]
    retention_secs: NotRequired[Annotated[Count | None, Doc("How much history is kept, s.")]]
    max_bytes: NotRequired[Annotated[Count | None, Doc("Memory it may use, bytes.")]]
    size_bytes: NotRequired[Annotated[Count | None, Doc("Memory it uses, bytes.")]]
    missed: NotRequired[Annotated[Count | None, Doc("Snapshots that could not be taken in time.")]]
    black_box: NotRequired[Annotated[BlackBoxJson | None, Doc("null: kept in memory only.")]]


class RecorderConfig(NamedTuple):
    """Configure a recorder: a snapshot every `interval_s` seconds, `retention_s` back, within `max_bytes` of memory."""

    interval_s: float = 1.0
    retention_s: float = 900.0
    max_bytes: int = 32 << 20
    runs: RunDirectory | None = None
    """Directory of the black box; ``None``: there is no black box."""
    application: Application = Application()
    """The application that the client named; stored in the black box."""
    children: bool = False
    """Whether the descendants of the target are recorded, with their names."""
    page: SignalsPage | None = None
    """Page of heartbeats and gauges of the target; ``None``: there is none."""
    exits_itself: Callable[[], bool] = bool
    """Returns whether the target has noted that it exits by itself; called where the kernel does not report the end."""


class NotRecordingError(Exception):
    """Report that the request needs a recorder, and there is none."""


class TargetRecorder(Protocol):
    """Record any target: a live one (`Recorder`), a replay, or one that is not recorded (`NoRecorder`)."""

    @property
    def record(self) -> Record | None:
        """The record; ``None``: there is none."""
        ...

    @property
    def why_not_recorded(self) -> str:
        """Why there is no record, and what to do; empty: there is one."""
        ...

    async def mark_async(self, label: str) -> Mark:
        """Put a label on the clock. Raise `NotRecordingError`, or `ValueError` as `Record.add_mark` does."""
        ...

    def info(self) -> RecorderJson | None:
        """Return the state of the recorder for ``GET /info``; ``None``: there is none."""
        ...

    async def hangs(self) -> bool:
        """Return whether the disk of the black box does not answer."""
        ...


class NoRecorder:
    """
    Stand in for the recorder of a target that is not recorded.

    Args:
        why_not_recorded: the reason, and what to do.
    """

    record: Record | None = None
    blackbox: BlackBox | None = None

    def __init__(self, why_not_recorded: str) -> None:
        self.why_not_recorded = why_not_recorded

    def mark(self, label: str) -> Mark:
        """Raise `NotRecordingError`."""
        raise NotRecordingError(self.why_not_recorded)

    async def mark_async(self, label: str) -> Mark:
        """Raise `NotRecordingError`."""
        raise NotRecordingError(self.why_not_recorded)

    def info(self) -> RecorderJson | None:
        """Return ``None``."""
        return None

    async def hangs(self) -> bool:
        """Return False: nothing is written."""
        return False

    def crashed(self, ended: str) -> None:
        """Do nothing: there is no record of the end."""

    def close_in_child(self) -> None:
        """Do nothing: nothing is held."""


class Recorder:
    """
    Record one run. `identify`, `observe` and `failed` are called on the sampler's thread, `mark` on any.

    Args:
        identity: the target.
        config: the settings.
    """

    def __init__(self, identity: Identity, config: RecorderConfig) -> None:
        interval_ns = round(config.interval_s * 1e9)
        retention_ns = round(config.retention_s * 1e9)
        self.interval_ns = interval_ns
        self.record = Record(identity, interval_ns=interval_ns, retention_ns=retention_ns, max_bytes=config.max_bytes)
        self.blackbox = (
            BlackBox(
                config.runs,
                identity,
                interval_ns=interval_ns,
                retention_ns=retention_ns,
                application=config.application,
            )
            if config.runs
            else None
        )
        self.missed = 0
        """Intervals without a snapshot."""
        self.ended: str | None = None
        """Why there will be no more snapshots; ``None``: there will be."""
        self.why_not_recorded = ""
        self._exits_itself = config.exits_itself
        self._figures = Part.FIGURES | Part.CHILDREN if config.children else Part.FIGURES
        self._figures_ns: int | None = None
        """Monotonic time of the last snapshot with figures."""
        self._reaped: tuple[int, int] | None = None
        """Monotonic time of the last reading of `ProcessFigures.reaped_ns`, and its value."""
        self._crashed = False
        self._failure: str | None = None
        self._last_words: str | None = None
        self._halted: str | None = None
        """What kept the target from running at the last snapshot, a key of `HALTED`."""
        self._offset_ns = 0
        """Distance of the wall clock from the clock since boot, ns."""
        self._stepped: Snapshot | None = None
        """The last snapshot, if the wall clock seems to have been set before it."""

    @property
    def state(self) -> Literal["running", "clean", "crashed"]:
        """Whether the target is still recorded, and if not, how it ended."""
        return "running" if self.ended is None else "crashed" if self._crashed else "clean"

    def identify(self, identity: Identity) -> None:
        """Note the current identity of the target, which may change: exec changes its name, for example."""
        if identity != self.record.identity:
            self.record.identity = identity
            if self.blackbox is not None:
                self.blackbox.identify(identity)

    def contradicted(self, why: str, snapshot: Snapshot) -> None:
        """Note that the CPU counters contradicted each other, and were read again from the start for `snapshot`."""
        self._note("inconsistent", f"{why}; the threads have no figure there, and were read anew", snapshot)

    def next_parts(self, now_ns: int) -> Part:
        """Return what the next snapshot of the record must have beside its counters."""
        if self._figures_ns is not None and now_ns - self._figures_ns < FIGURES_EVERY_NS:
            return Part.NONE
        return self._figures

    def observe(self, snapshot: Snapshot) -> None:
        """Record a snapshot, taken after all others."""
        if not self._figures & ~snapshot.parts:
            self._figures_ns = snapshot.monotonic_ns
        before = self.record.last
        if before is None:
            self._offset_ns = snapshot.wall_ns - snapshot.boottime_ns
        else:
            if snapshot.monotonic_ns <= before.monotonic_ns:
                return
            self._compare(before, snapshot)
        self._compare_children(snapshot)
        self._failure = None
        segment = self.record.append(snapshot)
        if self.blackbox is not None:
            self.blackbox.append(segment, len(segment) - 1)

    def note_hang(self, hang: Hang) -> None:
        """
        Note a hang, in place of the last report of it.

        The black box gets the first report and the last one, and one every 5 s between them, because the target may be
        killed while it hangs.
        """
        event = Event(
            hang.wall_ns,
            hang.monotonic_ns,
            "hang",
            hang.detail,
            duration_ns=hang.duration_ns,
            heartbeat=hang.heartbeat,
            cause=hang.cause,
            ongoing=hang.ongoing,
        )
        before = self.record.put_hang(event)
        since_ns = hang.duration_ns // HANG_EVERY_NS - ((before and before.duration_ns) or 0) // HANG_EVERY_NS
        if self.blackbox is not None and (before is None or since_ns or not hang.ongoing):
            self.blackbox.write_event(event)

    def failed(self, error: SourceError) -> bool:
        """Note that there is no snapshot this time; False if there will be no other."""
        if self.ended is not None:
            return False
        reason = str(error)
        if isinstance(error, TargetGoneError):
            exit_status = error.exit_status
            if exit_status is not None:
                reason = f"target {self.record.identity.pid} has exited: {exit_status.description}"
            self.ended = reason
            self._crashed = not (self._exits_itself() if exit_status is None else exit_status.is_clean)
            self._note("exited", self.ended)
            if self.blackbox is not None:
                self.blackbox.end(self.ended, crashed=self._crashed)
            return False
        if reason != self._failure:
            self._failure = reason
            self._note("failed", reason)
        return True

    def crashed(self, ended: str) -> None:
        """Note that the target, which still runs, is about to end by a crash."""
        self._last_words = ended

    def mark(self, label: str) -> Mark:
        """
        Put a label on the clock. Raise `ValueError` as `Record.add_mark` does.

        What a program marks may kill it. So this returns when the mark is on disk, or after 50 ms; while the disk is
        slow, only the first callers wait.
        """
        slow = self.blackbox is not None and self.blackbox.is_lagging
        mark, written = self._mark(label)
        if written is not None and not slow:
            wait((written,), MARK_S)
        return mark

    async def mark_async(self, label: str) -> Mark:
        """Put a label on the clock, see `mark`, without blocking the event loop."""
        mark, written = self._mark(label)
        if written is not None:
            waited = asyncio.wrap_future(written)
            waited.add_done_callback(consume_exception)  # the writer may be ending
            await asyncio.wait((waited,), timeout=MARK_S)
        return mark

    def _mark(self, label: str) -> "tuple[Mark, Future[None] | None]":
        mark = self.record.add_mark(label)
        return mark, self.blackbox.write_mark(mark) if self.blackbox is not None else None

    def info(self) -> RecorderJson:
        """Return the state of the recorder and of the black box, for ``/info``."""
        record, blackbox = self.record, self.blackbox
        return {
            "interval_ms": self.interval_ns // 1_000_000,
            "retention_secs": record.retention_ns // 1_000_000_000,
            "max_bytes": record.max_bytes,
            "size_bytes": record.size_bytes,
            "snapshots": len(record),
            "missed": self.missed,
            "marks": len(record.marks),
            "ended": self.ended,
            "state": self.state,
            "black_box": {"run": blackbox.run_id, "error": blackbox.error, "dropped": blackbox.dropped}
            if blackbox
            else None,
        }

    async def hangs(self) -> bool:
        """Return whether the disk of the black box does not answer."""
        return self.blackbox is not None and await self.blackbox.worker.hangs()

    def close_in_child(self) -> None:
        """Leave the black box to the parent process, in a forked child."""
        if self.blackbox is not None:
            self.blackbox.close_in_child()

    def close(self) -> None:
        """End the run: as clean, unless the target has crashed, as far as is known."""
        if self.blackbox is not None:
            crashed = self._crashed or self._last_words is not None
            self.blackbox.close(self.ended or self._last_words or "the sidecar was stopped", crashed=crashed)

    def _compare(self, before: Snapshot, now: Snapshot) -> None:
        elapsed_ns = now.monotonic_ns - before.monotonic_ns
        asleep_ns = now.boottime_ns - before.boottime_ns - elapsed_ns
        if asleep_ns >= SUSPEND_GRAIN_NS:
            self._note("suspended", f"the machine slept {asleep_ns / 1e9:.1f} s", now)
        missed = (elapsed_ns + self.interval_ns // 2) // self.interval_ns - 1
        if missed > 0:
            self.missed += missed
            self._note("missed", f"{missed} snapshots are missing before this one", now)
        if before.image != now.image and None not in (before.image, now.image):
            self._note("executed", f"the target executed another program: {self.record.identity.name}", now)
        if (halted := _halted(before, now)) != self._halted:
            self._halted = halted
            if halted is None:
                self._note("continued", "the target runs again", now)
            else:
                self._note("stopped", HALTED[halted], now)
        self._compare_clocks(now)

    def _compare_children(self, now: Snapshot) -> None:
        """Note children that the target waited for, and that used more CPU time than fits since the last reading."""
        if now.tree is not None or now.figures is None or now.figures.reaped_ns is None:
            return
        before, self._reaped = self._reaped, (now.monotonic_ns, now.figures.reaped_ns)
        if before is None:
            return
        elapsed_ns, reaped_ns = now.monotonic_ns - before[0], now.figures.reaped_ns - before[1]
        if not reaped_within(reaped_ns, elapsed_ns, now.cpu_count):
            self._note(
                "child_reaped",
                f"the target waited for children that had used {reaped_ns / 1e9:.1f} s of CPU time, most of it earlier;"
                " with --children they are counted while they live",
                now,
            )

    def _compare_clocks(self, now: Snapshot) -> None:
        """
        Note a wall clock that was set.

        The two clocks are read one after the other, and the kernel may have interrupted the sidecar in between. So only
        a step that the next snapshot confirms is noted.
        """
        offset_ns = now.wall_ns - now.boottime_ns
        stepped, self._stepped = self._stepped, None
        if abs(offset_ns - self._offset_ns) < CLOCK_STEP_NS:
            self._offset_ns = offset_ns  # the clock may be slewed
        elif stepped is not None and abs(offset_ns - (stepped.wall_ns - stepped.boottime_ns)) < CLOCK_STEP_NS:
            seconds = (offset_ns - self._offset_ns) / 1e9
            self._note("clock_set", f"the wall clock was set {_forward(seconds)}", stepped)
            self._offset_ns = offset_ns
        else:
            self._stepped = now

    def _note(self, kind: EventKind, detail: str, at: Snapshot | None = None) -> None:
        event = self.record.add_event(kind, detail, at=at)
        if self.blackbox is not None:
            self.blackbox.write_event(event)


def _halted(before: Snapshot, now: Snapshot) -> str | None:
    """
    Return what keeps the target from running, a key of `HALTED`.

    A traced program stops for a moment at each system call, so only one that used no CPU time counts as stopped.
    """
    if now.state == "traced" and now.cpu_ns != before.cpu_ns:
        return None
    return now.state if now.state in HALTED else None


def _forward(seconds: float) -> str:
    return f"{'forward' if seconds > 0 else 'back'} by {abs(seconds):.1f} s"
