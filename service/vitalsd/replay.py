"""A dead run as a target: the same API over a black box or a bug report, so that recipes go on working."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

from vitalsd.record import Mark, Record
from vitalsd.sampler import NotRecording
from vitalsd.snapshot import Identity, Measurement, Snapshot
from vitalsd.sources import TargetGone
from vitalsd.stored_history import read_history
from vitalsd.stored_run import UnreadableRun, read_run
from vitalsd.wire import iso

__all__ = ["Replay", "load"]

HISTORY_MEMBER = "runtime-history.json"
MAX_MEMBER_BYTES = 64 << 20


def load(path: Path) -> Record:
    """
    The record in a black box (``.sqlite``) or in a bug report (``.zip``).

    Raises:
        UnreadableRun: it is neither, or damaged; ``str(error)`` says what is wrong.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic.startswith(b"PK"):
        return read_run(path)[1]
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(HISTORY_MEMBER)
            if info.file_size > MAX_MEMBER_BYTES:
                raise UnreadableRun(f"{HISTORY_MEMBER} in {path.name} has {info.file_size} bytes")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnreadableRun(f"{HISTORY_MEMBER} in {path.name} is compressed as in no report")
            # Of the other methods, and by ZipFile.read, all there is would be unpacked, whatever the header says.
            with archive.open(info) as member:
                return read_history(member.read(info.file_size + 1))
    except KeyError:
        raise UnreadableRun(f"{path.name} has no {HISTORY_MEMBER}: it is no report with a history") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UnreadableRun(f"{path.name}: {error}") from None


class Replay:
    """
    A `vitalsd.targets.Target` that has ended: the past is all there, and nothing else.

    Args:
        record: as read by `load`.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.snapshots_taken = 0
        self.replayed = True
        last = record.last
        self._reason = "this is a replay" + (f" of a run that was last seen at {iso(last.wall_ns)}" if last else "")

    @property
    def platform(self) -> str:
        """That of the run."""
        return self.record.identity.platform

    @property
    def pid(self) -> int | None:
        """None: the pid of a dead run may be another process now."""
        return None

    async def identity(self) -> Identity:
        """The process that was recorded."""
        return self.record.identity

    async def window(self, window_ms: int, *, extras: bool = False) -> Measurement:
        """Raises `TargetGone`: there is no coming window."""
        raise TargetGone(f"{self._reason}; ask with mode=trailing or /history")

    async def snapshot(self) -> Snapshot:
        """Raises `TargetGone`: there is no now."""
        raise TargetGone(f"{self._reason}; it has no counters of now")

    async def mark_async(self, label: str) -> Mark:
        """Raises `NotRecording`."""
        raise NotRecording(f"{self._reason}; it takes no marks")

    def why_not_recorded(self) -> str:
        """It is."""
        return ""

    def recording_info(self) -> dict[str, Any]:
        """What the record holds."""
        return {
            "interval_ms": self.record.interval_ns // 1_000_000,
            "snapshots": len(self.record),
            "marks": len(self.record.marks),
            "ended": self._reason,
        }

    async def hangs(self) -> bool:
        """Nothing is read."""
        return False

    async def record_hangs(self) -> bool:
        """Nothing is written."""
        return False

    async def close(self) -> None:
        """Nothing is held."""
