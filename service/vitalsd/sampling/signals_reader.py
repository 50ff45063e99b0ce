"""Look at the page of a client on the sampler's thread: pass hangs to the recorder of the target, and read gauges."""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from vitalsd.contract.signals_page import SignalsPage, empty_page, gauge_slots, gauge_values
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.hangs import Hang, HangDetector, HeartbeatStatus, SlotReader
from vitalsd.recording.recorder import Recorder
from vitalsd.sources.base import Source
from vitalsd.worker_thread import Worker

__all__ = ["SignalsReader"]

NO_PAGE = empty_page()
"""A page without heartbeats and gauges."""
IDLE_NS = 1_000_000_000
"""Interval at which the page is read while no heartbeat is open, if the recorder takes snapshots less often, ns."""
SLACK_NS = 60_000_000
"""A look that is due at most this long before the next snapshot waits for it, ns: one wake-up less."""
MAX_HANG_COUNTS = 1024
"""Limit of the numbers of hangs by heartbeat and cause; hangs of more heartbeats are not counted."""


class SignalsReader:
    """
    Look two or four times a second while a heartbeat is open, and otherwise at each snapshot of the recorder only.

    Any thread may use the properties; all methods are called on the thread of `worker`.

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
        self._slots = SlotReader()
        self._detector = HangDetector(own_tid=threading.get_native_id() if is_inside else None, slots=self._slots)
        self._content = NO_PAGE
        """The page as of the last look."""
        self._is_looking = False
        """Whether a look is due before the next call of `look`."""
        self._next_call_ns = 0
        """Monotonic time at which the recorder takes its next snapshot and calls `look`."""
        self._is_closed = False
        self._hang_counts: Counter[tuple[str, HangCause]] = Counter()
        self._counted: set[tuple[str, int]] = set()
        """Heartbeat and start of each hang that lasts and has been counted."""

    @property
    def statuses(self) -> Sequence[HeartbeatStatus]:
        """The heartbeats that are open."""
        return self._detector.statuses

    @property
    def gauges(self) -> Mapping[str, float]:
        """The gauges that are set now."""
        return dict(self._gauges_in(self._read()))

    @property
    def hang_counts(self) -> Mapping[tuple[str, HangCause], int]:
        """
        Number of hangs by heartbeat and cause, those that last included; it never decreases.

        The cause of a hang that lasts may change. Such a hang is counted once its cause is known, or else when it ends.
        """
        return dict(self._hang_counts)

    def look(self) -> tuple[tuple[str, float], ...]:
        """Look once, and again as long as a heartbeat is open. Return the gauges by ascending name."""
        begun_ns = time.monotonic_ns()
        self._next_call_ns = begun_ns + self._recorder.interval_ns
        content = self._read()
        if not self._is_looking:
            self._look_at_heartbeats(begun_ns, content)
        return self._gauges_in(content)

    def close(self) -> None:
        """Look no more, and end the hangs that last. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._note(self._detector.look(time.monotonic_ns(), NO_PAGE, self._source.look_at))
            with suppress(OSError, ValueError):  # The page was closed, because the sidecar ends.
                self._page.clear()

    def executed(self) -> None:
        """Free what the program before had opened: the slots that no thread has written since the last look."""
        with suppress(OSError, ValueError):
            self._page.free(self._content, self._page.read())

    def _look_again(self) -> None:
        self._is_looking = False
        begun_ns = time.monotonic_ns()
        self._look_at_heartbeats(begun_ns, self._read())

    def _look_at_heartbeats(self, begun_ns: int, content: bytes) -> None:
        if self._is_closed:
            return
        self._note(self._detector.look(time.monotonic_ns(), content, self._source.look_at))
        due_ns = begun_ns + (self._detector.period_ns if self._detector.statuses else IDLE_NS)
        self._is_looking = due_ns < self._next_call_ns - SLACK_NS
        if self._is_looking:
            self._worker.submit(self._look_again, due_ns)

    def _note(self, hangs: Sequence[Hang]) -> None:
        for hang in hangs:
            self._recorder.note_hang(hang)
            self._count(hang)

    def _count(self, hang: Hang) -> None:
        which, key = (hang.heartbeat, hang.monotonic_ns), (hang.heartbeat, hang.cause)
        if which not in self._counted and (hang.cause != "unknown" or not hang.ongoing):
            self._counted.add(which)
            if key in self._hang_counts or len(self._hang_counts) < MAX_HANG_COUNTS:
                self._hang_counts[key] += 1
        if not hang.ongoing:
            self._counted.discard(which)

    def _gauges_in(self, content: bytes) -> tuple[tuple[str, float], ...]:
        return gauge_values(self._slots.read(gauge_slots, content))

    def _read(self) -> bytes:
        with suppress(OSError, ValueError):  # The page was closed, because the sidecar ends.
            self._content = self._page.read()
            return self._content
        return NO_PAGE
