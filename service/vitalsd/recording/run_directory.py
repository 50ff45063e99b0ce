"""List the runs in a directory, delete the oldest beyond a budget, and recover the runs of dead writers."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitalsd.recording.run_database import writable
from vitalsd.recording.run_files import (
    delete_run,
    disk_bytes,
    has_run_name,
    is_being_written,
    is_of,
    is_own_run,
)
from vitalsd.recording.run_reader import Run, UnreadableRunError, describe

__all__ = ["RunDirectory", "Scan"]

ALL_RUNS_BYTES = 64 << 20
"""Budget of all runs in the directory together, bytes."""
MAX_RUNS = 100
"""Number of runs that a sidecar leaves in the directory; only other programs add more."""
MAX_LISTED = 500
"""Limit of the runs that are read for a list: each takes up to 1 ms."""


class Scan(NamedTuple):
    """Hold what `RunDirectory.scan` found."""

    runs: list[Run]
    """Runs, the crashed ones first, then the newest first."""
    unreadable: dict[str, str]
    """Why a file is not among `runs`, by file name."""
    older: int
    """Number of files that were not read, because there are more than `MAX_LISTED`."""


class RunDirectory:
    """
    Manage all runs of this user, in one directory with a budget.

    To list and read runs writes nothing. A file is changed or deleted only if vitalsd wrote it, see
    `vitalsd.recording.run_files.check_own_run`; other files in the directory stay as they are and are not read.

    Args:
        path: the directory; made with mode 0700 if it does not exist.
        max_bytes: limit of all runs together; the oldest ones that have ended are deleted first.
    """

    def __init__(self, path: Path, *, max_bytes: int = ALL_RUNS_BYTES) -> None:
        self.path = path
        self.max_bytes = max_bytes

    def runs(self) -> list[Run]:
        """Return the runs on disk: crashed ones first, then the newest first; see `scan` for what it leaves out."""
        return self.scan().runs

    def scan(self) -> "Scan":
        """Read the directory: the newest `MAX_LISTED` runs, and why a file is not among them."""
        runs: list[Run] = []
        unreadable: dict[str, str] = {}
        files = sorted(self._files(), key=_modified_ns, reverse=True)
        for path in files[:MAX_LISTED]:
            if not has_run_name(path):
                unreadable[path.name] = f"{path.name} does not have the name of a run, so it is left alone"
                continue
            try:
                runs.append(describe(path))
            except UnreadableRunError as error:
                unreadable[path.name] = str(error)
            except OSError as error:
                unreadable[path.name] = f"{path.name} cannot be read: {error.strerror or error}"
        order = {"crashed": 0, "running": 1, "clean": 2}
        runs.sort(key=lambda run: (order[run.state], -(run.last_wall_ns or 0)))
        return Scan(runs, unreadable, max(0, len(files) - MAX_LISTED))

    def find(self, run_id: str) -> Run | None:
        """
        Return the run with this id; ``None`` if there is none.

        The id is compared with the names of files and never becomes a path.

        Raises:
            UnreadableRunError: the file of that run cannot be read.
            OSError: the file of that run cannot be read.
        """
        path = next((path for path in self._files() if path.stem == run_id and has_run_name(path)), None)
        return None if path is None else describe(path)

    def mark_reported(self, run: Run) -> bool:
        """
        Note that a report contains a crashed run; that applies to all records of the same process.

        Nothing is noted for a run that has not crashed: it may still crash, and no report has that crash.

        Returns:
            Whether it was noted.

        Raises:
            UnreadableRunError: the run cannot be written.
        """
        if run.state != "crashed":
            return False
        now = str(time.time_ns())
        self._note(run.path, "reported", now)
        for path in self._files():
            with suppress(UnreadableRunError, OSError):
                if is_of(path, run.identity.start_id) and not is_being_written(path):
                    self._note(path, "reported", now)
        return True

    def recover_crashed_runs(self, living: str | None = None) -> None:
        """
        Move the logs of runs to their files if the writer has died. What cannot be read or written stays as it is.

        Args:
            living: `Identity.start_id` of a process that lives. Its unfinished runs, from a sidecar that was killed or
                from before it executed itself again, count as ended and not as crashed.
        """
        for path in self._files():
            with suppress(UnreadableRunError, OSError):
                if has_run_name(path) and not is_being_written(path):
                    if living is not None and is_of(path, living):
                        self._note(path, "ended", "the process went on without it")
                    _apply_log(path)

    def make_room(self, spare_bytes: int) -> None:
        """Delete ended runs that vitalsd wrote, oldest first, until there is room for one more, of `spare_bytes`."""
        files = sorted(filter(is_own_run, self._files()), key=_modified_ns)
        total, count = sum(map(disk_bytes, files)), len(files)
        for path in files:
            if total + spare_bytes <= self.max_bytes and count < MAX_RUNS:
                return
            if not is_being_written(path):
                total, count = total - disk_bytes(path), count - 1
                delete_run(path)

    def _note(self, path: Path, key: str, value: str) -> None:
        """Write a value of ``meta``, unless there is one for `key`."""
        with writable(path) as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            db.commit()

    def _files(self) -> list[Path]:
        try:
            return [path for path in self.path.glob("*.sqlite") if path.is_file() and not path.is_symlink()]
        except OSError:
            return []


def _apply_log(path: Path) -> None:
    """Move what is in the log of a run that ended to its file, which keeps its time."""
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size:
        status = path.stat()
        with writable(path):
            pass
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _modified_ns(path: Path) -> int:
    """Return when a file was last written; 0 if it has just been deleted."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
