"""Answer ``/history``, ``/marks``, ``/runs`` and ``/runs/{run_id}/history``, the routes of recordings."""

from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from vitalsd.contract.limits import ANSWER_THREADS, LABEL_CHARACTERS, STEP_MS
from vitalsd.contract.shapes import Lazy, UnixMs, UtcTime
from vitalsd.http.accept import JSON_OFFER, Offer, choose
from vitalsd.http.access.peer import peer_of
from vitalsd.http.operation import CommandExample, Operation, OperationRoute
from vitalsd.http.parameters import (
    Digits,
    HistorySeconds,
    NoQuery,
    StrictModel,
    json_body,
    query_params,
)
from vitalsd.http.responses import JSON, bare, problem
from vitalsd.http.routes.context import RouteContext
from vitalsd.http.single_flight import SingleFlight
from vitalsd.recording.recorder import NotRecordingError
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import RunJson, UnreadableRunError, read_run
from vitalsd.recording.series import Mark, Record
from vitalsd.sources.base import SourceError
from vitalsd.text import iso

__all__ = [
    "NO_SUCH_RUN",
    "RUN_EXAMPLE",
    "RUN_ID",
    "TARGET_EXAMPLE",
    "HistoryQuery",
    "MarkRequest",
    "RunHistoryQuery",
    "mark_json",
    "recordings_routes",
]

CSV_OFFER = Offer("text/csv")
CSV = "text/csv; charset=utf-8"
NO_SUCH_RUN = "no run has this id; GET /runs lists them"

TARGET_EXAMPLE = {
    "pid": 2345,
    "name": "python",
    "started_at": "2026-03-01T09:30:00.120Z",
    "start_id": "2345-142313-9bfa3fdd",
}
MARK_EXAMPLE = {"time": "2026-03-01T09:30:05.250Z", "time_ms": 1772357405250, "label": "F12 pressed"}
HISTORY_EXAMPLE = {
    "schema": 2,
    "platform": "linux",
    "target": TARGET_EXAMPLE,
    "interval_ms": 1000,
    "time_ms": [1772357404120, 1772357405121],
    "elapsed_ms": [1000.2, 1001.1],
    "cpu_percent": [24.1, 25.6],
    "rss_kb": [9920, 9924],
    "vm_size_kb": [234256, 234256],
    "thread_count": [2, 2],
    "wait_percent": [0.4, 31.2],
    "children_percent": [0.0, 0.0],
    "anonymous_kb": [6144, 6148],
    "footprint_kb": None,
    "swap_kb": [0, 0],
    "open_fds": [12, 12],
    "major_faults": [0, 3],
    "idle_wakeups": None,
    "interrupt_wakeups": None,
    "energy_nj": None,
    "machine": {
        "scope": "host",
        "cpu_percent": [212.5, 398.1],
        "other_percent": [188.4, 372.5],
        "load_1m": [2.11, 2.34],
        "memory_available_kb": [8125440, 8124992],
        "swap_used_kb": [0, 0],
        "cpu_pressure_percent": [0.5, 61.3],
        "memory_pressure_percent": [0.0, 0.0],
        "io_pressure_percent": [0.0, 0.2],
        "memory_pressure": None,
        "quota_throttled_percent": [0.0, 0.0],
        "thermal_state": ["nominal", "nominal"],
    },
    "application": None,
    "threads": [{"tid": 2375, "name": "render", "cpu_percent": [17.4, 17.6], "wait_percent": [0.3, 30.8]}],
    "children": [],
    "gauges": [{"name": "fps", "value": [60.0, 58.5]}],
    "marks": [{"time_ms": 1772357405250, "label": "F12 pressed"}],
    "events": [{"time_ms": 1772357405121, "kind": "missed", "detail": "2 snapshots are missing before this one"}],
}
CSV_EXAMPLE = (
    "time,elapsed_ms,cpu_percent,rss_kb,vm_size_kb,thread_count,wait_percent,children_percent,anonymous_kb,footprint_kb,"
    "swap_kb,open_fds,major_faults,idle_wakeups,interrupt_wakeups,energy_nj,machine_scope,machine_cpu_percent,"
    "machine_other_percent,machine_load_1m,machine_memory_available_kb,machine_swap_used_kb,"
    "machine_cpu_pressure_percent,machine_memory_pressure_percent,machine_io_pressure_percent,machine_memory_pressure,"
    "machine_quota_throttled_percent,machine_thermal_state,application_cpu_percent,application_rss_kb,"
    "application_process_count,application_complete,2375 render cpu_percent,2375 render wait_percent,gauge fps,"
    "marks,events\n"
    "2026-03-01T09:30:05.121Z,1001.1,25.6,9924,234256,2,31.2,0.0,6148,,0,12,3,,,,host,398.1,372.5,2.34,8124992,0,61.3,"
    "0.0,0.2,,0.0,nominal,,,,,17.6,30.8,58.5,mark: F12 pressed,\n"
)
RUN_EXAMPLE = {
    "id": "2345-142313-9bfa3fdd-2300",
    "state": "crashed",
    "ended": None,
    "reported": False,
    "app": "viewer",
    "app_version": "3.1",
    "platform": "linux",
    "host": {
        "system": "Linux",
        "release": "6.12.0",
        "version": "6.12.0",
        "arch": "x86_64",
        "cpu_count": 8,
        "utc_offset_minutes": 60,
    },
    "pid": 2345,
    "name": "python",
    "program": "6e7a2b51c0d4f893",
    "started_at": "2026-03-01T09:30:00.120Z",
    "recorded_from": "2026-03-01T09:30:01.000Z",
    "recorded_to": "2026-03-01T09:44:58.004Z",
    "snapshots": 897,
    "size_bytes": 413696,
}
RUN_ID: dict[str, Any] = {
    "name": "run_id",
    "in": "path",
    "required": True,
    "description": "Id of the run, from `/runs`.",
    "schema": {"type": "string"},
    "example": RUN_EXAMPLE["id"],
}


