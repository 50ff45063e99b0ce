"""Return the last crashed run of a client application, to ask its user about at the next start."""

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
from vitalsd_client.redaction import redact_host_details

__all__ = ["Crash", "last_crash"]

log = logging.getLogger("vitalsd_client")

BUDGET_S = 2.0
"""Time limit of `last_crash`, s, even if the disk hangs: it runs at the start of the client."""


@dataclass(frozen=True)
class Crash:
    """Describe a run of the application that ended by a crash and that no report contains yet."""

    run_id: str
    application: Application
    name: str
    """Name of its process, from the kernel."""
    pid: int
    started_at: datetime
    """UTC."""
    last_seen: datetime | None
    """Time of its last snapshot, UTC; ``None``: it has no snapshot."""
    ended: str | None
    """End of the process for use in a sentence, as ``killed by SIGSEGV``; ``None``: its sidecar ended with it."""
    snapshots: int
    """Number of recorded snapshots."""
    _run: Run = field(repr=False)
    _directory: RunDirectory = field(repr=False)
    _subject: ReportSubject = field(repr=False)
    _last_wall_ns: int = field(repr=False)

    @cached_property
    def history(self) -> Mapping[str, Any]:
        """
        Return the recording in the form of ``/runs/{id}/history``: CPU, memory, threads, marks and events.

        The first use reads it from disk, which takes up to a second for a run of hours.

        Raises:
            UnreadableRunError: the file is damaged.
            OSError: it cannot be read, or is no longer there.
        """
        table: dict[str, Any] = json.loads(member(self._run, read_run(self._run.path)[1]))
        return table

    @property
    def marks(self) -> list[str]:
        """Return the labels of its marks, oldest first. Raises what `history` raises."""
        return [mark["label"] for mark in self.history["marks"]]

    def dismiss(self) -> bool:
        """
        Exclude this run and older crashed ones of the application from `last_crash` and from reports.

        Call it when the user declines to report the crash, so that the next start does not ask about an older one.

        Returns:
            False if the disk cannot be written; then the next start finds the run again.
        """
        try:
            runs = {run.id: run for run in self._directory.runs() if (run.last_wall_ns or 0) <= self._last_wall_ns}
            alive = is_alive()
            while (run := choose([run.to_json() for run in runs.values()], self._subject, alive).run) is not None:
                self._directory.mark_reported(runs.pop(run["id"]))
        except (UnreadableRunError, OSError) as error:
            log.warning("the crashed run %s could not be dismissed: %s", self.run_id, redact_host_details(str(error)))
            return False
        return True


def last_crash(app: str | None = None) -> Crash | None:
    """
    Return the newest crashed run of an application that no report contains yet; ``None``: there is none.

    It reads the disk, with or without a running sidecar, and writes nothing: the run does not count as reported. It
    returns within 2 s. Damaged files and a disk that hangs are logged, not raised.

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
        log.warning("the last crash is not known: %s: %s", type(error).__name__, redact_host_details(str(error)))
        return None


def _read(app: str | None) -> Crash | None:
    """Find the run on the disk; this may hang, so `last_crash` runs it on a thread of its own."""
    directory = run_directory()
    if directory is None:
        return None
    subject = own_subject(app, None)
    found = find(directory, subject, None, read=False)
    if found.run is None:
        if found.failure is not None:
            log.info("%s", redact_host_details(found.failure.reason))
        return None
    return _crash(found.run, directory, subject)


def _crash(run: Run, directory: RunDirectory, subject: ReportSubject) -> Crash:
    """Return the `Crash` of a run, with its times as UTC."""

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
