"""Make the FastAPI application with its routes, middleware and lifespan."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from vitalsd.contract.application import Application
from vitalsd.contract.limits import BODY_BYTES, REPORT_BODY_BYTES, STREAM_S
from vitalsd.contract.signals import PostedSignals
from vitalsd.exporters.prometheus import THREAD_METRICS
from vitalsd.http.access.body_limit import BodyLimit
from vitalsd.http.operation import OperationRoute
from vitalsd.http.page import page_routes
from vitalsd.http.responses import install_problem_handlers
from vitalsd.http.routes.context import RouteContext
from vitalsd.http.routes.metrics import metrics_routes
from vitalsd.http.routes.recordings import recordings_routes
from vitalsd.http.routes.reference import reference_routes
from vitalsd.http.routes.report import REPORT_PATH, report_routes
from vitalsd.http.routes.signals import signals_routes
from vitalsd.http.routes.status import status_routes
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources.base import ProcessEntry
from vitalsd.worker_thread import Worker

__all__ = ["create_app"]

NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""Off: FastAPI would trace requests into the providers of the host program, and export them by its environment."""


def create_app(
    targets: Targets,
    list_processes: Callable[[], Iterable[ProcessEntry]],
    *,
    run_directory: RunDirectoryReader | None = None,
    thread_metrics: int = THREAD_METRICS,
    stream_s: float = STREAM_S,
    application: Application = Application(),
    posted: PostedSignals | None = None,
    hides_processes: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """
    Return the application over `targets`: it opens the default target when it starts, and closes all when it ends.

    The other arguments are fields of `RouteContext`; the worker of `run_directory` is stopped at the end.

    Raises:
        RuntimeError: no thread can be started.
    """
    reader = Worker("vitalsd-reader")
    try:
        lister = Worker("vitalsd-lister")
    except RuntimeError:
        reader.stop(0)
        raise

    context = RouteContext(
        targets=targets,
        run_directory=run_directory,
        list_processes=list_processes,
        hides_processes=hides_processes,
        application=application,
        posted=posted,
        thread_metrics=thread_metrics,
        stream_s=stream_s,
        reader=reader,
        lister=lister,
    )
    routes = _routes(context)
    app = FastAPI(
        routes=[*routes],  # Not by include_router, which searches the route of a request twice.
        openapi_url=None,  # FastAPI's own would build every schema while the sidecar starts; see http/openapi.py.
        redirect_slashes=False,  # A redirect would be built from the Host that a client sent.
        lifespan=partial(_lifespan, context),
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(BodyLimit, max_body_bytes=BODY_BYTES, larger={REPORT_PATH: REPORT_BODY_BYTES})
    app.state.workers = (reader, lister)
    install_problem_handlers(app, routes)
    return app


def _routes(context: RouteContext) -> list[OperationRoute]:
    """Return all routes; the reference describes them in this order."""
    routes = [
        *metrics_routes(context),
        *recordings_routes(context),
        *signals_routes(context),
        *report_routes(context),
        *status_routes(context),
        *page_routes(),
    ]
    return [*routes, *reference_routes(context, routes)]


@asynccontextmanager
async def _lifespan(context: RouteContext, _: FastAPI) -> AsyncIterator[None]:
    """Open the default target, and at the end close the targets and stop the workers, within 0.5 s for the latter."""
    try:
        await context.targets.start()
        yield
    finally:  # Also after a start that failed.
        await context.targets.close()
        if context.posted is not None:
            context.posted.close()
        context.lister.stop(0.1)
        context.reader.stop(0.1)
        if context.run_directory is not None:
            context.run_directory.worker.stop(0.3)  # Time to remove its copy of a run.
