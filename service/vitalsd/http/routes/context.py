"""What the routes answer from: the processes, the earlier runs, and the threads on which answers are made."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastapi import Response

from vitalsd.contract.application import Application
from vitalsd.contract.limits import STREAM_S
from vitalsd.exporters.prometheus import THREAD_METRICS
from vitalsd.http.responses import failed
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources.base import ProcessEntry, SourceError
from vitalsd.worker_thread import Worker

__all__ = ["RouteContext"]


class RouteContext(NamedTuple):
    """What the routes of one application share."""

    targets: Targets
    list_processes: Callable[[], Iterable[ProcessEntry]]
    """Called on `lister`."""
    reader: Worker
    """Makes large answers."""
    lister: Worker
    """Lists processes, on a thread of its own: a read of one process of the machine may hang."""
    shelf: RunDirectoryReader | None = None
    """Earlier runs; None without any."""
    hides_processes: Callable[[], bool] = lambda: False
    """Whether the kernel hides processes from other users."""
    application: Application = Application()
    """What the client says it is."""
    thread_metrics: int = THREAD_METRICS
    """Threads that a scraper is shown; see `vitalsd.exporters.prometheus.Scrape`."""
    stream_s: float = STREAM_S

    def unavailable(self, error: SourceError) -> Response:
        """Return the `Unavailable` answer."""
        return failed(error, self.targets.default.platform)
