"""
Signal heartbeats and gauges of this process to its sidecar.

A beat stores a time in the page of the sidecar (`vitalsd.contract.signals_page`): it makes no system call, and what
happens to the sidecar, to files or to disks cannot make it fail. Without a sidecar it stores into memory of its own.

The names and handles belong to the process, not to a sidecar: the next sidecar that this process starts gets them too.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Literal

from vitalsd.contract.signal_handles import Gauge, Heartbeat, memory_words, this_thread
from vitalsd.contract.signals_page import (
    GAUGE_WORDS,
    GAUGES,
    HEARTBEATS,
    SLOT_WORDS,
    MappedPage,
    PageError,
    SignalsPage,
    name_words,
)
from vitalsd.sources.process_identity import IdentityUnknownError

__all__ = [
    "LIMIT_S",
    "Gauge",
    "Heartbeat",
    "PostedSignals",
    "Signals",
    "SignalsFullError",
    "connect_signals",
    "signals_in",
    "signals_of_this_process",
    "this_thread",
]

log = logging.getLogger("vitalsd")

DEFAULT_LIMIT_S = 2.0
"""Limit of a heartbeat, s, if the client names none."""
LIMIT_S = (0.25, 3600.0)
"""Range of the limit of a heartbeat, s: the sidecar looks up to four times a second."""


class SignalsFullError(ValueError):
    """There are as many heartbeats, or gauges, as a page has."""


class Signals:
    """
    Keep the heartbeats and gauges of a client, and put them into the page of its sidecar.

    Args:
        owner: returns the pid of this process and, in the lower half, the id of the calling thread; 0: unknown.
        needs_slot: raise `SignalsFullError` if other clients have taken all places of the page, instead of a log line.
    """

    def __init__(self, owner: Callable[[], int] = this_thread, *, needs_slot: bool = False) -> None:
        self.start_key = 0
        """`Identity.start_key` of this process; 0: unknown."""
        self.owner = owner
        self._needs_slot = needs_slot
        self._heartbeats: dict[str, Heartbeat] = {}
        self._gauges: dict[str, Gauge] = {}
        self._page: MappedPage | None = None
        self._problem = ""
        """Why the page of the last sidecar cannot be used; empty: it can, or the reason was logged."""
        self._lock = threading.Lock()

    @property
    def is_connected(self) -> bool:
        """Whether there is the page of a sidecar that still runs."""
        return self._page is not None and self._page.is_open

    def heartbeat(self, name: str, limit_s: float = DEFAULT_LIMIT_S) -> Heartbeat:
        """
        Return the heartbeat with this name: a new one, or the one that is open, with this limit from now on.

        Args:
            name: a letter and up to 31 of ``A-Z a-z 0-9 . _ -``.
            limit_s: longest time between two beats that is no hang, in the range `LIMIT_S`.

        Raises:
            ValueError: the name or the limit is not valid, or there are too many heartbeats.
        """
        name_words(name)
        least, most = LIMIT_S
        if not isinstance(limit_s, (int, float)) or not least <= limit_s <= most:  # type: ignore[redundant-expr]
            raise ValueError(f"limit_s of a heartbeat is from {least:g} to {most:g} s; this is {limit_s!r:.60}")
        with self._lock:
            heartbeat = self._heartbeats.get(name)
            if heartbeat is not None:
                heartbeat.set_limit(limit_s)
                return heartbeat
            if len(self._heartbeats) >= HEARTBEATS:
                raise SignalsFullError(f"there are {HEARTBEATS} heartbeats already; close one of them first")
            heartbeat = Heartbeat(self, name, limit_s)
            self._place(heartbeat)
            self._heartbeats[name] = heartbeat
            return heartbeat

    def gauge(self, name: str) -> Gauge:
        """
        Return the gauge with this name: a new one, or the one that is open.

        Raises:
            ValueError: the name is not valid, see `heartbeat`, or there are too many gauges.
        """
        name_words(name)
        with self._lock:
            gauge = self._gauges.get(name)
            if gauge is None:
                if len(self._gauges) >= GAUGES:
                    raise SignalsFullError(f"there are {GAUGES} gauges already; close one of them first")
                gauge = Gauge(self, name)
                self._place(gauge)
                self._gauges[name] = gauge
            return gauge

    def connect(self, reference: Mapping[str, str]) -> None:
        """
        Put all heartbeats and gauges, present and future ones, into the page of a sidecar.

        If the page cannot be used, the first heartbeat or gauge logs the reason.

        Args:
            reference: how to find the page, from the ready line or the runtime file of the sidecar.
        """
        self.start_key = _start_key()
        try:
            page = MappedPage(reference)
        except PageError as error:
            self.leave(None if self._page is None else self._page.reference)
            self._problem = str(error)
            if self._heartbeats or self._gauges:
                self._log_problem()
            return
        with self._lock:
            self._page, self._problem = page, ""
            for heartbeat in self._heartbeats.values():
                self._place(heartbeat)
            for gauge in self._gauges.values():
                self._place(gauge)

    def leave(self, reference: Mapping[str, str] | None) -> None:
        """Unmap the page of a sidecar that has ended, unless another one is in use. Beats then have no effect."""
        with self._lock:
            if self._page is None or self._page.reference != reference:
                return
            self._page = None
            for heartbeat in self._heartbeats.values():
                heartbeat.move(memory_words(SLOT_WORDS), 0)
            for gauge in self._gauges.values():
                gauge.move(memory_words(GAUGE_WORDS), 0)

    def disconnect(self) -> None:
        """Use no page any more: in a forked child, because the page has the heartbeats of its parent."""
        self._lock = threading.Lock()  # Another thread of the parent may have held it.
        self._page = None
        for heartbeat in self._heartbeats.values():
            heartbeat.move(memory_words(SLOT_WORDS), 0, keeps_old=True)
        for gauge in self._gauges.values():
            gauge.move(memory_words(GAUGE_WORDS), 0, keeps_old=True)

    def discard(self, each: Heartbeat | Gauge) -> None:
        """Release the name of a heartbeat or gauge that was closed."""
        with self._lock:
            owners: dict[str, Heartbeat] | dict[str, Gauge]
            owners = self._heartbeats if isinstance(each, Heartbeat) else self._gauges
            if owners.get(each.name) is each:
                del owners[each.name]

    def _log_problem(self) -> None:
        """Log once why nothing is signalled."""
        if self._problem:
            log.warning("heartbeats and gauges are not recorded: %s", self._problem)
            self._problem = ""

    def _place(self, each: Heartbeat | Gauge) -> None:
        """Move a heartbeat or gauge into the page. If the page is full, it stays in memory; see `needs_slot`."""
        page = self._page
        if page is None:
            self._log_problem()
            return
        with page.locked():
            at = page.free_slot(gauge=isinstance(each, Gauge))
            if at is not None:
                each.move(page.words, at)
        if at is None and self._needs_slot:
            kind = "gauges" if isinstance(each, Gauge) else "heartbeats"
            raise SignalsFullError(
                f"the clients of this sidecar have as many {kind} as it takes; close one of them first"
            )
        if at is None:
            log.warning("%r is not signalled: the page of the sidecar has no free slot", each.name)


def _start_key() -> int:
    """Return `Identity.start_key` of this process; 0: the system does not tell it."""
    from vitalsd.sources.platform import process_identities

    try:
        return process_identities().start_key(os.getpid()) or 0
    except (OSError, IdentityUnknownError):
        return 0


class PostedSignals:
    """
    Signal for clients that cannot map the page, and post to the sidecar instead.

    Args:
        page: of this sidecar; it is mapped once a client posts.
    """

    def __init__(self, page: SignalsPage) -> None:
        self._page = page
        self._cleared = -1
        self._signals = Signals()
        self._limits: dict[str, float] = {}

    def close(self) -> None:
        """Unmap the page."""
        self._signals.leave(self._page.reference)

    def beat(self, name: str, state: Literal["beat", "pause", "close"], limit_s: float | None) -> None:
        """
        Beat, pause or close a heartbeat.

        Args:
            name: of it.
            state: what to do.
            limit_s: its limit from now on; ``None``: as before, or else `DEFAULT_LIMIT_S`.

        Raises:
            ValueError: as `Signals.heartbeat` does.
        """
        signals = self._connected()
        limit_s = limit_s or self._limits.get(name, DEFAULT_LIMIT_S)
        heartbeat = signals.heartbeat(name, limit_s)
        self._limits[name] = limit_s
        match state:
            case "beat":
                heartbeat.resume()
                heartbeat.beat()
            case "pause":
                heartbeat.pause()
            case "close":
                heartbeat.close()
                del self._limits[name]

    def set_gauges(self, values: Mapping[str, float | None]) -> None:
        """Set gauges by name; ``None`` closes one. Raise `ValueError` as `Signals.gauge` does, after some were set."""
        signals = self._connected()
        for name, value in values.items():
            gauge = signals.gauge(name)
            if value is None:
                gauge.close()
            else:
                gauge.set(value)

    def _connected(self) -> Signals:
        """Return signals that are in the page; new ones after the page was cleared for another target."""
        if self._cleared != self._page.cleared:
            self._cleared = self._page.cleared
            self._limits.clear()
            self._signals = Signals(owner=lambda: 0, needs_slot=True)
            self._signals.connect(self._page.reference)
        return self._signals


def connect_signals(reference: Mapping[str, str] | None) -> None:
    """Put the signals of this process into the page of a sidecar, if it has one."""
    signals_of_this_process().connect({} if reference is None else reference)


def signals_in(reference: Mapping[str, str] | None) -> Signals:
    """Return the signals of this process, in this page unless they are in that of another running sidecar."""
    signals = signals_of_this_process()
    if not signals.is_connected:
        connect_signals(reference)
    return signals


class _Process:
    """Keep the signals of this process: one `Signals`, which a forked child disconnects."""

    signals: Signals | None = None


def signals_of_this_process() -> Signals:
    """Return the signals that all sidecars of this process share."""
    if _Process.signals is None:
        _Process.signals = Signals()
        os.register_at_fork(after_in_child=_Process.signals.disconnect)
    return _Process.signals
