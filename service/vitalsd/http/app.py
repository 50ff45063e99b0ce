"""The application: its routes put together, and its end."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from vitalsd.contract.application import Application
from vitalsd.exporters.prometheus import THREAD_METRICS
from vitalsd.http import responses as problem
from vitalsd.http.access.body_limit import Bounds
from vitalsd.http.page import page_routes
from vitalsd.http.routes.metrics import STREAM_S, live_routes
from vitalsd.http.routes.recordings import past_routes
from vitalsd.http.routes.reference import docs_routes
from vitalsd.http.routes.report import REPORT_PATH, report_routes
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources.base import ProcessEntry
from vitalsd.worker_thread import Worker

__all__ = ["create_app"]

MAX_BODY_BYTES = 4096
MAX_REPORT_BODY_BYTES = 16 * 1024
"""Of ``POST /report.zip``, which has the user's message in it."""
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""
FastAPI would trace and count our requests into the providers of the host program, and, told so by the
environment alone, send them away.
"""


def create_app(
    targets: Targets,
    list_processes: Callable[[], Iterable[ProcessEntry]],
    *,
    shelf: RunDirectoryReader | None = None,
    thread_metrics: int = THREAD_METRICS,
    stream_s: float = STREAM_S,
    application: Application = Application(),
    hides_processes: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """
    The application over `targets`. It opens the default one when it starts and closes all when it ends.

    Args:
        targets: who is measured.
        list_processes: what ``/processes`` lists.
        shelf: earlier runs; stopped at the end, too.
        thread_metrics: threads that a scraper is shown; 0 for none.
        stream_s: after so long a stream ends.
        application: what the client says it is.
        hides_processes: whether the kernel hides processes from other users.
    """
    reader = Worker("vitalsd-reader")
    try:
        # A thread of its own: a read of one process of the machine may hang.
        lister = Worker("vitalsd-lister")
    except RuntimeError:
        reader.stop(0)
        raise

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await targets.start()
            yield
        finally:  # of a start that failed as well
            await targets.close()
            lister.stop(0.1)
            reader.stop(0.1)
            if shelf is not None:
                shelf.worker.stop(0.3)  # it leaves a copy of a run behind otherwise

    routers = [
        live_routes(
            targets,
            list_processes,
            reader,
            lister,
            shelf,
            thread_metrics=thread_metrics,
            stream_s=stream_s,
            application=application,
            hides_processes=hides_processes,
        ),
        past_routes(targets, shelf, reader),
        report_routes(targets, shelf, reader, application),
        page_routes(),
    ]
    routers.append(docs_routes(routers, reader))
    routes = [route for router in routers for route in router.routes]
    app = FastAPI(
        routes=routes,  # and not by include_router, which looks for the route of a request twice
        openapi_url=None,  # FastAPI's own would build every schema while the service starts; see http/openapi.py
        redirect_slashes=False,  # a redirect would be built from the Host that a stranger sent
        lifespan=lifespan,
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(Bounds, max_body_bytes=MAX_BODY_BYTES, larger={REPORT_PATH: MAX_REPORT_BODY_BYTES})
    app.state.workers = (reader, lister)
    problem.install(app, routes)
    return app
