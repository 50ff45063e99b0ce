"""Ask at the start of a client whether its last run crashed."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from vitalsd.contract.application import Application, check_app
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import Run, UnreadableRunError, read_run
from vitalsd.report.previous_run import ReportSubject, choose, find, is_alive, member
from vitalsd_client.daemon_call import Call
from vitalsd_client.recorded_data import own_subject, run_directory
from vitalsd_client.redaction import harmless

__all__ = ["Crash", "last_crash"]

log = logging.getLogger("vitalsd_client")

BUDGET_S = 2.0
"""`last_crash` returns within this time, whatever the disk does."""


@dataclass(frozen=True)
class Crash:
    """A run of the application that did not end well and that no report contains yet."""

    run_id: str
    application: Application
    name: str
    """Of its process, as the kernel has it."""
    pid: int
    started_at: datetime
    """UTC."""
    last_seen: datetime | None
    """When its last snapshot was taken, UTC; ``None``: none was."""
    ended: str | None
    """How it ended, for a sentence, as in ``killed by SIGSEGV``; ``None``: its sidecar ended at the same time."""
    snapshots: int
    """Recorded."""
    _run: Run = field(repr=False)
    _directory: RunDirectory = field(repr=False)
    _subject: ReportSubject = field(repr=False)
    _last_wall_ns: int = field(repr=False)

    @cached_property
    def history(self) -> Mapping[str, Any]:
        """
        What was recorded, as ``/runs/{id}/history`` shows it: CPU, memory, threads, marks and events.

        It is read from disk at the first use, which takes up to a second for a run of hours.

        Raises:
            UnreadableRunError: the file is damaged.
            OSError: it cannot be read, or is no longer there.
        """
        table: dict[str, Any] = json.loads(member(self._run, read_run(self._run.path)[1]))
        return table

    @property
    def marks(self) -> list[str]:
        """The labels of its marks, oldest first; raises what `history` raises."""
        return [mark["label"] for mark in self.history["marks"]]

    def dismiss(self) -> bool:
        """
        Leave this run and older crashed ones of the application out of `last_crash` and of reports from now on.

        To be called when the user does not want to report it: no later start is to ask about an older one.

        Returns:
            False if that cannot be written; then the next start finds the run again.
        """
        try:
            runs = {run.id: run for run in self._directory.runs() if (run.last_wall_ns or 0) <= self._last_wall_ns}
            alive = is_alive()
            while (run := choose([run.to_json() for run in runs.values()], self._subject, alive).run) is not None:
                self._directory.mark_reported(runs.pop(run["id"]))
        except (UnreadableRunError, OSError) as error:
            log.warning("the crashed run %s could not be dismissed: %s", self.run_id, harmless(str(error)))
            return False
        return True


def last_crash(app: str | None = None) -> Crash | None:
    """
    Return the newest crashed run of an application that no report contains yet; ``None``: there is none.

    It reads the disk, with or without a sidecar, changes nothing, never raises for what it finds there, and returns
    within 2 s. To call it does not count as reporting the run.

    Args:
        app: application id, as given to ``spawn``, ``start`` or ``serve``; ``None``: the program of this process
            decides, which is less reliable, see docs/embedding.md.

    Raises:
        ValueError: `app` cannot be an application id.
    """
    if app is not None:
        check_app(app)
    try:
        call = Call(lambda: _read(app))
        if not call.wait(BUDGET_S):
            log.warning("the last crash is not known: the directory of runs was not read within %g s", BUDGET_S)
            return None
        return call.result()
    except Exception as error:  # noqa: BLE001 - a client must start whatever is on the disk
        log.warning("the last crash is not known: %s: %s", type(error).__name__, harmless(str(error)))
        return None


def _read(app: str | None) -> Crash | None:
    directory = run_directory()
    if directory is None:
        return None
    subject = own_subject(app, None)
    found = find(directory, subject, None, read=False)
    if found.run is None:
        if found.failure is not None:
            log.info("%s", harmless(found.failure.reason))
        return None
    return _crash(found.run, directory, subject)


def _crash(run: Run, directory: RunDirectory, subject: ReportSubject) -> Crash:
    def moment(unix_ns: int) -> datetime:
        return datetime.fromtimestamp(unix_ns / 1e9, UTC)

    return Crash(
        run_id=run.id,
        application=run.application,
        name=run.identity.name,
        pid=run.identity.pid,
        started_at=moment(run.identity.started_unix_ns),
        last_seen=None if run.last_wall_ns is None else moment(run.last_wall_ns),
        ended=run.ended and run.ended.removeprefix(f"target {run.identity.pid} has exited: "),
        snapshots=run.snapshots,
        _run=run,
        _directory=directory,
        _subject=subject,
        _last_wall_ns=run.last_wall_ns or 0,
    )
