"""Serve a recorded run, or a bug report, as a target: with the same API, so that the same commands work."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from typing_extensions import TypedDict

from vitalsd.admission import OWNER, Peer
from vitalsd.contract.application import Application
from vitalsd.contract.host import RecordedHost
from vitalsd.contract.shapes import Doc
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.hangs import HeartbeatStatus
from vitalsd.recording.recorder import NotRecordingError, RecorderJson
from vitalsd.recording.replay_file import RecordedRun, ReplayFile, ReportCardJson
from vitalsd.recording.run_reader import RunJson
from vitalsd.recording.series import Mark, Record
from vitalsd.snapshot import Identity, Measurement, Part, Snapshot
from vitalsd.sources.base import TargetGoneError
from vitalsd.text import iso

__all__ = ["Replay", "ReplayRecorder", "ReplayedJson"]


class ReplayedJson(TypedDict):
    """A file that is replayed."""

    file: str
    run: Annotated[RunJson, Doc("The run that `/history` shows: the crashed one if there is one.")]
    report: Annotated[ReportCardJson | None, Doc("null: the file is not a report.")]


class ReplayRecorder:
    """
    Show the record of a replay as `Recorder` shows that of a live target.

    Args:
        recorded: the run that is replayed.
        ended: how it ended, in words.
    """

    why_not_recorded = ""

    def __init__(self, recorded: RecordedRun, ended: str) -> None:
        self.record: Record = recorded.record
        self._state = recorded.run.state
        self._ended = ended

    async def mark_async(self, label: str) -> Mark:
        """Raise `NotRecordingError`."""
        raise NotRecordingError(f"{self._ended}; it takes no marks")

    def info(self) -> RecorderJson:
        """Return the state of the record as ``GET /info`` shows it."""
        return {
            "interval_ms": self.record.interval_ns // 1_000_000,
            "snapshots": len(self.record),
            "marks": len(self.record.marks),
            "ended": self._ended,
            "state": self._state,
        }

    async def hangs(self) -> bool:
        """Return False: nothing is written."""
        return False


class Replay:
    """
    Serve as a `vitalsd.sampling.target_pool.PooledTarget` that has ended: with a record, but without measurements.

    Args:
        file: as read by `read_replay_file`.
    """

    def __init__(self, file: ReplayFile) -> None:
        self.file = file
        self.snapshots_taken = 0
        self.heartbeats: Sequence[HeartbeatStatus] = ()
        self.gauges: Mapping[str, float] = {}
        self.hang_counts: Mapping[tuple[str, HangCause], int] = {}
        self.replay: Replay | None = self
        run = file.opened.run
        how = {"crashed": "crashed", "running": "was running", "clean": "ended"}[run.state]
        ended = f": {run.ended}" if run.ended else ""
        last = f"; last recorded at {iso(run.last_wall_ns)}" if run.last_wall_ns is not None else ""
        reason = f"this is a replay of {file.name}: {run.identity.name} {how}{ended}{last}"
        self._reason = reason
        self.recorder = ReplayRecorder(file.opened, reason)

    @property
    def platform(self) -> str:
        """The platform of the run."""
        return self.recorder.record.identity.platform

    @property
    def application(self) -> Application:
        """The application that was recorded."""
        return self.file.opened.run.application

    @property
    def host(self) -> RecordedHost:
        """The machine that was recorded."""
        return self.file.opened.run.host

    @property
    def pid(self) -> int | None:
        """None: the pid of a recorded process may be that of another process now."""
        return None

    def find(self, run_id: str) -> RecordedRun | None:
        """Return the run with this id; ``None``: the file has none."""
        return next((each for each in (self.file.opened, *self.file.others) if each.run.id == run_id), None)

    def to_json(self) -> ReplayedJson:
        """Return what ``GET /info`` shows of the file."""
        card = self.file.card
        return {
            "file": self.file.name,
            "run": self.file.opened.run.to_json(),
            "report": None if card is None else card.to_json(),
        }

    async def identity(self) -> Identity:
        """Return the process that was recorded."""
        return self.recorder.record.identity

    async def window(self, window_ms: int, *, parts: Part = Part.NONE, peer: Peer = OWNER) -> Measurement:
        """Raise `TargetGoneError`: there is no coming window."""
        raise TargetGoneError(f"{self._reason}; ask with mode=trailing or /history")

    async def snapshot(self) -> Snapshot:
        """Raise `TargetGoneError`: nothing is measured now."""
        raise TargetGoneError(f"{self._reason}; it has no current counters")

    async def check_alive(self) -> None:
        """Raise `TargetGoneError`."""
        raise TargetGoneError(self._reason)

    async def hangs(self) -> bool:
        """Return False: nothing is read."""
        return False

    async def close(self) -> None:
        """Do nothing: nothing is held."""
