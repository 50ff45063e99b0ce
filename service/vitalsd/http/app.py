"""The routes. Every answer is prepared bytes; the models only declare the schema."""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Response

from vitalsd.http import problem
from vitalsd.http.query import MetricsQuery, NoQuery, unique_parameters
from vitalsd.model import FullMetrics, Measured, Unavailable
from vitalsd.sampler import KernelThread, Sampler, Targets
from vitalsd.sources import (
    AccessDenied,
    KernelError,
    NoSuchProcess,
    ProcessEntry,
    SourceError,
    TargetGone,
    Unsupported,
    platform_name,
)
from vitalsd.wire import encode, iso, unavailable

__all__ = ["create_app"]

STATUS: dict[type[SourceError], int] = {
    AccessDenied: 403,
    NoSuchProcess: 404,
    TargetGone: 410,
    Unsupported: 501,
    KernelError: 503,
}

REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": problem.Problem, "description": "A parameter is wrong."},
    429: {"model": problem.Problem, "description": "Too much at once."},
}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    403: {"model": Unavailable, "description": "This user may not read the target."},
    404: {"model": Unavailable, "description": "No such process."},
    410: {"model": Unavailable, "description": "The target has exited."},
    501: {"model": Unavailable, "description": "Not on this platform."},
    503: {"model": Unavailable, "description": "The kernel refused, or the target does not answer."},
}


class JSON(Response):
    """JSON bytes that nobody caches."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":"))
        super().__init__(body, status_code, {"Cache-Control": "no-store"})


def create_app(targets: Targets, list_processes: Callable[[], Iterable[ProcessEntry]]) -> FastAPI:
    """
    The application over `targets`. It closes them when it shuts down.

    Args:
        targets: who is measured.
        list_processes: what ``/processes`` lists.
    """
    lister = KernelThread("vitalsd-processes")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await targets.close()
        lister.stop(1)

    app = FastAPI(
        title="vitalsd",
        version=version("vitalsd"),
        summary="What one process is doing: CPU, memory and every thread.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(unique_parameters)],
    )

    @app.get(
        "/metrics",
        response_class=JSON,
        responses={200: {"model": FullMetrics | Measured}, **UNAVAILABLE, **REFUSALS},
        summary="CPU, memory and every thread, over a window",
    )
    async def metrics(query: Annotated[MetricsQuery, Query()]) -> Response:
        try:
            async with targets.sampler(query.pid) as sampler:
                measurement = await sampler.window(query.window_ms, extras=query.detail == "full")
                identity = await sampler.identity()
        except SourceError as error:
            return JSON(unavailable(error), STATUS[type(error)])
        return JSON(
            encode(
                measurement,
                identity,
                requested_ms=query.window_ms,
                mode=query.mode,
                detail=query.detail,
                sort=query.sort,
                limit=query.limit,
            )
        )

    @app.get("/processes", response_class=JSON, responses=REFUSALS, summary="Processes this user may sample")
    async def processes(query: Annotated[NoQuery, Query()]) -> Response:
        from asyncio import wrap_future

        try:
            entries = await wrap_future(lister.submit(lambda: list(list_processes())))
        except SourceError as error:
            return JSON(unavailable(error), STATUS[type(error)])
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

    @app.get("/healthz", response_class=JSON, summary="Is the service alive?")
    async def healthz(query: Annotated[NoQuery, Query()]) -> Response:
        return JSON({"status": "ok"})

    @app.get("/info", response_class=JSON, responses=REFUSALS, summary="Version, target, platform and own cost")
    async def info(query: Annotated[NoQuery, Query()]) -> Response:
        return JSON(await _info(targets.default))

    problem.install(app)
    return app


async def _info(sampler: Sampler) -> dict[str, Any]:
    target: dict[str, Any]
    try:
        identity = await sampler.identity()
    except SourceError as error:
        target = {"available": False, "reason": str(error)}
    else:
        target = {
            "pid": identity.pid,
            "name": identity.name,
            "started_at": iso(identity.started_unix_ns),
            "start_id": identity.start_id,
        }
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak_rss_kb = usage.ru_maxrss // 1024 if sys.platform == "darwin" else usage.ru_maxrss
    return {
        "version": version("vitalsd"),
        "python": platform.python_version(),
        "platform": platform_name(),
        "os_version": platform.release(),
        "arch": platform.machine(),
        "cpu_count": os.cpu_count() or 1,
        "target": target,
        "capabilities": ["detail=full", "mode=wait", "pid", "processes"],
        "self": {
            "pid": os.getpid(),
            "cpu_secs": round(time.process_time(), 3),
            "peak_rss_kb": peak_rss_kb,
            "snapshots": sampler.snapshots_taken,
        },
    }
