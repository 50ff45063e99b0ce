"""Answer ``/processes``, ``/healthz`` and ``/info``, the routes about the sidecar and its machine."""

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from typing_extensions import TypedDict

from vitalsd import __version__
from vitalsd.contract.application import Application
from vitalsd.contract.encoding import unavailable_json
from vitalsd.contract.host import RecordedHost
from vitalsd.contract.shapes import APP, PROGRAM, Count, Doc, Lazy, Seconds, UtcTime
from vitalsd.http.access.peer import peer_of
from vitalsd.http.operation import CommandExample, Operation, OperationRoute
from vitalsd.http.parameters import NoQuery, query_params
from vitalsd.http.responses import JSON, bare, problem
from vitalsd.http.routes.context import RouteContext
from vitalsd.http.routes.recordings import TARGET_EXAMPLE
from vitalsd.http.single_flight import SingleFlight
from vitalsd.recording.recorder import RecorderJson
from vitalsd.sampling.target_pool import PooledTarget
from vitalsd.sources.base import KernelError, ProcessEntry, SourceError
from vitalsd.text import iso
from vitalsd.worker_thread import HungError

__all__ = ["status_routes"]


class ProcessJson(TypedDict):
    """A process this user may sample."""

    pid: Count
    name: str
    started_at: Annotated[UtcTime, Doc("Wall-clock start, UTC.")]
    cpu_time_secs: Annotated[Seconds, Doc("CPU time since the start, s.")]
    rss_kb: Annotated[Count, Doc("Resident memory, KiB.")]
    thread_count: Count


class HealthJson(TypedDict):
    """The service answers."""

    status: Literal["ok"]


class WatchedJson(TypedDict):
    """The target and its program."""

    pid: Count
    name: str
    started_at: Annotated[UtcTime, Doc("Wall-clock start, UTC.")]
    start_id: Annotated[str, Doc("pid, start time and boot, so that a reused pid differs.")]
    program: Annotated[str, PROGRAM]


class OwnCostJson(TypedDict):
    """CPU time and memory of the sidecar itself."""

    pid: Count
    cpu_secs: Annotated[Seconds, Doc("CPU time since its start, s.")]
    peak_rss_kb: Annotated[Count, Doc("Peak resident memory, KiB.")]
    snapshots: Annotated[Count, Doc("Snapshots of the target since the start.")]


class InfoJson(TypedDict):
    """The service, its target and its own cost."""

    version: str
    python: str
    platform: Annotated[str, Lazy("vitalsd.contract.metrics:Platform")]
    os_version: Annotated[str | None, Doc("Version of the operating system of the recorded machine.")]
    arch: str | None
    cpu_count: Count | None
    utc_offset_minutes: Annotated[int | None, Doc("Local time less UTC of the recorded machine, minutes.")]
    app: Annotated[str | None, APP]
    app_version: str | None
    target: WatchedJson | Annotated[dict[str, Any], Lazy("vitalsd.contract.metrics:Unavailable")]
    replay: Annotated[
        Annotated[Mapping[str, Any], Lazy("vitalsd.recording.replay:ReplayedJson")] | None,
        Doc("The file that is replayed; null: a process is measured."),
    ]
    capabilities: list[str]
    recorder: Annotated[RecorderJson | None, Doc("null: nothing is recorded.")]
    self: OwnCostJson


