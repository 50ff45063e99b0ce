"""Collect the recorded members of a report from the sidecar, or from the disk if no sidecar can be asked."""

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from vitalsd.contract.application import Application
from vitalsd.contract.host import RecordedHost
from vitalsd.contract.report_archive import HISTORY, MARKS, PREVIOUS_RUN, Failure, previous_run
from vitalsd.discovery.http_connection import Answer, ExchangeError
from vitalsd.report.builder import Collected
from vitalsd.report.previous_run import TOP_THREADS, ReportSubject, choose, find, is_alive, member
from vitalsd_client.locate import NoSidecarError, RunningSidecar, locate, refusal, responsive
from vitalsd_client.redaction import redact_host_details

__all__ = ["RecordedData", "own_subject", "run_directory"]

DISK_S = 0.5
"""Part of the time reserved for the disk if a sidecar hangs, s."""
STATES = ("running", "clean", "crashed")
MAX_REASON = 1000
"""Limit for the reason why runs were left out, characters: it lists the runs and the remedy."""
MAX_RUN_ID = 128
"""Limit for the id of a run that a sidecar sends, characters."""
ALL_S = 86_400
"""Longest history that a sidecar returns, s: one day."""


class RecordedData:
    """
    Collect the history, the marks and the crashed run of one application for a report.

    Args:
        app: application id of the report.
        seconds: length of the history, s.
        url: URL of a sidecar, instead of discovery.
        socket: path of its Unix socket, instead of discovery.
        pid: the recorded process; ``None``: this process.
        run_id: the earlier run to include; ``None``: the newest crashed run that no report contains.
        running: False: no process of the application runs, so no sidecar is asked.
    """

    def __init__(
        self,
        app: str | None,
        seconds: int,
        *,
        url: str | None,
        socket: str | os.PathLike[str] | None,
        pid: int | None,
        run_id: str | None,
        running: bool,
    ) -> None:
        self._app = app
        self._seconds = seconds
        self._url, self._socket, self._pid = url, socket, pid
        self._run_id = run_id
        self._running = running
        self._sidecar: RunningSidecar | None = None
        """The sidecar that returned the crashed run; ``None``: the run was read from disk."""

    def collect(self, into: Collected, deadline: float) -> None:
        """
        Add members and failures; turn errors of sidecars and of the disk into failures.

        Args:
            into: extended in place.
            deadline: monotonic time, s.
        """
        reason, asked = "no process of the application is running", False
        if self._running:
            reason, asked = self._ask(into, deadline - DISK_S)
        if reason:
            missing = [name for name in (HISTORY, MARKS, PREVIOUS_RUN) if name not in into.members]
            into.failures += [Failure(name, reason) for name in missing][:1]
        if not asked:
            self._read_disk(into)

    def mark_reported(self, run_ids: Sequence[str], deadline: float) -> None:
        """Mark the runs as reported, by the sidecar or on disk. If that fails, the next report contains them again."""
        for run_id in run_ids:
            if not self._marked_by_sidecar(run_id, deadline):
                directory = run_directory()
                if directory is not None and (run := directory.find(run_id)) is not None:
                    directory.mark_reported(run)

    def _marked_by_sidecar(self, run_id: str, deadline: float) -> bool:
        """Return whether the sidecar marked the run as reported."""
        if self._sidecar is not None:
            with suppress(ExchangeError):
                path = f"/runs/{quote(run_id, safe='')}/reported"
                return self._sidecar.get(path, method="POST", deadline=deadline).status == 200
        return False

    def _ask(self, into: Collected, deadline: float) -> tuple[str, bool]:
        """Return why a member is missing, and whether the sidecar was asked for the crashed run."""
        asked = False
        try:
            found = locate(url=self._url, socket=self._socket, pid=self._pid)
            sidecar = next(responsive(found, deadline, []))
            if sidecar.pid is not None:
                # Its recording is of another process than that of this report.
                raise NoSidecarError("the sidecar that answers watches another process, and has no record of this one")
            with sidecar.connected(deadline) as request:
                info = _json(request("/info"), dict)[0]
                into.application = Application.checked(info.get("app"), info.get("app_version"))
                if (replay := info.get("replay")) is not None:
                    into.host = RecordedHost.read(replay["run"]["host"])
                if (recorder := info.get("recorder")) is not None:
                    state, ended = recorder.get("state"), recorder.get("ended")
                    into.target = {
                        "state": state if state in STATES else None,
                        "ended": None if ended is None else redact_host_details(str(ended)),
                    }
                    own = (recorder.get("black_box") or {}).get("run")
                    if state == "crashed" and own:
                        into.runs[_run_id(own)] = HISTORY
                query = {"seconds": self._seconds, "top": TOP_THREADS}
                into.members[HISTORY] = _json(request("/history", query), dict)[1]
                into.members[MARKS] = _json(request("/marks"), list)[1]
                asked = True
                self._sidecar = sidecar
                self._ask_for_run(request, info, into)
        except (NoSidecarError, ExchangeError) as error:
            return redact_host_details(str(error)), asked
        except Exception as error:  # noqa: BLE001 - an unexpected answer must not prevent the report
            return f"the sidecar's record is not understood: {type(error).__name__}", asked
        return "", asked

    def _ask_for_run(self, request: Callable[..., Answer], info: Mapping[str, Any], into: Collected) -> None:
        """Add the crashed run that the sidecar lists, or a failure. Raises `ExchangeError`, `ValueError`."""
        runs, _ = _json(request("/runs"), list)
        if self._run_id is None:
            choice = choose(runs, ReportSubject.of(self._app, info["target"], into.application.app), is_alive())
            run = choice.run
            if choice.reason is not None:
                into.failures.append(Failure(PREVIOUS_RUN, redact_host_details(choice.reason, MAX_REASON)))
        else:
            run = next((each for each in runs if each.get("id") == self._run_id), None)
            if run is None:
                into.failures.append(Failure(PREVIOUS_RUN, f"the sidecar has no run with the id {self._run_id!r:.80}"))
        if run is not None:
            run_id = _run_id(run["id"])
            answer = request(f"/runs/{quote(run_id, safe='')}/history", {"seconds": ALL_S, "top": TOP_THREADS})
            into.members[PREVIOUS_RUN] = previous_run(run, _json(answer, dict)[1])
            into.runs[run_id] = PREVIOUS_RUN

    def _read_disk(self, into: Collected) -> None:
        """Add the crashed run from the directory of runs, or a failure."""
        directory = run_directory()
        if directory is None:
            refused = _is_there()
            if self._run_id is not None or refused:
                reason = "this user has no directory of runs"
                if refused:
                    reason = "it is no directory of this user, or other users may write it"
                into.failures.append(Failure(PREVIOUS_RUN, f"the directory of runs cannot be read: {reason}"))
            return
        subject = own_subject(self._app, self._pid) if self._running else ReportSubject(self._app)
        found = find(directory, subject, self._run_id)
        if found.failure is not None:
            into.failures.append(Failure(PREVIOUS_RUN, redact_host_details(found.failure.reason)))
        if found.run is not None and found.record is not None:
            into.members[PREVIOUS_RUN] = member(found.run, found.record)
            into.runs[found.run.id] = PREVIOUS_RUN
            if not self._running:
                into.application = found.run.application


