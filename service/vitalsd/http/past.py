"""Routes that look back: ``/history``, ``/marks``, ``/runs`` and ``/runs/{id}/history``."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from vitalsd.history import history
from vitalsd.http.answers import JSON, REFUSALS, UNAVAILABLE, failed
from vitalsd.http.problem import Problem, problem
from vitalsd.http.query import HistoryQuery, NoQuery, RunHistoryQuery
from vitalsd.record import MAX_LABEL_LENGTH, Mark, Record
from vitalsd.runs import Run, RunDirectory, UnreadableRun, read_run
from vitalsd.sampler import NotRecording, Targets
from vitalsd.sources import SourceError
from vitalsd.wire import iso
from vitalsd.worker import Worker

__all__ = ["NO_RUN", "mark_json", "past_routes", "run_json"]

TABLE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/json": {}, "text/csv": {}},
        "description": "Columnar JSON, or CSV if `Accept` says text/csv.",
    }
}


NOT_RECORDING: dict[int | str, dict[str, Any]] = {
    409: {"model": Problem, "description": "Nothing is being recorded."},
}
NO_RUN: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "No run has this id."},
    503: {"model": Problem, "description": "The file of this run is damaged."},
}


class MarkRequest(BaseModel):
    """The body of ``POST /marks``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: Annotated[
        str,
        Field(min_length=1, max_length=MAX_LABEL_LENGTH, description="One line of text.", examples=["F12 pressed"]),
    ]


def past_routes(targets: Targets, runs: RunDirectory | None, reader: Worker) -> APIRouter:
    """
    The routes over the record of `targets` and over earlier `runs`; files are read on `reader`.
    """
    routes = APIRouter()

    @routes.get(
        "/history",
        responses={**TABLE, **UNAVAILABLE, **NOT_RECORDING, **REFUSALS},
        summary="What was recorded: process, busiest threads, marks and events",
    )
    async def recorded(query: Annotated[HistoryQuery, Query()], accept: Annotated[str, Header()] = "") -> Response:
        try:
            await targets.default.identity()
        except SourceError as error:
            if targets.default.record is None:
                return failed(error)
        record = targets.default.record
        if record is None:
            raise NotRecording("nothing is being recorded (--record-interval 0)")
        if query.pid not in (None, record.identity.pid):
            raise NotRecording(f"only process {record.identity.pid} is recorded here; --pid names another target")
        return await _table(record, query, accept, reader)

    @routes.post(
        "/marks",
        status_code=201,
        response_class=JSON,
        responses={**NOT_RECORDING, **REFUSALS},
        summary="Put a label on the clock",
    )
    async def set_mark(body: MarkRequest, query: Annotated[NoQuery, Query()]) -> Response:
        try:
            mark = targets.default.mark(body.label)
        except ValueError as error:
            return problem("bad_body", str(error), parameter="label")
        return JSON(mark_json(mark), 201)

    @routes.get("/marks", response_class=JSON, responses=REFUSALS, summary="The labels on the clock, oldest first")
    async def get_marks(query: Annotated[NoQuery, Query()]) -> Response:
        record = targets.default.record
        return JSON([mark_json(mark) for mark in list(record.marks)] if record else [])

    @routes.get("/runs", response_class=JSON, responses=REFUSALS, summary="Earlier runs on disk, crashed ones first")
    async def list_runs(query: Annotated[NoQuery, Query()]) -> Response:
        found = await asyncio.wrap_future(reader.submit(runs.runs)) if runs else []
        return JSON([run_json(run) for run in found])

    @routes.get(
        "/runs/{run_id}/history",
        responses={**TABLE, **NO_RUN, **REFUSALS},
        summary="What an earlier run recorded, up to its end",
    )
    async def run_history(
        run_id: str, query: Annotated[RunHistoryQuery, Query()], accept: Annotated[str, Header()] = ""
    ) -> Response:
        def load() -> Record | None:
            run = runs.find(run_id) if runs else None
            return read_run(run.path)[1] if run else None

        try:
            record = await asyncio.wrap_future(reader.submit(load))
        except (UnreadableRun, OSError) as error:
            return problem("unreadable_run", str(error))
        if record is None:
            return problem("no_such_run", "no run has this id; GET /runs lists them")
        return await _table(record, query, accept, reader)

    return routes


async def _table(record: Record, query: RunHistoryQuery, accept: str, reader: Worker) -> Response:
    """The last `query.seconds` of `record`, counted from its end."""
    last = record.last
    since_ns = last.monotonic_ns - query.seconds * 1_000_000_000 if last else 0
    csv = "text/csv" in accept and "application/json" not in accept

    def render() -> bytes:
        table = history(record, since_ns=since_ns, top=query.top, step_ns=query.step_ms * 1_000_000)
        return table.to_csv() if csv else table.to_json()

    body = await asyncio.wrap_future(reader.submit(render))
    if csv:
        return Response(body, media_type="text/csv; charset=utf-8", headers={"Cache-Control": "no-store"})
    return JSON(body)


def mark_json(mark: Mark) -> dict[str, Any]:
    """A mark as ``GET /marks`` lists it."""
    return {"time": iso(mark.wall_ns), "time_ms": mark.wall_ns // 1_000_000, "label": mark.label}


def run_json(run: Run) -> dict[str, Any]:
    """A run as ``GET /runs`` and ``vitalsd runs --json`` list it."""
    return {
        "id": run.id,
        "state": run.state,
        "ended": run.ended,
        "reported": run.reported,
        "platform": run.identity.platform,
        "pid": run.identity.pid,
        "name": run.identity.name,
        "started_at": iso(run.identity.started_unix_ns),
        "recorded_from": None if run.first_wall_ns is None else iso(run.first_wall_ns),
        "recorded_to": None if run.last_wall_ns is None else iso(run.last_wall_ns),
        "snapshots": run.snapshots,
        "size_bytes": run.size_bytes,
    }