class MarkJson(TypedDict):
    """A label on the recorder's clock."""

    time: UtcTime
    time_ms: UnixMs
    label: str


def mark_json(mark: Mark) -> MarkJson:
    """Return a mark as ``GET /marks`` lists it."""
    return {"time": iso(mark.wall_ns), "time_ms": mark.wall_ns // 1_000_000, "label": mark.label}


HISTORY = Operation(
    path="/history",
    summary="What was recorded: process, machine, busiest threads, marks and events",
    description="The last `seconds` of the record, counted from its end.",
    answer="Columnar JSON; by `Accept: text/csv` CSV, a line per row.",
    shapes=(Lazy("vitalsd.recording.history_columns:HistoryJson"),),
    example=HISTORY_EXAMPLE,
    media_types={"text/csv": CSV_EXAMPLE},
    reasons=("not_recording", "busy"),
    unavailable=True,
    commands=(
        CommandExample(
            "The most CPU in a second of the last minute",
            "curl -s \"$URL/history?seconds=60\" | jq '.cpu_percent | max'",
        ),
        CommandExample(
            "CPU of the busiest threads, on average",
            "curl -s \"$URL/history?top=5\" | jq -r '.threads[] | [.name, (.cpu_percent | add / length)] | @tsv'",
        ),
        CommandExample(
            "CSV for a spreadsheet", "curl -s -H 'Accept: text/csv' \"$URL/history?step_ms=5000\" | head -3"
        ),
    ),
)
GET_MARKS = Operation(
    path="/marks",
    summary="The marks, oldest first",
    description="A mark is a label that a client set at a time on the recorder's clock.",
    answer="The marks, oldest first.",
    shapes=(MarkJson,),
    is_list=True,
    example=[MARK_EXAMPLE],
    commands=(CommandExample("The last one", 'curl -s "$URL/marks" | jq ".[-1].label"'),),
)
POST_MARKS = Operation(
    method="POST",
    path="/marks",
    summary="Set a mark",
    description="The body is JSON. The mark appears in the history, on the page and in reports.",
    answer="The new mark.",
    shapes=(MarkJson,),
    example=MARK_EXAMPLE,
    status=201,
    reasons=("bad_body", "not_recording"),
    commands=(
        CommandExample(
            "Mark this moment",
            'curl -s "$URL/marks" -H \'Content-Type: application/json\' -d \'{"label": "F12 pressed"}\' | jq .time',
        ),
    ),
)
RUNS = Operation(
    path="/runs",
    summary="Earlier runs on disk, crashed ones first",
    description="Each run of a target is one file on disk. A replay lists the other runs of its file.",
    answer="The runs, crashed ones first, then the newest first.",
    shapes=(RunJson,),
    is_list=True,
    example=[RUN_EXAMPLE],
    reasons=("hung",),
    commands=(
        CommandExample(
            "The crashed runs", 'curl -s "$URL/runs" | jq -c \'.[] | select(.state == "crashed") | {id, name}\''
        ),
    ),
)
RUN_HISTORY = Operation(
    path="/runs/{run_id}/history",
    summary="What an earlier run recorded, up to its end",
    description="The record of an earlier run, up to the last snapshot on disk.",
    answer="As for `/history`.",
    shapes=(Lazy("vitalsd.recording.history_columns:HistoryJson"),),
    example=HISTORY_EXAMPLE,
    media_types={"text/csv": CSV_EXAMPLE},
    reasons=("no_such_run", "unreadable_run", "hung", "busy"),
    parameters=(RUN_ID,),
    commands=(
        CommandExample(
            "The end of a run",
            'RUN=$(curl -s "$URL/runs" | jq -r ".[0].id")\n'
            'curl -s "$URL/runs/$RUN/history?seconds=10" | jq ".cpu_percent[-1]"',
        ),
    ),
)


class RunHistoryQuery(StrictModel):
    """Parameters of ``GET /runs/{run_id}/history``."""

    seconds: Annotated[
        HistorySeconds, Field(description="Length of the history, back from its end, s.", examples=[60])
    ] = 300
    top: Annotated[
        int, Digits(0, ANSWER_THREADS), Field(description="Number of threads, busiest first.", examples=[5])
    ] = 10
    step_ms: Annotated[
        int,
        Digits(*STEP_MS),
        Field(description="Minimum length of a row, ms; 0: a row for each snapshot.", examples=[5000]),
    ] = 0


class HistoryQuery(RunHistoryQuery):
    """Parameters of ``GET /history``."""

    pid: Annotated[
        Annotated[int, Digits(1, 2**31 - 1)] | None,
        Field(description="The recorded process; if it is another one, the request is refused.", examples=[4242]),
    ] = None


class MarkRequest(StrictModel):
    """The body of ``POST /marks``."""

    model_config = ConfigDict(strict=True)

    label: Annotated[
        str,
        Field(min_length=1, max_length=LABEL_CHARACTERS, description="One line of text.", examples=["F12 pressed"]),
    ]


def recordings_routes(context: RouteContext) -> list[OperationRoute]:
    """Return the routes of the recording, its marks and the earlier runs."""
    marks, runs = _Marks(context), _Runs(context)
    return [
        OperationRoute(HISTORY, _History(context).answer),
        OperationRoute(GET_MARKS, marks.listed),
        OperationRoute(POST_MARKS, marks.added),
        OperationRoute(RUNS, runs.listed),
        OperationRoute(RUN_HISTORY, runs.history),
    ]


class _History:
    """Answer ``GET /history``."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context
        self._tables = SingleFlight()  # Separate from earlier runs: their reads may wait for the disk.

    async def answer(self, request: Request, query: Annotated[HistoryQuery, query_params(HistoryQuery)]) -> Response:
        target = self._context.targets.default
        try:
            await target.identity()
        except SourceError as error:
            if target.recorder.record is None:
                return self._context.unavailable(error)
        record = target.recorder.record
        if record is None:
            raise NotRecordingError(target.recorder.why_not_recorded)
        if query.pid not in (None, record.identity.pid):
            raise NotRecordingError(
                f"process {record.identity.pid} is recorded here; to record another: vitalsd serve --pid {query.pid}"
            )
        csv = _is_csv(request)
        if request.method == "HEAD":
            return _bare_table(csv=csv)
        # The key of a table: each addition to the record changes it.
        newest = record, record.last, *(notes[-1] if notes else None for notes in (record.marks, record.events))
        key = newest, query.seconds, query.top, query.step_ms, csv
        return await self._tables.make(
            lambda: _table(self._context, record, query, csv=csv), key, peer_of(request.scope)
        )


class _Marks:
    """Answer ``/marks``."""

    def __init__(self, context: RouteContext) -> None:
        self._targets = context.targets

    async def listed(self, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        record = self._targets.default.recorder.record
        return JSON([mark_json(mark) for mark in list(record.marks)] if record is not None else [])

    async def added(
        self,
        body: Annotated[MarkRequest, json_body(MarkRequest)],
        query: Annotated[NoQuery, query_params(NoQuery)],
    ) -> Response:
        try:
            mark = await self._targets.default.recorder.mark_async(body.label)
        except ValueError as error:
            return problem("bad_body", str(error), parameter="label")
        return JSON(mark_json(mark), 201)


class _Runs:
    """Answer ``/runs`` and ``/runs/{run_id}/history``."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context
        self._targets, self._run_directory = context.targets, context.run_directory
        self._reads = SingleFlight()
        self._listings = 0

    async def listed(self, request: Request, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        run_directory = self._run_directory
        if request.method == "HEAD":
            return bare()
        if (replay := self._targets.default.replay) is not None:
            return JSON([each.run.to_json() for each in replay.file.others])
        if run_directory is None:
            return JSON([])

        async def listing() -> Response:
            self._listings += 1  # A later request must not share a listing that was read before it.
            return JSON([run.to_json() for run in await run_directory.read(RunDirectory.runs)])

        return await self._reads.make(listing, ("runs", self._listings), peer_of(request.scope))

    async def history(
        self, request: Request, query: Annotated[RunHistoryQuery, query_params(RunHistoryQuery)]
    ) -> Response:
        run_id, csv, peer = request.path_params["run_id"], _is_csv(request), peer_of(request.scope)
        if request.method == "HEAD":
            there = await self._reads.make(lambda: self._has(run_id), peer=peer)
            return _bare_table(csv=csv) if there else problem("no_such_run", NO_SUCH_RUN)

        async def answer() -> Response:
            try:
                record = await self._record(run_id)
            except (UnreadableRunError, OSError) as error:
                return problem("unreadable_run", str(error))
            if record is None:
                return problem("no_such_run", NO_SUCH_RUN)
            return await _table(self._context, record, query, csv=csv)

        return await self._reads.make(answer, peer=peer)

    async def _has(self, run_id: str) -> bool:
        if (replay := self._targets.default.replay) is not None:
            return replay.find(run_id) is not None
        return self._run_directory is not None and await self._run_directory.has(run_id)

    async def _record(self, run_id: str) -> Record | None:
        """
        Return the record of an earlier run; None if there is no such run.

        Raises:
            UnreadableRunError: its file is damaged.
            OSError: its file cannot be read.
        """
        if (replay := self._targets.default.replay) is not None:
            replayed = replay.find(run_id)
            return replayed.record if replayed else None

        def load(runs: RunDirectory) -> Record | None:
            run = runs.find(run_id)
            return read_run(run.path)[1] if run else None

        return await self._run_directory.read(load) if self._run_directory else None


async def _table(context: RouteContext, record: Record, query: RunHistoryQuery, *, csv: bool) -> Response:
    """Return the last `query.seconds` of `record`, counted from its end."""
    last = record.last
    since_ns = last.monotonic_ns - query.seconds * 1_000_000_000 if last else 0

    def render() -> bytes:
        from vitalsd.recording.history import history

        table = history(record, since_ns=since_ns, top=query.top, step_ns=query.step_ms * 1_000_000)
        return table.to_csv() if csv else table.to_json()

    body = await context.reader.run_unbounded(render)
    if csv:
        return Response(body, headers={"Content-Type": CSV, "Cache-Control": "no-store"})
    return JSON(body)


def _bare_table(*, csv: bool) -> Response:
    return bare(CSV) if csv else bare()


def _is_csv(request: Request) -> bool:
    return choose(request.headers.get("accept", ""), (JSON_OFFER, CSV_OFFER)) is CSV_OFFER
