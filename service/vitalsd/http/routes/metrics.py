"""Answer ``/metrics`` and ``/stream``, the routes that measure."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Literal

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.types import Receive, Scope, Send

from vitalsd.admission import BusyError, Peer, Shares
from vitalsd.contract.encoding import Detail, Labels, encode, unavailable
from vitalsd.contract.limits import STREAMS, WINDOW_MS
from vitalsd.contract.shapes import Lazy
from vitalsd.exporters.counters import NO_SIGNALS, SignalsReading
from vitalsd.exporters.prometheus import Form, Scrape, content_type_of, expose
from vitalsd.http.accept import JSON_OFFER, Offer, choose
from vitalsd.http.access.peer import peer_of
from vitalsd.http.operation import CommandExample, Operation, OperationRoute
from vitalsd.http.parameters import Digits, OtherPid, SortBy, StrictModel, ThreadLimit, WindowMs, query_params
from vitalsd.http.responses import JSON, ProblemError, bare, problem
from vitalsd.http.routes.context import RouteContext
from vitalsd.http.single_flight import SingleFlight
from vitalsd.sampling.target_pool import PooledTarget, Stream
from vitalsd.snapshot import Identity, Measurement, Part
from vitalsd.sources.base import SourceError

__all__ = ["OFFERS", "MetricsQuery", "StreamQuery", "metrics_routes"]

OFFERS: dict[Offer, Form | None] = {
    JSON_OFFER: None,
    Offer("application/openmetrics-text", "1.0.0"): "application/openmetrics-text",
    Offer("text/plain", "1.0.0", is_default_version=False): "text/plain;version=1.0.0",
    Offer("text/plain", "0.0.4"): "text/plain;version=0.0.4",
}
"""Forms of ``/metrics``. Text without a version means the oldest form, which all scrapers accept."""
EVENTS = "text/event-stream; charset=utf-8"
UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Header that keeps nginx and other proxies from buffering events."""

EXAMPLE = {
    "sample_window_ms": 501,
    "process": {"cpu_percent": 25.55, "rss_kb": 9924, "vm_size_kb": 234256, "uptime_secs": 6.035},
    "threads": [
        {"tid": 2345, "name": "python", "cpu_percent": 0.0},
        {"tid": 2375, "name": "render", "cpu_percent": 17.621},
    ],
    "platform": "linux",
}
SCRAPE_EXAMPLE = (
    "# HELP process_cpu_seconds_total CPU time of the target, living and exited threads, user and system, in seconds.\n"
    "# TYPE process_cpu_seconds_total counter\n"
    "process_cpu_seconds_total 12.25\n"
)

METRICS = Operation(
    path="/metrics",
    summary="CPU, memory and every thread, over a window; cumulative counters for a scraper",
    description="CPU is in percent of one core, over the measured time. With the `Accept` header of a scraper, the"
    " answer has cumulative counters and gauges of this instant, and the window parameters have no effect.",
    answer="The basic answer, or with `detail=full` the full one; with the `Accept` header of a scraper, Prometheus"
    " text or OpenMetrics.",
    shapes=(Lazy("vitalsd.contract.metrics:FullMetrics"), Lazy("vitalsd.contract.metrics:Measured")),
    example=EXAMPLE,
    media_types={"text/plain": SCRAPE_EXAMPLE, "application/openmetrics-text": SCRAPE_EXAMPLE + "# EOF\n"},
    reasons=("busy", "not_acceptable"),
    unavailable=True,
    commands=(
        CommandExample("The three busiest threads", "curl -s \"$URL/metrics?sort=cpu&limit=3\" | jq '.threads'"),
        CommandExample(
            "The process alone, over half a second", 'curl -s "$URL/metrics?window_ms=500" | jq .process.cpu_percent'
        ),
        CommandExample(
            "The last 5 s, from the record", 'curl -s "$URL/metrics?mode=trailing&window_ms=5000" | jq .process'
        ),
        CommandExample("CPU time of living and exited threads", 'curl -s "$URL/metrics?detail=full" | jq .accounting'),
        CommandExample(
            "The counters that a scraper gets",
            "curl -s -H 'Accept: text/plain' \"$URL/metrics\" | grep ^process_cpu_seconds",
        ),
    ),
)
STREAM = Operation(
    path="/stream",
    summary="Server-Sent Events: one answer of /metrics for each window",
    description="Each event is an answer of `/metrics` on one line. `id` counts the windows, including those"
    " that a slow reader missed. If the target can no longer be measured, a last event `unavailable` gives the reason.",
    answer="Server-Sent Events, until the client disconnects, for at most one hour.",
    media_types={"text/event-stream": f"id: 1\ndata: {json.dumps(EXAMPLE, separators=(',', ':'))}\n\n"},
    reasons=("busy",),
    unavailable=True,
    commands=(
        CommandExample(
            "CPU five times a second, for two seconds",
            'curl -sN -m 2 "$URL/stream?interval_ms=200"'
            " | jq --unbuffered -rR 'select(startswith(\"data: \")) | .[6:] | fromjson | .process.cpu_percent'",
        ),
    ),
)


