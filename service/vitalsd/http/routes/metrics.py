"""Routes that look at running processes: ``/metrics``, ``/stream``, ``/processes``, ``/info``, ``/healthz``."""

import os
import platform
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vitalsd import __version__
from vitalsd.admission import Busy, Peer, Shares
from vitalsd.contract.application import Application
from vitalsd.contract.encoding import Labels, encode, target_json, unavailable, unavailable_json
from vitalsd.contract.host import Host
from vitalsd.exporters.prometheus import Scrape, content_type_of, expose, negotiate
from vitalsd.http.access.peer import peer_of
from vitalsd.http.parameters import READING, MetricsQuery, NoQuery, StreamQuery, StrictRoute, given
from vitalsd.http.responses import JSON, bare, failed, problem
from vitalsd.http.single_flight import Turns
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.target_pool import PooledTarget, Stream, Targets
from vitalsd.sources.base import KernelError, ProcessEntry, SourceError
from vitalsd.text import iso
from vitalsd.worker_thread import Hung, Worker

__all__ = ["STREAM_S", "live_routes"]

MAX_STREAMS = 8
STREAM_S = 3600.0
"""Then a stream ends, and a forgotten one takes no place for ever; an EventSource begins the next by itself."""

EVENTS = "text/event-stream; charset=utf-8"
UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Otherwise nginx, and proxies that follow it, keep the events of a stream until a buffer is full."""
FORMS = "application/json, text/plain (Prometheus, version 0.0.4 or 1.0.0) and application/openmetrics-text"


def live_routes(
    targets: Targets,
    list_processes: Callable[[], Iterable[ProcessEntry]],
    reader: Worker,
    lister: Worker,
    shelf: RunDirectoryReader | None,
    *,
    thread_metrics: int,
    stream_s: float = STREAM_S,
    application: Application = Application(),
    hides_processes: Callable[[], bool] = lambda: False,
) -> APIRouter:
    """
    The routes over `targets`.

    Args:
        list_processes: what ``/processes`` lists; called on `lister`.
        hides_processes: whether the kernel hides processes from other users.
        shelf: earlier runs; ``/healthz`` says if they hang.
        thread_metrics: threads that a scraper is shown, see `Scrape`.
        stream_s: after so long a stream ends.
        application: what the client says it is.
    """
    routes = APIRouter(route_class=StrictRoute)
    streams = Shares(MAX_STREAMS)
    scrapes, listings = Turns(), Turns()
    labels = Labels()

    @routes.api_route(
        "/metrics",
        methods=READING,
        summary="CPU, memory and every thread, over a window; cumulative counters for a scraper",
    )
    async def metrics(request: Request, query: Annotated[MetricsQuery, given(MetricsQuery)]) -> Response:
        form = negotiate(request.headers.get("accept", ""))
        if form is None:
            return problem("not_acceptable", f"there are {FORMS}; /stream has text/event-stream")
        peer = peer_of(request.scope)
        if not peer.is_owner and (refusal := _private(query, targets, hides_processes)):
            return refusal
        if request.method == "HEAD":
            return bare() if form == "json" else bare(await reader.result(lambda: content_type_of(form)))
        if form != "json":
            scrape = await _scrape(targets, query.pid, thread_metrics, peer)
            body, content_type = await scrapes.make(lambda: reader.result(lambda: expose(scrape, form)), peer=peer)
            return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
        try:
            async with targets.target(query.pid, peer) as target:
                identity = await target.identity()
                # The record is the past, which is for the owner: another user waits for the coming window.
                record = target.recorder.record if query.mode == "trailing" and peer.is_owner else None
                measurement = record.window(query.window_ms) if record else None
                mode = "wait" if measurement is None else query.mode
                if measurement is None:
                    measurement = await target.window(query.window_ms, extras=query.detail == "full", peer=peer)
                    identity = await target.identity()  # by the end it may be called otherwise
        except SourceError as error:
            return failed(error, targets.default.platform)
        return JSON(
            encode(
                measurement if peer.is_owner else measurement.public(),
                identity,
                requested_ms=query.window_ms,
                mode=mode,
                detail=query.detail,
                sort=query.sort,
                limit=query.limit,
                labels=labels,
                warnings=_recording_warnings(target) if query.detail == "full" else (),
                host=target.replay.host if target.replay else None,
            )
        )

    @routes.api_route("/stream", methods=READING, summary="Server-Sent Events, one answer of /metrics each")
    async def stream(request: Request, query: Annotated[StreamQuery, given(StreamQuery)]) -> Response:
        peer = peer_of(request.scope)
        if not streams.take(peer):
            raise Busy(f"{MAX_STREAMS} streams are open already")
        async with AsyncExitStack() as stack:
            stack.callback(streams.release, peer)
            if request.method == "HEAD":
                head = bare(EVENTS)
                head.headers.update(UNBUFFERED)
                return head
            try:
                target = await stack.enter_async_context(targets.target(query.pid, peer))
                identity = await target.identity()
                await target.snapshot()  # or one that has exited would be told of after the head of a 200
            except SourceError as error:
                return failed(error, targets.default.platform)
            windows = Stream(target, query.interval_ms, peer)
            stack.push_async_callback(windows.close)
            kept = stack.pop_all()

        async def events() -> AsyncIterator[bytes]:
            try:
                number, until_s = 0, time.monotonic() + stream_s
                async for measurement in windows:
                    number += 1
                    body = encode(
                        measurement,
                        identity,
                        requested_ms=query.interval_ms,
                        sort=query.sort,
                        limit=query.limit,
                        labels=labels,
                    )
                    yield b"id: %d\ndata: %b\n\n" % (number + windows.dropped, body)
                    if time.monotonic() >= until_s:
                        break
            except SourceError as error:
                yield b"event: unavailable\ndata: %b\n\n" % unavailable(error, targets.default.platform)

        return _Events(events(), kept)

    @routes.api_route("/processes", methods=READING, summary="Processes this user may sample")
    async def processes(request: Request, query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        if request.method == "HEAD":
            return bare()
        try:
            entries = await listings.make(
                lambda: lister.ask(lambda: list(list_processes()), "the list of processes: a read"),
                peer=peer_of(request.scope),
            )
        except SourceError as error:
            return failed(error, targets.default.platform)
        except Hung as error:
            return failed(KernelError(str(error)), targets.default.platform)
        return JSON(
            [
                {
                    "pid": entry.pid,
                    "name": entry.name,
                    "started_at": iso(entry.started_unix_ns),
                    "cpu_time_secs": entry.cpu_ns / 1e9,
                    "rss_kb": entry.rss_bytes // 1024,
                    "thread_count": entry.thread_count,
                }
                for entry in entries
            ]
        )

    @routes.api_route("/healthz", methods=READING, summary="Whether the service is alive")
    async def healthz(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        if await targets.hangs() or await lister.hangs():
            return problem("hung", str(Hung("a read of the kernel")))
        if shelf is not None and await shelf.worker.hangs():
            return problem("hung", str(Hung("the directory of runs: a read")))
        if await targets.default.recorder.hangs():
            return problem("hung", str(Hung("the directory of runs: a write")))
        return JSON({"status": "ok"})

    @routes.api_route("/info", methods=READING, summary="Version, target, platform and own cost")
    async def info(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        return JSON(await _info(targets.default, application))

    return routes


class _Events(StreamingResponse):
    """
    Server-Sent Events, and what they need, which is released at the end.

    Args:
        events: the bytes of the events.
        needed: closed when the last event was sent or the client has left, even if that was before the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], needed: AsyncExitStack) -> None:
        super().__init__(events, headers={"Content-Type": EVENTS, "Cache-Control": "no-store", **UNBUFFERED})
        self._needed = needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._needed:
            await super().__call__(scope, receive, send)