PROCESSES = Operation(
    path="/processes",
    summary="Processes this user may sample",
    description="Any of them can be measured with `/metrics?pid=`.",
    answer="The processes this user may sample.",
    shapes=(ProcessJson,),
    is_list=True,
    example=[
        {
            "pid": 2345,
            "name": "python",
            "started_at": "2026-03-01T09:30:00.120Z",
            "cpu_time_secs": 12.25,
            "rss_kb": 9924,
            "thread_count": 2,
        }
    ],
    unavailable=True,
    commands=(
        CommandExample(
            "The largest first",
            "curl -s \"$URL/processes\" | jq -c 'sort_by(-.rss_kb)[:3][] | {pid, name, rss_kb}'",
        ),
    ),
)
HEALTHZ = Operation(
    path="/healthz",
    summary="Whether the service is alive",
    description="Says nothing about the target, and needs no token. It is 503 while a kernel read of any process"
    " hangs: one thread waits for the read, and other processes are measured as before. It is also 503 while the disk"
    " of the run directory hangs: only the earlier runs are unavailable.",
    answer="The service answers, and nothing hangs.",
    shapes=(HealthJson,),
    example={"status": "ok"},
    reasons=("hung",),
    commands=(CommandExample("The status", 'curl -s "$URL/healthz" | jq -r .status'),),
)
INFO = Operation(
    path="/info",
    summary="Version, target, platform and own cost",
    description="The first request of a client: which sidecar this is, and what it measures.",
    answer="Version, target, recorder, and the cost of the sidecar itself.",
    shapes=(InfoJson,),
    example={
        "version": "0.1.0",
        "python": "3.13.1",
        "platform": "linux",
        "os_version": "6.12.0",
        "arch": "x86_64",
        "cpu_count": 8,
        "utc_offset_minutes": 60,
        "app": "viewer",
        "app_version": "3.1",
        "replay": None,
        "target": {**TARGET_EXAMPLE, "program": "6e7a2b51c0d4f893"},
        "capabilities": ["detail=full", "history", "marks", "mode=trailing", "pid", "processes", "runs", "stream"],
        "recorder": {
            "interval_ms": 1000,
            "retention_secs": 900,
            "max_bytes": 33554432,
            "size_bytes": 41496,
            "snapshots": 300,
            "missed": 0,
            "marks": 1,
            "ended": None,
            "state": "running",
            "black_box": {"run": "2345-142313-9bfa3fdd-2300", "error": None, "dropped": 0},
        },
        "self": {"pid": 2300, "cpu_secs": 1.52, "peak_rss_kb": 49600, "snapshots": 300},
    },
    commands=(CommandExample("The target, and the cost of the sidecar", 'curl -s "$URL/info" | jq "{target, self}"'),),
)


def status_routes(context: RouteContext) -> list[OperationRoute]:
    """Return the routes ``/processes``, ``/healthz`` and ``/info``."""
    status = _Status(context)
    return [
        OperationRoute(PROCESSES, status.processes),
        OperationRoute(HEALTHZ, status.health),
        OperationRoute(INFO, status.info),
    ]


class _Status:
    """Answer ``/processes``, ``/healthz`` and ``/info``."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context
        self._listings = SingleFlight()

    async def processes(self, request: Request, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        if request.method == "HEAD":
            return bare()
        try:
            entries = await self._listings.make(self._list, peer=peer_of(request.scope))
        except SourceError as error:
            return self._context.unavailable(error)
        except HungError as error:
            return self._context.unavailable(KernelError(str(error)))
        return JSON([_process_json(entry) for entry in entries])

    async def _list(self) -> list[ProcessEntry]:
        context = self._context
        return await context.lister.run(lambda: list(context.list_processes()), "the list of processes: a read")

    async def health(self, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        targets, lister, run_directory = self._context.targets, self._context.lister, self._context.run_directory
        if await targets.hangs() or await lister.hangs():
            return problem("hung", str(HungError("a read of the kernel")))
        if run_directory is not None and await run_directory.worker.hangs():
            return problem("hung", str(HungError("the directory of runs: a read")))
        if await targets.default.recorder.hangs():
            return problem("hung", str(HungError("the directory of runs: a write")))
        return JSON(HealthJson(status="ok"))

    async def info(self, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        return JSON(await _info_json(self._context.targets.default, self._context.application))


def _process_json(entry: ProcessEntry) -> ProcessJson:
    return {
        "pid": entry.pid,
        "name": entry.name,
        "started_at": iso(entry.started_unix_ns),
        "cpu_time_secs": entry.cpu_ns / 1e9,
        "rss_kb": entry.rss_bytes // 1024,
        "thread_count": entry.thread_count,
    }


async def _info_json(target: PooledTarget, application: Application) -> InfoJson:
    replay = target.replay
    host = RecordedHost.this() if replay is None else replay.host
    recorded = application if replay is None else replay.application
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": target.platform,
        "os_version": host.version,
        "arch": host.arch,
        "cpu_count": host.cpu_count,
        "utc_offset_minutes": host.utc_offset_minutes,
        "app": recorded.app,
        "app_version": recorded.app_version,
        "target": await _target_json(target),
        "replay": None if replay is None else replay.to_json(),
        "capabilities": ["detail=full", "history", "marks", "mode=trailing", "pid", "processes", "runs", "stream"],
        "recorder": target.recorder.info(),
        "self": {
            "pid": os.getpid(),
            "cpu_secs": round(time.process_time(), 3),
            "peak_rss_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            // (1024 if sys.platform == "darwin" else 1),
            "snapshots": target.snapshots_taken,
        },
    }


async def _target_json(target: PooledTarget) -> WatchedJson | dict[str, Any]:
    try:
        identity = await target.identity()
    except SourceError as error:
        return unavailable_json(error, target.platform)
    return {
        "pid": identity.pid,
        "name": identity.name,
        "started_at": iso(identity.started_unix_ns),
        "start_id": identity.start_id,
        "program": identity.program,
    }
