"""
``/report.zip``: the bug report of `vitalsd.report.builder` for clients that have only HTTP.

What makes reports is imported when one is asked for, and not while the sidecar starts.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Request, Response

from vitalsd.admission import Peer
from vitalsd.contract.application import Application
from vitalsd.contract.encoding import encode, unavailable
from vitalsd.http.access.peer import peer_of
from vitalsd.http.parameters import READING, NoQuery, ReportQuery, ReportRequest, StrictRoute, given, sent
from vitalsd.http.responses import JSON, bare, problem
from vitalsd.http.routes.recordings import NO_SUCH_RUN, mark_json
from vitalsd.http.server.delivery import TAKEN
from vitalsd.http.single_flight import Turns
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.recording.run_reader import Run, UnreadableRun
from vitalsd.recording.series import Record
from vitalsd.sampling.target_pool import Targets
from vitalsd.snapshot import Identity
from vitalsd.sources.base import SourceError
from vitalsd.worker_thread import Hung, Worker

if TYPE_CHECKING:
    from vitalsd.report.builder import Collected

__all__ = ["REPORT_PATH", "report_routes"]

REPORT_PATH = "/report.zip"


def report_routes(
    targets: Targets, shelf: RunDirectoryReader | None, reader: Worker, application: Application
) -> APIRouter:
    """Return the routes over `targets` and the earlier runs of `shelf`; the archive is made on `reader`."""
    routes = APIRouter(route_class=StrictRoute)
    reports = Turns()

    async def report(request: Request, query: ReportQuery, said: ReportRequest, *, counts: bool) -> Response:
        from vitalsd.report.builder import Collected, Heading, build

        heading = Heading(said.app, said.app_version, said.message)
        if (replay := targets.default.replay) is not None:
            if replay.file.content is None:
                return problem("no_report", f"{replay.file.name} is not a report, so there is no report to download")
            return _zip(replay.file.content, replay.file.name)
        peer = peer_of(request.scope)
        if (run_id := query.run) is not None:
            there = shelf is not None and await reports.make(lambda: shelf.has(run_id), peer=peer)
            if not there:
                return problem("no_such_run", NO_SUCH_RUN, parameter="run")
        if request.method == "HEAD":
            return bare("application/zip")
        collected = Collected(platform=targets.default.platform, application=application)
        identity = await _metrics(targets, query.window_ms, collected, peer)

        async def make() -> tuple[str, bytes]:
            await _past(targets, shelf, reader, query, said.app, identity, collected)
            bundle = await reader.result(lambda: build(heading, collected, created=datetime.now(UTC)))
            return f"{bundle.stem}.zip", await reader.result(bundle.zip)

        name, content = await reports.make(make, peer=peer)
        run_ids, on_taken = list(collected.runs), request.scope.get("extensions", {}).get(TAKEN)
        if counts and shelf is not None and run_ids and on_taken is not None:
            on_taken(_marking(shelf, run_ids))
        return _zip(content, name)

    @routes.api_route(REPORT_PATH, methods=READING, summary="A bug report to look at: it does not count as reported")
    async def preview(request: Request, query: Annotated[ReportQuery, given(ReportQuery)]) -> Response:
        return await report(request, query, ReportRequest(), counts=False)

    @routes.post(REPORT_PATH, summary="Make a bug report: metrics, history, marks, and the run that crashed before")
    async def make(
        request: Request,
        query: Annotated[ReportQuery, given(ReportQuery)],
        body: Annotated[ReportRequest, sent(ReportRequest)],
    ) -> Response:
        return await report(request, query, body, counts=True)

    @routes.post("/runs/{run_id}/reported", summary="Note that a run is in a report")
    async def reported(request: Request, query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        run_id = request.path_params["run_id"]

        async def mark() -> Run | None:
            return await shelf.read(lambda runs: _mark(runs, run_id)) if shelf else None

        try:
            run = await reports.make(mark, peer=peer_of(request.scope))
        except (UnreadableRun, OSError) as error:
            return problem("unreadable_run", str(error))
        if run is None:
            return problem("no_such_run", NO_SUCH_RUN)
        return JSON({"id": run.id, "reported": run.state == "crashed"})

    return routes


def _zip(content: bytes, name: str) -> Response:
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)
    headers = {"Content-Disposition": f'attachment; filename="{plain}"', "Cache-Control": "no-store"}
    return Response(content, media_type="application/zip", headers=headers)


async def _metrics(targets: Targets, window_ms: int, collected: "Collected", peer: Peer) -> Identity | None:
    """Collect the trailing window if the recorder covers it, else the coming one, or why there is none."""
    from vitalsd.contract.report_archive import METRICS, Failure

    target, identity = targets.default, None
    try:
        identity = await target.identity()
        measurement = record.window(window_ms) if (record := target.recorder.record) else None
        covered = measurement is not None and measurement.elapsed_ns >= window_ms * 990_000
        if measurement is None or not covered:
            try:
                measurement = await target.window(window_ms, peer=peer)
                identity = await target.identity()  # It may have executed another program meanwhile.
            except SourceError:
                if measurement is None:
                    raise
        collected.members[METRICS] = encode(measurement, identity, requested_ms=window_ms)
    except SourceError as error:
        collected.members[METRICS] = unavailable(error, target.platform)
        collected.failures.append(Failure(METRICS, str(error)))
    return identity


async def _past(
    targets: Targets,
    shelf: RunDirectoryReader | None,
    reader: Worker,
    query: ReportQuery,
    app: str | None,
    identity: Identity | None,
    collected: "Collected",
) -> None:
    """Collect history, marks and the crashed run."""
    from vitalsd.contract.report_archive import HISTORY, PREVIOUS_RUN, Failure
    from vitalsd.report.previous_run import Found, ReportSubject, find, member

    record = targets.default.recorder.record
    if record is None:
        collected.failures.append(Failure(HISTORY, targets.default.recorder.why_not_recorded))
    else:
        collected.members |= await reader.result(lambda: _recorded(record, query.seconds))
        info = targets.default.recorder.info() or {}
        collected.target = {key: info.get(key) for key in ("state", "ended")}
        if info.get("state") == "crashed" and (own := (info.get("black_box") or {}).get("run")):
            collected.runs[own] = HISTORY
    if shelf is None:
        return
    target_app = collected.application.app
    if identity is None:  # The sidecar waits for its target, or cannot read it.
        subject = ReportSubject(app, name=targets.name or "", target_app=target_app)
    else:
        subject = ReportSubject(app, identity.start_id, identity.name, identity.program, target_app)
    try:
        found = await shelf.read(lambda runs: find(runs, subject, query.run))
    except Hung as error:
        found = Found(failure=Failure(PREVIOUS_RUN, str(error)))
    if found.failure is not None:
        collected.failures.append(found.failure)
    if (run := found.run) is not None and (previous := found.record) is not None:
        collected.members[PREVIOUS_RUN] = await reader.result(lambda: member(run, previous))
        collected.runs[run.id] = PREVIOUS_RUN


def _recorded(record: Record, seconds: int) -> dict[str, bytes]:
    from vitalsd.contract.report_archive import HISTORY, MARKS
    from vitalsd.recording.history import history
    from vitalsd.report.previous_run import TOP_THREADS

    last = record.last
    since_ns = last.monotonic_ns - seconds * 1_000_000_000 if last else 0
    table = history(record, since_ns=since_ns, top=TOP_THREADS)
    marks = json.dumps([mark_json(mark) for mark in list(record.marks)]).encode()
    return {HISTORY: table.to_json(), MARKS: marks}


def _marking(shelf: RunDirectoryReader, run_ids: Sequence[str]) -> Callable[[], Awaitable[None]]:
    async def mark() -> None:
        for run_id in run_ids:
            with suppress(UnreadableRun, OSError, Hung):  # Then the next report contains the run again.
                await shelf.read(partial(_mark, run_id=run_id))

    return mark


def _mark(runs: RunDirectory, run_id: str) -> Run | None:
    run = runs.find(run_id)
    if run is not None:
        runs.mark_reported(run)
    return run
