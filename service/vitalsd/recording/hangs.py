"""
Detect that a heartbeat is silent for longer than its limit, and find the cause.

The sidecar looks at the page of heartbeats four times a second, or twice while all is well and every limit is long. It
counts the silence by its own clock, and only the time in which it was looking: if the machine, or the sidecar too,
stood still, no beat is missing. A client may note in the page the longest gap between two beats; that gives the true
length. It also shows a hang that was over before the sidecar could look: where the sidecar runs in the client, the
interpreter lock can stop both, and the sidecar then proves by the counters of its own thread that it waited for that
lock and was not stopped.

While all is well the sidecar reads the page alone. From half of the limit on it also looks at the thread that should
beat, see `vitalsd.recording.hang_causes`.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from vitalsd.contract.signals_page import heartbeat_slots
from vitalsd.recording.hang_causes import awaits_interpreter_lock
from vitalsd.recording.heartbeat_watch import Hang, HeartbeatStatus, HeartbeatWatch, Look, LookAt, looked_at
from vitalsd.sources.base import ThreadLook

__all__ = ["PERIOD_NS", "Hang", "HangDetector", "HeartbeatStatus", "SlotReader"]

SlotT = TypeVar("SlotT")

log = logging.getLogger("vitalsd.recording.hangs")

PERIOD_NS = 250_000_000
"""Interval at which the page is read while a heartbeat is open, ns."""
CALM_PERIOD_NS = 500_000_000
"""The same while every heartbeat beats and has a limit of at least `CALM_LIMIT` times this, ns; it costs half."""
CALM_LIMIT = 4
"""A look in this part of the limit is early enough to collect evidence from half of the limit on."""


class SlotReader:
    """Read the slots of pages. Noise in those of a kind counts as none of that kind; it is logged once for all."""

    def __init__(self) -> None:
        self._has_warned = False

    def read(self, slots_of: Callable[[bytes], Iterable[SlotT]], content: bytes) -> list[SlotT]:
        """Return the slots that `heartbeat_slots` or `gauge_slots` finds in a page."""
        try:
            return list(slots_of(content))
        except ValueError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning("heartbeats and gauges are ignored while the content of their page is wrong: %s", error)
            return []


class HangDetector:
    """
    Watch the heartbeats of one page; call it on one thread only.

    Args:
        own_tid: id of the thread that looks, if it runs in the process that beats; ``None``: it does not.
        is_python: whether the process that beats is Python; ``None``: unknown, and only the usual switch interval
            then shows a wait for the interpreter lock.
        wall_clock: returns the Unix time, ns.
        slots: reads the pages.
    """

    def __init__(
        self,
        *,
        own_tid: int | None = None,
        is_python: bool | None = None,
        wall_clock: Callable[[], int] = time.time_ns,
        slots: SlotReader | None = None,
    ) -> None:
        self._own_tid = own_tid
        self._is_python = True if own_tid is not None else is_python
        self.period_ns = PERIOD_NS
        """Time until the next look is due, ns. A limit of less than two `PERIOD_NS` counts as two."""
        self._wall_clock = wall_clock
        self._watches: dict[int, HeartbeatWatch] = {}
        self._looked_ns: int | None = None
        self._own: ThreadLook | None = None
        self._slots = slots or SlotReader()

    @property
    def statuses(self) -> Sequence[HeartbeatStatus]:
        """The heartbeats that are open, by their order in the page; any thread may read it."""
        return tuple(watch.status for watch in self._watches.values())

    def look(self, now_ns: int, content: bytes, look_at: LookAt) -> list[Hang]:
        """
        Look at the page, and return the hangs that began, last or ended.

        Args:
            now_ns: monotonic time just after the page was read, later than at the last call.
            content: the page. Noise in it counts as a page without heartbeats, and is logged once.
            look_at: looks at a thread of the process that beats.
        """
        watches = dict[int, HeartbeatWatch]()
        found = list[Hang | None]()
        slots = self._slots.read(heartbeat_slots, content)
        if slots:
            look = self._next_look(now_ns, look_at)
        else:
            self._looked_ns = self._own = None
        for slot in slots:
            watch = self._watches.get(slot.slot)
            if watch is not None and watch.is_of(slot):
                found.append(watch.look(slot, look))
            else:
                watch = HeartbeatWatch(
                    slot,
                    look,
                    least_ns=2 * PERIOD_NS,
                    is_inside=self._own_tid is not None,
                    is_python=self._is_python,
                )
            watches[slot.slot] = watch
        found += [watch.end() for place, watch in self._watches.items() if watches.get(place) is not watch]
        self._watches = watches
        calm = all(
            watch.status.limit_ns >= CALM_LIMIT * max(CALM_PERIOD_NS, watch.status.silent_ns)
            for watch in watches.values()
        )
        self.period_ns = CALM_PERIOD_NS if calm else PERIOD_NS
        return [hang for hang in found if hang is not None]

    def _next_look(self, now_ns: int, look_at: LookAt) -> Look:
        own, self._own = self._own, None
        if self._own_tid is not None:
            self._own = looked_at(look_at, self._own_tid, closely=False)
        if self._own is not None:
            # Each read may wait for the interpreter lock, so the time has to be that of the counters.
            now_ns = self._own.monotonic_ns
        before_ns = now_ns if self._looked_ns is None else self._looked_ns
        self._looked_ns = now_ns
        gap_ns, most_ns = now_ns - before_ns, self.period_ns * 3 // 2
        is_locked = False
        if own is not None and self._own is not None and gap_ns > most_ns:
            is_locked = awaits_interpreter_lock(own, self._own)
        seen_ns = gap_ns if is_locked else min(gap_ns, most_ns)
        return Look(
            now_ns=now_ns,
            wall_ns=self._wall_clock(),
            before_ns=before_ns,
            seen_ns=seen_ns,
            most_ns=most_ns,
            unseen_ns=gap_ns - seen_ns,
            is_locked=is_locked,
            look_at=look_at,
        )
