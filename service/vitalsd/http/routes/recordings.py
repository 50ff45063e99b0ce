"""Routes that look back: ``/history``, ``/marks``, ``/runs`` and ``/runs/{id}/history``."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from vitalsd.http.access.peer import peer_of
from vitalsd.http.parameters import (
    READING,
    HistoryQuery,
    MarkRequest,
    NoQuery,
    RunHistoryQuery,
    StrictRoute,
    given,
    sent,
)
from vitalsd.http.responses import JSON, bare, failed, problem
from vitalsd.http.single_flight import Turns
from vitalsd.recording.recorder import NotRecording
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.recording.run_reader import UnreadableRun, read_run
from vitalsd.recording.series import Mark, Record
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources.base import SourceError
from vitalsd.text import iso
from vitalsd.worker_thread import Worker

__all__ = ["NO_SUCH_RUN", "mark_json", "past_routes"]

CSV = "text/csv; charset=utf-8"
NO_SUCH_RUN = "no run has this id; GET /runs lists them"


def past_routes(targets: Targets, shelf: RunDirectoryReader | None, reader: Worker) -> APIRouter:
    """
    The routes over the record of `targets` and over the earlier runs of `shelf`; tables are made on `reader`.
    """
    routes = APIRouter(route_class=StrictRoute)
    tables, loaded = Turns(), Turns()  # apart: what waits for a disk holds up nothing else
    listings = 0

    @routes.api_route(
        "/history", methods=READING, summary="What was recorded: process, busiest threads, marks and events"
    )
    async def recorded(request: Request, query: Annotated[HistoryQuery, given(HistoryQuery)]) -> Response:
        try:
            await targets.default.identity()
        except SourceError as error:
            if targets.default.recorder.record is None:
                return failed(error, targets.default.platform)
        record = targets.default.recorder.record
        if record is None:
            raise NotRecording(targets.default.recorder.why_not_recorded)
        if query.pid not in (None, record.identity.pid):
            raise NotRecording(
                f"process {record.identity.pid} is recorded here; to record another: vitalsd serve --pid {query.pid}"
            )
        if request.method == "HEAD":
            return _bare_table(request)
        # Whatever else would be in the table by now makes it another one.
        newest = record, record.last, *(notes[-1] if notes else None for notes in (record.marks, record.events))
        key = newest, query.seconds, query.top, query.step_ms, _is_csv(request)
        return await tables.make(lambda: _table(record, query, request, reader), key, peer_of(request.scope))

    @routes.post("/marks", status_code=201, summary="Put a label on the clock")
    async def set_mark(
        body: Annotated[MarkRequest, sent(MarkRequest)], query: Annotated[NoQuery, given(NoQuery)]
    ) -> Response:
        try:
            mark = await targets.default.recorder.mark_async(body.label)
        except ValueError as error:
            return problem("bad_body", str(error), parameter="label")
        return JSON(mark_json(mark), 201)

    @routes.api_route("/marks", methods=READING, summary="The labels on the clock, oldest first")
    async def get_marks(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        record = targets.default.recorder.record
        return JSON([mark_json(mark) for mark in list(record.marks)] if record is not None else [])

    @routes.api_route("/runs", methods=READING, summary="Earlier runs on disk, crashed ones first")
    async def list_runs(request: Request, query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        if request.method == "HEAD":
            return bare()
        if (replay := targets.default.replay) is not None:
            return JSON([each.run.to_json() for each in replay.file.others])
        if shelf is None:
            return JSON([])

        async def listing() -> Response:
            nonlocal listings
            listings += 1  # A later request does not share what was read before it.
            return JSON([run.to_json() for run in await shelf.read(RunDirectory.runs)])

        return await loaded.make(listing, ("runs", listings), peer_of(request.scope))

    @routes.api_route("/runs/{run_id}/history", methods=READING, summary="What an earlier run recorded, up to its end")
    async def run_history(request: Request, query: Annotated[RunHistoryQuery, given(RunHistoryQuery)]) -> Response:
        run_id = request.path_params["run_id"]
        peer = peer_of(request.scope)
        if request.method == "HEAD":
            replay = targets.default.replay
            if replay is not None:
                there = replay.find(run_id) is not None
            else:
                there = shelf is not None and await loaded.make(lambda: shelf.has(run_id), peer=peer)
            return _bare_table(request) if there else problem("no_such_run", NO_SUCH_RUN)

        def load(runs: RunDirectory) -> Record | None:
            run = runs.find(run_id)
            return read_run(run.path)[1] if run else None

        async def answer() -> Response:
            try:
                if (replay := targets.default.replay) is not None:
                    replayed = replay.find(run_id)
                    record = replayed.record if replayed else None
                else:
                    record = await shelf.read(load) if shelf else None
            except (UnreadableRun, OSError) as error:
                return problem("unreadable_run", str(error))
            if record is None:
                return problem("no_such_run", NO_SUCH_RUN)
            return await _table(record, query, request, reader)

        return await loaded.make(answer, peer=peer)

    return routes


async def _table(record: Record, query: RunHistoryQuery, request: Request, reader: Worker) -> Response:
    """The last `query.seconds` of `record`, counted from its end."""
    last = record.last
    since_ns = last.monotonic_ns - query.seconds * 1_000_000_000 if last else 0
    csv = _is_csv(request)

    def render() -> bytes:
        from vitalsd.recording.history import history

        table = history(record, since_ns=since_ns, top=query.top, step_ns=query.step_ms * 1_000_000)
        return table.to_csv() if csv else table.to_json()

    body = await reader.result(render)
    if csv:
        return Response(body, headers={"Content-Type": CSV, "Cache-Control": "no-store"})
    return JSON(body)


def _bare_table(request: Request) -> Response:
    return bare(CSV) if _is_csv(request) else bare()


def _is_csv(request: Request) -> bool:
    accept = request.headers.get("accept", "")
    return "text/csv" in accept and "application/json" not in accept


def mark_json(mark: Mark) -> dict[str, Any]:
    """A mark as ``GET /marks`` lists it."""
    return {"time": iso(mark.wall_ns), "time_ms": mark.wall_ns // 1_000_000, "label": mark.label}
