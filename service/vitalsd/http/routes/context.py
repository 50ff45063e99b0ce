"""Share between routes what they answer from: the targets, the earlier runs, and the worker threads."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastapi import Response

from vitalsd.contract.application import Application
from vitalsd.contract.limits import STREAM_S
from vitalsd.contract.signals import PostedSignals
from vitalsd.exporters.prometheus import THREAD_METRICS
from vitalsd.http.responses import failed
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources.base import ProcessEntry, SourceError
from vitalsd.worker_thread import Worker

__all__ = ["RouteContext"]


class RouteContext(NamedTuple):
    """Hold what the routes of one application share."""

    targets: Targets
    list_processes: Callable[[], Iterable[ProcessEntry]]
    """Lists the processes that this user may sample; called on `lister`."""
    reader: Worker
    """Thread that makes large answers."""
    lister: Worker
    """Thread that lists processes; of its own, because a read of any process of the machine may hang."""
    run_directory: RunDirectoryReader | None = None
    """Reader of the earlier runs; None: there is no run directory."""
    hides_processes: Callable[[], bool] = lambda: False
    """Whether the kernel hides processes from other users."""
    application: Application = Application()
    """Id and version of the application, as the client declares them."""
    posted: PostedSignals | None = None
    """Signals for clients that post them; None: the sidecar has no page."""
    thread_metrics: int = THREAD_METRICS
    """Limit of the threads in a scrape; see `vitalsd.exporters.prometheus.Scrape`."""
    stream_s: float = STREAM_S

    def unavailable(self, error: SourceError) -> Response:
        """Return the `Unavailable` answer for an error, with the platform of the default target."""
        return failed(error, self.targets.default.platform)
