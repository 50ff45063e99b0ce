"""
``GET /report.zip``: the bug report of `vitalsd_client`, for whoever has only curl.

The archive itself is built by `vitalsd_client.archive`, which is of the standard library alone: so both
ends make the same file, and the client still loads nothing of the service.
"""

import json
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Request, Response
from starlette.background import BackgroundTask

from vitalsd.http.answers import JSON
from vitalsd.http.past import mark_json, run_json
from vitalsd.http.problem import problem
from vitalsd.http.query import NoQuery, ReportQuery, StrictRoute, given
from vitalsd.http.shelf import Shelf
from vitalsd.http.turns import Turns
from vitalsd.record import Record
from vitalsd.runs import RunDirectory
from vitalsd.snapshot import Identity
from vitalsd.sources import SourceError
from vitalsd.stored_run import Run, UnreadableRun, read_run
from vitalsd.targets import Targets
from vitalsd.wire import encode, unavailable
from vitalsd.worker import Hung, Worker

if TYPE_CHECKING:
    from vitalsd_client.archive import Bundle, Failure

__all__ = ["report_routes"]

APP = "vitalsd"
TOP_THREADS = 50


def report_routes(targets: Targets, shelf: Shelf | None, reader: Worker) -> APIRouter:
    """The routes over `targets` and the earlier runs of `shelf`; the archive is made on `reader`."""
    routes = APIRouter(route_class=StrictRoute)
    reports = Turns()

    @routes.get("/report.zip", summary="A bug report: metrics, history, marks, and the run that crashed before")
    async def report(query: Annotated[ReportQuery, given(ReportQuery)]) -> Response:
        from vitalsd_client.archive import HISTORY, MARKS, METRICS, PREVIOUS_RUN, Failure

        triggered = datetime.now(UTC)
        members: dict[str, bytes] = {}
        failures: list[Failure] = []
        identity, metrics, reason = await _metrics(targets, query.window_ms)
        members[METRICS] = metrics
        if reason is not None:
            failures.append(Failure(METRICS, reason))
        record, platform = targets.default.record, targets.default.platform

        async def collect() -> tuple["Bundle", bytes, Run | None]:
            crashed: Run | None = None
            if record is None:
                failures.append(Failure(HISTORY, targets.default.why_not_recorded()))
            else:
                members[HISTORY], members[MARKS] = await reader.result(lambda: _recorded(record, query.seconds))
            if shelf is not None and identity is not None:
                try:
                    found = await shelf.read(lambda runs: _crashed(runs, identity))
                    if found is not None:
                        members[PREVIOUS_RUN] = await reader.result(lambda: _previous(*found))
                        crashed, _ = found
                except (UnreadableRun, OSError) as error:
                    reason = f"{type(error).__name__}: the file of a crashed run cannot be read"
                    failures.append(Failure(PREVIOUS_RUN, reason))
                except Hung as error:
                    failures.append(Failure(PREVIOUS_RUN, str(error)))
            bundle = await reader.result(lambda: _bundle(triggered, members, failures, platform))
            return bundle, await reader.result(bundle.zip), crashed

        bundle, content, crashed = await reports.make(collect)
        # Not done if the client leaves while there is much of it to take; whether it has the rest nobody tells.
        sent = None if shelf is None or crashed is None else BackgroundTask(_tell, shelf, crashed)
        headers = {
            "Content-Disposition": f'attachment; filename="{bundle.stem}.zip"',
            "Cache-Control": "no-store",
        }
        return Response(content, media_type="application/zip", headers=headers, background=sent)

    @routes.post(
        "/runs/{run_id}/reported",
        summary="Note that a run is in a bug report, so that no other one tells of it again",
    )
    async def reported(request: Request, query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        run_id = request.path_params["run_id"]

        def mark(runs: RunDirectory) -> Run | None:
            run = runs.find(run_id)
            if run is not None:
                runs.mark_reported(run)
            return run

        try:
            run = await shelf.read(mark) if shelf else None
        except (UnreadableRun, OSError) as error:
            return problem("unreadable_run", str(error))
        if run is None:
            return problem("no_such_run", "no run has this id; GET /runs lists them")
        return JSON({"id": run.id, "reported": True})

    return routes


async def _metrics(targets: Targets, window_ms: int) -> tuple[Identity | None, bytes, str | None]:
    """Trailing if the recorder covers the window, else the coming one; or why there is none."""
    target, identity = targets.default, None
    try:
        identity = await target.identity()
        measurement = target.record.window(window_ms) if target.record else None
        covered = measurement is not None and measurement.elapsed_ns >= window_ms * 990_000
        if measurement is None or not covered:
            try:
                measurement = await target.window(window_ms)
                identity = await target.identity()  # by the end it may be called otherwise
            except SourceError:
                if measurement is None:
                    raise
        return identity, encode(measurement, identity, requested_ms=window_ms), None
    except SourceError as error:
        return identity, unavailable(error, target.platform), str(error)


def _recorded(record: Record, seconds: int) -> tuple[bytes, bytes]:
    from vitalsd.history import history

    last = record.last
    since_ns = last.monotonic_ns - seconds * 1_000_000_000 if last else 0
    table = history(record, since_ns=since_ns, top=TOP_THREADS)
    return table.to_json(), json.dumps([mark_json(mark) for mark in list(record.marks)]).encode()


def _crashed(runs: RunDirectory, identity: Identity) -> tuple[Run, Record] | None:
    """
    The newest run of that program, but of an earlier process, which crashed and is in no report yet.

    Raises as `read_run` does.
    """
    program = (identity.name, identity.program)
    run = next(
        (
            run
            for run in runs.runs()
            if run.state == "crashed" and not run.reported and run.identity.start_id != identity.start_id
            if (run.identity.name, run.identity.program) == program
        ),
        None,
    )
    return None if run is None else (run, read_run(run.path)[1])


def _previous(run: Run, record: Record) -> bytes:
    from vitalsd.history import history
    from vitalsd_client.archive import previous_run

    return previous_run(run_json(run), history(record, top=TOP_THREADS).to_json())


async def _tell(shelf: Shelf, run: Run) -> None:
    with suppress(UnreadableRun, OSError, Hung):  # then the next report tells of it again
        await shelf.read(lambda runs: runs.mark_reported(run))


def _bundle(triggered: datetime, members: dict[str, bytes], failures: "list[Failure]", platform: str) -> "Bundle":
    from vitalsd_client.archive import METADATA, metadata, new_report_id, seal

    report_id, submitted = new_report_id(), datetime.now(UTC)
    about = metadata(
        app=APP,
        app_version=version("vitalsd"),
        vitalsd_version=version("vitalsd"),
        report_id=report_id,
        triggered=triggered,
        submitted=submitted,
        description="",
        platform=platform,
    )
    return seal(APP, report_id, submitted, {METADATA: about, **members}, failures)