def run_directory() -> Any:
    """Return the `RunDirectory` of this user; ``None``: there is none, or other users may write it."""
    from vitalsd.discovery.directories import EndpointError, state_path
    from vitalsd.recording.run_directory import RunDirectory

    try:
        path = state_path() / "runs"
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
    except (EndpointError, OSError):
        return None
    return RunDirectory(path)


def _is_there() -> bool:
    """Return whether there is anything at the path of the directory of runs."""
    from vitalsd.discovery.directories import EndpointError, state_path

    with suppress(EndpointError, OSError):
        return os.path.lexists(state_path() / "runs")
    return False


def own_subject(app: str | None, pid: int | None) -> ReportSubject:
    """Return the subject of a report without a sidecar: this process, or the process `pid`."""
    from vitalsd.discovery.program_key import program_key
    from vitalsd.sources import open_source
    from vitalsd.sources.base import SourceError
    from vitalsd.sources.programs import ProgramDigest, main_script

    own = pid is None or pid == os.getpid()
    try:
        source = open_source(pid, program_of=ProgramDigest(program_key(), main_script() if own else None))
    except SourceError:
        return ReportSubject(app, start_id=str(pid or os.getpid()))
    identity = source.identity()
    source.close()
    return ReportSubject(app, identity.start_id, identity.name, identity.program)


def _run_id(found: object) -> str:
    """Return `found` if it can be the id of a run. Raises `ValueError`."""
    if not isinstance(found, str) or len(found) > MAX_RUN_ID:
        raise ValueError("not the id of a run")
    return found


def _json(answer: Answer, kind: type) -> tuple[Any, bytes]:
    """Return the parsed body and its bytes. Raises `ExchangeError`: the body is not JSON of type `kind`."""
    if answer.status != 200:
        raise ExchangeError(refusal(answer))
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, kind):
        raise ExchangeError("the sidecar's answer is not JSON of the kind that was asked for")
    return body, answer.body