AnswerDetail = Annotated[
    Detail,
    Field(description="`full` adds accounting, errors, waits, memory, the machine and more.", examples=["full"]),
]
WithChildren = Annotated[
    Literal["true", "false"],
    Field(
        description="`true`, with `detail=full`: name the living descendants of the process, and sum the application.",
        examples=["true"],
    ),
]


class MetricsQuery(StrictModel):
    """Parameters of ``GET /metrics``."""

    window_ms: WindowMs = 1000
    mode: Annotated[
        Literal["wait", "trailing"],
        Field(
            description="`wait` measures the coming window. `trailing` returns the last recorded window at once,"
            " also after the exit of the target. If nothing has been recorded, it waits.",
            examples=["trailing"],
        ),
    ] = "wait"
    detail: AnswerDetail = "basic"
    children: WithChildren = "false"
    sort: SortBy = "tid"
    limit: ThreadLimit = None
    pid: OtherPid = None


class StreamQuery(StrictModel):
    """Parameters of ``GET /stream``."""

    interval_ms: Annotated[
        int, Digits(*WINDOW_MS), Field(description="Interval of the answers, ms.", examples=[200])
    ] = 1000
    detail: AnswerDetail = "basic"
    children: WithChildren = "false"
    sort: SortBy = "tid"
    limit: ThreadLimit = None
    pid: OtherPid = None


def metrics_routes(context: RouteContext) -> list[OperationRoute]:
    """Return the routes ``/metrics`` and ``/stream``."""
    labels = Labels()
    return [
        OperationRoute(METRICS, _Metrics(context, labels).answer),
        OperationRoute(STREAM, _Streams(context, labels).answer),
    ]


class _Metrics:
    """Answer ``GET /metrics``."""

    def __init__(self, context: RouteContext, labels: Labels) -> None:
        self._context = context
        self._targets = context.targets
        self._labels = labels
        self._scrapes = SingleFlight()

    async def answer(self, request: Request, query: Annotated[MetricsQuery, query_params(MetricsQuery)]) -> Response:
        parts = _parts(query)
        offer = choose(request.headers.get("accept", ""), tuple(OFFERS))
        if offer is None:
            there = "application/json, text/plain (Prometheus, version 0.0.4 or 1.0.0) and application/openmetrics-text"
            return problem("not_acceptable", f"there are {there}; /stream has text/event-stream")
        form, peer = OFFERS[offer], peer_of(request.scope)
        if not peer.is_owner and (refusal := self._private(query)):
            return refusal
        if request.method == "HEAD":
            reader = self._context.reader
            return bare() if form is None else bare(await reader.run_unbounded(lambda: content_type_of(form)))
        return await (self._window(query, parts, peer) if form is None else self._counters(query, form, peer))

    async def _window(self, query: MetricsQuery, parts: Part, peer: Peer) -> Response:
        """Answer with one window."""
        try:
            async with self._targets.target(query.pid, peer) as target:
                measurement, identity, mode = await _measured(target, query, parts, peer)
        except SourceError as error:
            return self._context.unavailable(error)
        return JSON(
            encode(
                measurement if peer.is_owner else measurement.public(),
                identity,
                requested_ms=query.window_ms,
                mode=mode,
                detail=query.detail,
                sort=query.sort,
                limit=query.limit,
                children=query.children == "true",
                labels=self._labels,
                warnings=_recording_warnings(target) if query.detail == "full" else (),
                host=target.replay.host if target.replay else None,
            )
        )

    async def _counters(self, query: MetricsQuery, form: Form, peer: Peer) -> Response:
        """Answer a scraper."""
        reader, scrape = self._context.reader, await self._scrape(query.pid, peer)
        body, content_type = await self._scrapes.make(
            lambda: reader.run_unbounded(lambda: expose(scrape, form)), peer=peer
        )
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    async def _scrape(self, pid: int | None, peer: Peer) -> Scrape:
        read, snapshots, recorder, signals = None, 0, None, NO_SIGNALS
        with suppress(SourceError):
            async with self._targets.target(pid, peer) as target:
                snapshots, recorder = target.snapshots_taken, None if target.replay else target.recorder.info()
                identity, snapshot = await target.identity(), await target.snapshot()
                read = identity, snapshot if peer.is_owner else snapshot.public()
                signals = SignalsReading.of(target)
        return Scrape(read, self._context.thread_metrics, snapshots, recorder, private=peer.is_owner, signals=signals)

    def _private(self, query: MetricsQuery) -> Response | None:
        """Return a refusal if `query` requests more than ps(1) and top(1) show to another user."""
        if self._targets.default.replay is not None:
            return problem("another_user", "a recorded run is for the user that replays it")
        if query.detail != "basic":
            return problem("another_user", "detail=full is for the owner of the sidecar")
        if self._context.hides_processes():
            return problem("another_user", "/proc is mounted with hidepid here: processes are hidden from other users")
        return None