def _recording_warnings(target: PooledTarget) -> tuple[str, ...]:
    """What is wrong with the record of this process, if it is recorded."""
    black_box = (target.recorder.info() or {}).get("black_box")
    return (black_box["error"],) if black_box and black_box["error"] else ()


def _private(query: MetricsQuery, targets: Targets, hides_processes: Callable[[], bool]) -> Response | None:
    """Return a refusal if `query` asks for more than ps(1) and top(1) show to another user of the machine."""
    if targets.default.replay is not None:
        return problem("another_user", "a recorded run is for the user that replays it")
    if query.detail != "basic":
        return problem("another_user", "detail=full is for the owner of the sidecar")
    if hides_processes():
        return problem("another_user", "/proc is mounted with hidepid here: processes are hidden from other users")
    return None


async def _scrape(targets: Targets, pid: int | None, threads: int, peer: Peer) -> Scrape:
    read, snapshots, recorder = None, 0, None
    with suppress(SourceError):
        async with targets.target(pid, peer) as target:
            snapshots, recorder = target.snapshots_taken, None if target.replay else target.recorder.info()
            identity, snapshot = await target.identity(), await target.snapshot()
            read = identity, snapshot if peer.is_owner else snapshot.public()
    return Scrape(read, threads, snapshots, recorder, private=peer.is_owner)


async def _info(target: PooledTarget, application: Application) -> dict[str, Any]:
    try:
        identity = await target.identity()
    except SourceError as error:
        who = unavailable_json(error, target.platform)
    else:
        who = {**target_json(identity), "program": identity.program}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    replay = target.replay
    host = Host.this() if replay is None else replay.host
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": target.platform,
        "os_version": host.version,
        "arch": host.arch,
        "cpu_count": host.cpu_count,
        "utc_offset_minutes": host.utc_offset_minutes,
        **(application if replay is None else replay.application)._asdict(),
        "target": who,
        "replay": None if replay is None else replay.to_json(),
        "capabilities": ["detail=full", "history", "marks", "mode=trailing", "pid", "processes", "runs", "stream"],
        "recorder": target.recorder.info(),
        "self": {
            "pid": os.getpid(),
            "cpu_secs": round(time.process_time(), 3),
            "peak_rss_kb": usage.ru_maxrss // (1024 if sys.platform == "darwin" else 1),
            "snapshots": target.snapshots_taken,
        },
    }
