"""Look at the heartbeats of a client on the sampler's thread, and pass hangs to the recorder of the target."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from vitalsd.contract.signals_page import SignalsPage, empty_page
from vitalsd.recording.hangs import HangDetector, HeartbeatStatus
from vitalsd.recording.recorder import Recorder
from vitalsd.sources.base import Source
from vitalsd.worker_thread import Worker

__all__ = ["SignalsReader"]

NO_PAGE = empty_page()
"""A page without heartbeats."""


class SignalsReader:
    """
    Look two or four times a second while a heartbeat is open, and otherwise at each snapshot of the recorder only.

    All methods but `statuses` are called on the thread of `worker`.

    Args:
        page: the page of the sidecar.
        source: reads the target.
        recorder: gets the hangs.
        worker: the sampler's thread.
        is_inside: whether the sidecar runs in the target.
    """

    def __init__(
        self, page: SignalsPage, source: Source, recorder: Recorder, worker: Worker, *, is_inside: bool
    ) -> None:
        self._page = page
        self._source = source
        self._recorder = recorder
        self._worker = worker
        self._detector = HangDetector(own_tid=threading.get_native_id() if is_inside else None)
        self._is_looking = False
        self._is_closed = False

    @property
    def statuses(self) -> Sequence[HeartbeatStatus]:
        """The heartbeats that are open; any thread may read it."""
        return self._detector.statuses

    def look(self) -> None:
        """Look once, and again as long as a heartbeat is open."""
        if not self._is_looking:
            self._look()

    def close(self) -> None:
        """Look no more, and end the hangs that last. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            for hang in self._detector.look(time.monotonic_ns(), NO_PAGE, self._source.look_at):
                self._recorder.note_hang(hang)

    def _look(self) -> None:
        self._is_looking = False
        if self._is_closed:
            return
        begun_ns = time.monotonic_ns()
        with suppress(OSError, ValueError):  # The page was closed, because the sidecar ends.
            content = self._page.read()
            for hang in self._detector.look(time.monotonic_ns(), content, self._source.look_at):
                self._recorder.note_hang(hang)
            if self._detector.statuses:
                self._is_looking = True
                self._worker.submit(self._look, begun_ns + self._detector.period_ns)
