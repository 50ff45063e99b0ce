"""The application: its routes put together, and its end."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from vitalsd.http import problem
from vitalsd.http.bounds import Bounds
from vitalsd.http.exposition import THREAD_METRICS
from vitalsd.http.live import live_routes
from vitalsd.http.page import page_routes
from vitalsd.http.past import past_routes
from vitalsd.http.report import report_routes
from vitalsd.runs import RunDirectory
from vitalsd.sampler import Targets
from vitalsd.sources import ProcessEntry
from vitalsd.worker import Worker

__all__ = ["create_app"]

MAX_BODY_BYTES = 4096
SILENT: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""FastAPI would tell of our requests to whatever OpenTelemetry the host program or its environment has set up."""


def create_app(
    targets: Targets,
    list_processes: Callable[[], Iterable[ProcessEntry]],
    *,
    runs: RunDirectory | None = None,
    thread_metrics: int = THREAD_METRICS,
) -> FastAPI:
    """
    The application over `targets`. It opens the default one when it starts and closes all when it ends.

    Args:
        targets: who is measured.
        list_processes: what ``/processes`` lists.
        runs: where earlier runs are found.
        thread_metrics: threads that a scraper is shown; 0 for none.
    """
    reader = Worker("vitalsd-reader")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await targets.start()
        yield
        await targets.close()
        reader.stop(1)

    app = FastAPI(
        title="vitalsd",
        version=version("vitalsd"),
        summary="What one process is doing: CPU, memory and every thread.",
        docs_url=None,
        redoc_url=None,
        telemetry=SILENT,
        redirect_slashes=False,  # a redirect would be built from the Host that a stranger sent
        lifespan=lifespan,
    )
    app.include_router(live_routes(targets, list_processes, reader, thread_metrics=thread_metrics))
    app.include_router(past_routes(targets, runs, reader))
    app.include_router(report_routes(targets, runs, reader))
    app.include_router(page_routes())
    app.add_middleware(Bounds, max_body_bytes=MAX_BODY_BYTES)
    problem.install(app)
    return app
