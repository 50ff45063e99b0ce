"""
Answer ``/report.zip``: the bug report of `vitalsd.report.builder` for clients that have only HTTP.

The modules of `vitalsd.report` are imported at the first request, not while the sidecar starts.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from vitalsd.admission import Peer
from vitalsd.contract.application import APP, APP_VERSION
from vitalsd.contract.encoding import Detail, encode, unavailable
from vitalsd.http.access.peer import peer_of
from vitalsd.http.operation import CommandExample, Operation, OperationRoute
from vitalsd.http.parameters import HistorySeconds, NoQuery, StrictModel, WindowMs, json_body, query_params
from vitalsd.http.responses import JSON, bare, problem
from vitalsd.http.routes.context import RouteContext
from vitalsd.http.routes.recordings import NO_SUCH_RUN, RUN_EXAMPLE, RUN_ID, mark_json
from vitalsd.http.server.delivery import TAKEN
from vitalsd.http.single_flight import SingleFlight
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.recording.run_reader import Run, UnreadableRunError
from vitalsd.recording.series import Record
from vitalsd.sampling.target_pool import Targets
from vitalsd.snapshot import Identity, Part
from vitalsd.sources.base import SourceError
from vitalsd.worker_thread import HungError

if TYPE_CHECKING:
    from vitalsd.report.builder import Collected

__all__ = ["REPORT_PATH", "ReportQuery", "ReportRequest", "report_routes"]

REPORT_PATH = "/report.zip"


class ReportedJson(TypedDict):
    """Whether the run counts as reported now; only a crashed run can."""

    id: str
    reported: bool


REPORTED = Operation(
    method="POST",
    path="/runs/{run_id}/reported",
    summary="Mark a run as reported",
    description="For a client that included a crashed run in a report that it made itself. The request has no body.",
    answer="The run.",
    shapes=(ReportedJson,),
    example={"id": RUN_EXAMPLE["id"], "reported": True},
    reasons=("no_such_run", "unreadable_run", "hung"),
    parameters=(RUN_ID,),
    commands=(
        CommandExample(
            "Mark the first run as reported",
            'RUN=$(curl -s "$URL/runs" | jq -r ".[0].id")\ncurl -s -X POST "$URL/runs/$RUN/reported" | jq .reported',
        ),
    ),
)
POST_REPORT = Operation(
    method="POST",
    path=REPORT_PATH,
    summary="Make a bug report: metrics, history, marks, and the run that crashed before",
    description="The archive contains runtime-metrics.json, runtime-history.json, marks.json, metadata.json,"
    " manifest.json and, if a run of this application crashed and no report contains it yet, previous-run.json. The"
    " `failures` of the manifest list each missing member. The crashed run counts as reported once the client has"
    " read the last byte and closed the connection. The body is JSON of at most 16 KiB; `{}` is enough.",
    answer="The archive.",
    media_types={"application/zip": ""},
    reasons=("bad_body", "busy", "no_report", "no_such_run"),
    commands=(
        CommandExample(
            "Save it under the name that the sidecar gives",
            "curl -s -OJ \"$URL/report.zip\" -H 'Content-Type: application/json'"
            ' -d \'{"app": "viewer", "message": "it stutters"}\' && ls *.zip | wc -l',
        ),
    ),
)
GET_REPORT = Operation(
    path=REPORT_PATH,
    summary="Preview a bug report; no run counts as reported",
    description="The same archive without a message. No run counts as reported. A replay of a report returns the"
    " replayed file.",
    answer="The archive.",
    media_types={"application/zip": ""},
    reasons=("busy", "no_report", "no_such_run"),
    commands=(
        CommandExample("Its members", 'curl -s "$URL/report.zip" -o r.zip && python3 -m zipfile -l r.zip | wc -l'),
    ),
)


class ReportQuery(StrictModel):
    """Parameters of ``/report.zip``."""

    window_ms: WindowMs = 2000
    seconds: Annotated[HistorySeconds, Field(description="Length of the history, s.", examples=[60])] = 300
    run: Annotated[
        Annotated[str, Field(min_length=1, max_length=128)] | None,
        Field(description="Include this earlier run, by its id from `/runs`.", examples=[RUN_EXAMPLE["id"]]),
    ] = None
    children: Annotated[
        Literal["true", "false"],
        Field(
            description="`true`: let the report name the child processes of the process. Otherwise it has the sums of"
            " the application at most, whatever is recorded.",
            examples=["true"],
        ),
    ] = "false"


class ReportRequest(StrictModel):
    """The body of ``POST /report.zip``."""

    model_config = ConfigDict(strict=True)

    app: Annotated[
        str | None,
        Field(
            pattern=f"^{APP.pattern}$", description="Application id; default: that of the sidecar.", examples=["viewer"]
        ),
    ] = None
    app_version: Annotated[
        str | None, Field(pattern=f"^{APP_VERSION.pattern}$", description="Its version.", examples=["3.1"])
    ] = None
    message: Annotated[str, Field(description="Description by the user.", examples=["it stutters"])] = ""


def report_routes(context: RouteContext) -> list[OperationRoute]:
    """Return the routes of bug reports; the archive is made on the thread of `RouteContext.reader`."""
    reports = _Reports(context)
    return [
        OperationRoute(REPORTED, reports.mark_reported),
        OperationRoute(POST_REPORT, reports.make),
        OperationRoute(GET_REPORT, reports.preview),
    ]


class _Reports:
    """Answer ``/report.zip`` and ``/runs/{run_id}/reported``."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context
        self._targets, self._run_directory = context.targets, context.run_directory
        self._reports = SingleFlight()

    async def preview(self, request: Request, query: Annotated[ReportQuery, query_params(ReportQuery)]) -> Response:
        return await self._answer(request, query, ReportRequest(), counts=False)

    async def make(
        self,
        request: Request,
        query: Annotated[ReportQuery, query_params(ReportQuery)],
        body: Annotated[ReportRequest, json_body(ReportRequest)],
    ) -> Response:
        return await self._answer(request, query, body, counts=True)

    async def mark_reported(self, request: Request, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        run_directory, run_id = self._run_directory, request.path_params["run_id"]

        async def mark() -> Run | None:
            return await run_directory.read(lambda runs: _mark(runs, run_id)) if run_directory else None

        try:
            run = await self._reports.make(mark, peer=peer_of(request.scope))
        except (UnreadableRunError, OSError) as error:
            return problem("unreadable_run", str(error))
        if run is None:
            return problem("no_such_run", NO_SUCH_RUN)
        return JSON(ReportedJson(id=run.id, reported=run.state == "crashed"))

    async def _answer(self, request: Request, query: ReportQuery, sent: ReportRequest, *, counts: bool) -> Response:
        """Return the archive; with `counts`, its crashed runs count as reported when the client has read all of it."""
        run_directory = self._run_directory
        if (replay := self._targets.default.replay) is not None:
            if replay.file.content is None:
                return problem("no_report", f"{replay.file.name} is not a report, so there is no report to download")
            return _zip(replay.file.content, replay.file.name)
        peer = peer_of(request.scope)
        if (run_id := query.run) is not None:
            there = run_directory is not None and await self._reports.make(lambda: run_directory.has(run_id), peer=peer)
            if not there:
                return problem("no_such_run", NO_SUCH_RUN, parameter="run")
        if request.method == "HEAD":
            return bare("application/zip")
        name, content, run_ids = await self._archive(query, sent, peer)
        on_taken = request.scope.get("extensions", {}).get(TAKEN)
        if counts and run_directory is not None and run_ids and on_taken is not None:
            on_taken(_marking(run_directory, run_ids))
        return _zip(content, name)

    async def _archive(self, query: ReportQuery, sent: ReportRequest, peer: Peer) -> tuple[str, bytes, list[str]]:
        """Return the name of the archive, its bytes, and the ids of the crashed runs in it."""
        from vitalsd.report.builder import Collected, Heading, build

        context, heading = self._context, Heading(sent.app, sent.app_version, sent.message, query.children == "true")
        collected = Collected(platform=self._targets.default.platform, application=context.application)
        identity = await _metrics(self._targets, query, collected, peer)

        async def make() -> tuple[str, bytes]:
            await _past(context, query, sent.app, identity, collected)
            bundle = await context.reader.run_unbounded(lambda: build(heading, collected, created=datetime.now(UTC)))
            return f"{bundle.stem}.zip", await context.reader.run_unbounded(bundle.zip)

        name, content = await self._reports.make(make, peer=peer)
        return name, content, list(collected.runs)


def _zip(content: bytes, name: str) -> Response:
    """Return the answer with an archive; `name` is reduced to printable ASCII for its header."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)
    headers = {"Content-Disposition": f'attachment; filename="{plain}"', "Cache-Control": "no-store"}
    return Response(content, media_type="application/zip", headers=headers)


async def _metrics(targets: Targets, query: ReportQuery, collected: "Collected", peer: Peer) -> Identity | None:
    """Collect the trailing window if the recorder covers it, else the coming one, or a failure."""
    from vitalsd.contract.report_archive import METRICS, Failure

    target, identity = targets.default, None
    window_ms, children = query.window_ms, query.children == "true"
    detail: Detail = "full" if children else "basic"
    parts = Part.DETAIL | Part.CHILDREN if children else Part.NONE
    mode: Literal["wait", "trailing"] = "trailing"
    try:
        identity = await target.identity()
        measurement = record.window(window_ms) if (record := target.recorder.record) else None
        covered = measurement is not None and measurement.elapsed_ns >= window_ms * 990_000
        if measurement is None or not covered or (children and measurement.tree is None):
            try:
                measurement, mode = await target.window(window_ms, parts=parts, peer=peer), "wait"
                identity = await target.identity()  # The process may have executed another program since.
            except SourceError:
                if measurement is None:
                    raise
        collected.members[METRICS] = encode(
            measurement,
            identity,
            requested_ms=window_ms,
            mode=mode,
            detail=detail,
            children=children,
        )
    except SourceError as error:
        collected.members[METRICS] = unavailable(error, target.platform)
        collected.failures.append(Failure(METRICS, str(error)))
    return identity


async def _past(
    context: RouteContext,
    query: ReportQuery,
    app: str | None,
    identity: Identity | None,
    collected: "Collected",
) -> None:
    """Collect history, marks and the crashed run, or a failure for each that is missing."""
    from vitalsd.contract.report_archive import HISTORY, PREVIOUS_RUN, Failure
    from vitalsd.report.previous_run import Found, ReportSubject, find, member

    target, run_directory, reader = context.targets.default, context.run_directory, context.reader
    record = target.recorder.record
    if record is None:
        collected.failures.append(Failure(HISTORY, target.recorder.why_not_recorded))
    else:
        collected.members |= await reader.run_unbounded(lambda: _recorded(record, query.seconds))
        info: Mapping[str, Any] = target.recorder.info() or {}
        collected.target = {key: info.get(key) for key in ("state", "ended")}
        if info.get("state") == "crashed" and (own := (info.get("black_box") or {}).get("run")):
            collected.runs[own] = HISTORY
    if run_directory is None:
        return
    target_app = collected.application.app
    if identity is None:  # The sidecar waits for its target, or cannot read it.
        subject = ReportSubject(app, name=context.targets.name or "", target_app=target_app)
    else:
        subject = ReportSubject(app, identity.start_id, identity.name, identity.program, target_app)
    try:
        found = await run_directory.read(lambda runs: find(runs, subject, query.run))
    except HungError as error:
        found = Found(failure=Failure(PREVIOUS_RUN, str(error)))
    if found.failure is not None:
        collected.failures.append(found.failure)
    if (run := found.run) is not None and (previous := found.record) is not None:
        collected.members[PREVIOUS_RUN] = await reader.run_unbounded(lambda: member(run, previous))
        collected.runs[run.id] = PREVIOUS_RUN


def _recorded(record: Record, seconds: int) -> dict[str, bytes]:
    """Return the members history and marks of the last `seconds`."""
    from vitalsd.contract.report_archive import HISTORY, MARKS
    from vitalsd.recording.history import history
    from vitalsd.report.previous_run import TOP_THREADS

    last = record.last
    since_ns = last.monotonic_ns - seconds * 1_000_000_000 if last else 0
    table = history(record, since_ns=since_ns, top=TOP_THREADS)
    marks = json.dumps([mark_json(mark) for mark in list(record.marks)]).encode()
    return {HISTORY: table.to_json(), MARKS: marks}


def _marking(run_directory: RunDirectoryReader, run_ids: Sequence[str]) -> Callable[[], Awaitable[None]]:
    """Return a call that marks the runs as reported."""

    async def mark() -> None:
        for run_id in run_ids:
            with suppress(UnreadableRunError, OSError, HungError):  # Then the next report contains the run again.
                await run_directory.read(partial(_mark, run_id=run_id))

    return mark


def _mark(runs: RunDirectory, run_id: str) -> Run | None:
    """Mark a run as reported and return it; None: there is no such run."""
    run = runs.find(run_id)
    if run is not None:
        runs.mark_reported(run)
    return run