async def _measured(
    target: PooledTarget, query: MetricsQuery, parts: Part, peer: Peer
) -> tuple[Measurement, Identity, Literal["wait", "trailing"]]:
    """Return the window, the identity of the target, and the mode that produced the window."""
    identity = await target.identity()
    # The recorded past is for the owner only: another user waits for the coming window.
    record = target.recorder.record if query.mode == "trailing" and peer.is_owner else None
    measurement = record.window(query.window_ms) if record else None
    if measurement is not None:
        return measurement, identity, query.mode
    measurement = await target.window(query.window_ms, parts=parts, peer=peer)
    # Read the identity at the end of the window: the process may have another name then.
    return measurement, await target.identity(), "wait"


def _parts(query: MetricsQuery | StreamQuery) -> Part:
    """Return what the snapshots of a window have beside their counters. Raise `ProblemError`."""
    if query.children == "true":
        if query.detail != "full":
            raise ProblemError("bad_parameter", "children=true is answered with detail=full alone", "children")
        return Part.DETAIL | Part.CHILDREN
    return Part.DETAIL if query.detail == "full" else Part.NONE


def _recording_warnings(target: PooledTarget) -> tuple[str, ...]:
    """Return warnings about the recording of this process; empty if it is complete or nothing is recorded."""
    recorder = target.recorder.info()
    black_box = recorder.get("black_box") if recorder is not None else None
    return (black_box["error"],) if black_box and black_box["error"] else ()


class _Streams:
    """Answer ``GET /stream``."""

    def __init__(self, context: RouteContext, labels: Labels) -> None:
        self._context = context
        self._labels = labels
        self._open = Shares(STREAMS)

    async def answer(self, request: Request, query: Annotated[StreamQuery, query_params(StreamQuery)]) -> Response:
        peer, parts = peer_of(request.scope), _parts(query)
        if not self._open.take(peer):
            raise BusyError(f"{STREAMS} streams are open already")
        async with AsyncExitStack() as stack:
            stack.callback(self._open.release, peer)
            if request.method == "HEAD":
                head = bare(EVENTS)
                head.headers.update(UNBUFFERED)
                return head
            try:
                target = await stack.enter_async_context(self._context.targets.target(query.pid, peer))
                identity = await target.identity()
                await target.snapshot()  # The status must not be 200 if the target has exited.
            except SourceError as error:
                return self._context.unavailable(error)
            windows = Stream(target, query.interval_ms, peer, parts)
            stack.push_async_callback(windows.close)
            return _EventResponse(self._events(windows, identity, query), stack.pop_all())

    async def _events(self, windows: Stream, identity: Identity, query: StreamQuery) -> AsyncIterator[bytes]:
        try:
            number, until_s = 0, time.monotonic() + self._context.stream_s
            async for measurement in windows:
                number += 1
                body = encode(
                    measurement,
                    identity,
                    requested_ms=query.interval_ms,
                    detail=query.detail,
                    sort=query.sort,
                    limit=query.limit,
                    children=query.children == "true",
                    labels=self._labels,
                )
                yield b"id: %d\ndata: %b\n\n" % (number + windows.dropped, body)
                if time.monotonic() >= until_s:
                    break
        except SourceError as error:
            yield b"event: unavailable\ndata: %b\n\n" % unavailable(error, self._context.targets.default.platform)


class _EventResponse(StreamingResponse):
    """
    Send Server-Sent Events, and release their resources at the end.

    Args:
        events: the bytes of the events.
        needed: closed after the last event, or when the client disconnects, even before the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], needed: AsyncExitStack) -> None:
        super().__init__(events, headers={"Content-Type": EVENTS, "Cache-Control": "no-store", **UNBUFFERED})
        self._needed = needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._needed:
            await super().__call__(scope, receive, send)
