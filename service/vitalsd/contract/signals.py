"""
Signal heartbeats and gauges of this process to its sidecar.

A beat stores a time in the page of the sidecar (`vitalsd.contract.signals_page`): it makes no system call, and what
happens to the sidecar, to files or to disks cannot make it fail. Without a sidecar it stores into memory of its own.

The names and handles belong to the process, not to a sidecar: the next sidecar that this process starts gets them too.
"""

import logging
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import Any, Literal, Protocol

from vitalsd.contract.signals_page import (
    BEAT,
    FREE,
    GAP,
    GAP_END,
    GAUGE_NAME,
    GAUGE_STATE,
    GAUGE_WORDS,
    GAUGES,
    HEARTBEAT_NAME,
    HEARTBEATS,
    LIMIT,
    OPEN,
    OWNER,
    OWNER_START,
    PAUSED,
    SET,
    SLOT_WORDS,
    STATE,
    VALUE,
    MappedPage,
    PageError,
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
    "signals_of_this_process",
    "this_thread",
]

log = logging.getLogger("vitalsd")

LIMIT_S = (0.25, 3600.0)
"""Range of the limit of a heartbeat, s: the sidecar looks up to four times a second."""

Place = tuple["memoryview[int]", int]
"""Words, and the index of the first one of a slot in them."""


def _memory(words: int) -> "memoryview[int]":
    """Return words that no sidecar reads."""
    return memoryview(bytearray(8 * words)).cast("Q")


def this_thread() -> int:
    """Return the pid in the upper half, and the native id of the calling thread in the lower half, of 64 bits."""
    return (os.getpid() << 32) | (threading.get_native_id() & 0xFFFFFFFF)


class SignalsFullError(ValueError):
    """There are as many heartbeats, or gauges, as a page has."""


class AsyncioLoop(Protocol):
    """What a heartbeat uses of an event loop of asyncio."""

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> object:
        """Call once, on the thread of the loop."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> object:
        """Call once, after a time in s."""
        ...


class TkWidget(Protocol):
    """What a heartbeat uses of a widget of Tk."""

    def after(self, ms: int, func: Callable[[], object]) -> object:
        """Call once, after a time in ms."""
        ...


class Heartbeat:
    """
    Signal that a loop of this process proceeds; made by `Signals.heartbeat`.

    Call `beat` in each round of the loop. If no beat comes for longer than the limit, the sidecar records a hang. Every
    method may be called from any thread, and none raises.
    """

    __slots__ = ("_limit_ns", "_place", "_signals", "is_closed", "name")

    def __init__(self, signals: "Signals", name: str, limit_s: float) -> None:
        self.is_closed = False
        """Whether `close` was called."""
        self._signals = signals
        self._limit_ns = round(limit_s * 1e9)
        self._place: Place = (_memory(SLOT_WORDS), 0)
        self.name = name
        self._open()

    @property
    def limit_s(self) -> float:
        """Longest time between two beats that is no hang, s."""
        return self._limit_ns / 1e9

    def beat(self) -> None:
        """Signal that the loop proceeds. The first beat also notes the calling thread, see `bind`."""
        (words, at), now = self._place, monotonic_ns()
        last = words[at]
        if not last:
            self.bind()
        elif now - last > self._limit_ns:  # The sidecar may not have looked in this gap: it reads its length here.
            words[at + GAP] = now - last
            words[at + GAP_END] = now
        words[at] = now

    def bind(self) -> None:
        """Note that the calling thread is the one that beats; the cause of a hang is that of this thread."""
        words, at = self._place
        words[at + OWNER] = self._signals.owner()

    def pause(self) -> None:
        """Expect no beats until `resume`: for a modal dialog, a debugger or a task that is known to be long."""
        words, at = self._place
        words[at + STATE] = PAUSED

    def resume(self) -> None:
        """Expect beats again, from now on."""
        words, at = self._place
        if words[at + BEAT]:
            words[at + BEAT] = monotonic_ns()
        words[at + STATE] = OPEN

    def beat_on_asyncio(self, loop: AsyncioLoop) -> None:
        """Beat on an event loop of asyncio until `close`; from any thread. An ended loop raises `RuntimeError`."""
        interval_s = self._interval_s()

        def beat() -> None:
            if not self.is_closed:
                self.beat()
                loop.call_later(interval_s, beat)

        loop.call_soon_threadsafe(beat)

    def beat_on_tk(self, widget: TkWidget) -> None:
        """Beat on the event loop of Tk until `close`; call it from the thread of Tk, with any widget of the program."""
        interval_ms = round(self._interval_s() * 1000)

        def beat() -> None:
            if not self.is_closed:
                self.beat()
                widget.after(interval_ms, beat)

        beat()

    def beat_on_qt(self, timer: Any) -> None:
        """
        Beat on the event loop of Qt until `close`; call it from the thread of the loop.

        Args:
            timer: a new ``QTimer`` of PySide or PyQt; keep it as long as the program should beat.
        """

        def beat() -> None:
            if self.is_closed:
                timer.stop()
            else:
                self.beat()

        timer.timeout.connect(beat)
        timer.start(round(self._interval_s() * 1000))

    def _interval_s(self) -> float:
        """Return the time between two beats of a loop, s: short against the limit, and long enough to cost nothing."""
        return min(1.0, self.limit_s / 8)

    def close(self) -> None:
        """End the heartbeat, and release its name. A beat after it has no effect."""
        self.is_closed = True
        words, at = self._place
        self._place = (_memory(SLOT_WORDS), 0)
        words[at + STATE] = FREE
        self._signals.discard(self)

    def set_limit(self, limit_s: float) -> None:
        """Set the limit, in s."""
        self._limit_ns = round(limit_s * 1e9)
        words, at = self._place
        words[at + LIMIT] = self._limit_ns

    def move(self, words: "memoryview[int]", at: int, *, keeps_old: bool = False) -> None:
        """Signal in another slot from now on, which is free, and release the old one unless it is the parent's."""
        old, old_at = self._place
        for word in range(SLOT_WORDS):
            words[at + word] = 0
        if old[old_at + BEAT]:
            words[at + BEAT] = monotonic_ns()
        words[at + OWNER] = old[old_at + OWNER]
        words[at + HEARTBEAT_NAME : at + HEARTBEAT_NAME + 4] = _words(name_words(self.name))
        words[at + LIMIT] = self._limit_ns
        words[at + OWNER_START] = self._signals.start_key
        words[at + STATE] = old[old_at + STATE]  # last: the sidecar reads a slot that is not free
        self._place = (words, at)
        if not keeps_old:
            old[old_at + STATE] = FREE  # or a sidecar that still runs would see a silence

    def _open(self) -> None:
        words, at = self._place
        words[at + STATE] = OPEN


class Gauge:
    """
    Signal a number of this process, such as frames per second; made by `Signals.gauge`.

    The sidecar records the last value at each of its intervals. `set` may be called from any thread, and never raises.
    """

    __slots__ = ("_place", "_signals", "name")

    def __init__(self, signals: "Signals", name: str) -> None:
        self._signals = signals
        self._place: Place = (_memory(GAUGE_WORDS), 0)
        self.name = name
        self._place[0][GAUGE_STATE] = OPEN

    def set(self, value: float) -> None:
        """Set the value. One that is not a finite number is ignored."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return
        if math.isfinite(number):
            words, at = self._place
            words[at + VALUE] = int.from_bytes(struct.pack("=d", number), sys.byteorder)
            words[at + SET] = monotonic_ns()

    def close(self) -> None:
        """End the gauge, and release its name. A value after it has no effect."""
        words, at = self._place
        self._place = (_memory(GAUGE_WORDS), 0)
        words[at + GAUGE_STATE] = FREE
        self._signals.discard(self)

    def move(self, words: "memoryview[int]", at: int, *, keeps_old: bool = False) -> None:
        """Signal in another slot from now on, which is free, and release the old one unless it is the parent's."""
        old, old_at = self._place
        words[at + VALUE], words[at + SET] = old[old_at + VALUE], old[old_at + SET]
        words[at + GAUGE_NAME : at + GAUGE_NAME + 4] = _words(name_words(self.name))
        words[at + GAUGE_STATE] = old[old_at + GAUGE_STATE]
        self._place = (words, at)
        if not keeps_old:
            old[old_at + GAUGE_STATE] = FREE


def _words(values: tuple[int, ...]) -> "memoryview[int]":
    return memoryview(struct.pack("=4Q", *values)).cast("Q")


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
        """Whether there is the page of a sidecar, which may have ended since."""
        return self._page is not None

    def heartbeat(self, name: str, limit_s: float = 2.0) -> Heartbeat:
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

    def disconnect(self) -> None:
        """Use no page any more: in a forked child, because the page has the heartbeats of its parent."""
        self._lock = threading.Lock()  # Another thread of the parent may have held it.
        self._page = None
        for heartbeat in self._heartbeats.values():
            heartbeat.move(_memory(SLOT_WORDS), 0, keeps_old=True)
        for gauge in self._gauges.values():
            gauge.move(_memory(GAUGE_WORDS), 0, keeps_old=True)

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
        reference: `vitalsd.contract.signals_page.SignalsPage.reference` of the page of this sidecar.
    """

    def __init__(self, reference: Mapping[str, str]) -> None:
        self._signals = Signals(owner=lambda: 0, needs_slot=True)
        self._signals.connect(reference)

    def beat(self, name: str, state: Literal["beat", "pause", "close"], limit_s: float) -> None:
        """Beat, pause or close a heartbeat. Raise `ValueError` as `Signals.heartbeat` does."""
        heartbeat = self._signals.heartbeat(name, limit_s)
        match state:
            case "beat":
                heartbeat.resume()
                heartbeat.beat()
            case "pause":
                heartbeat.pause()
            case "close":
                heartbeat.close()

    def set_gauges(self, values: Mapping[str, float]) -> None:
        """Set gauges by their names. Raise `ValueError` as `Signals.gauge` does; then some may be set."""
        for name, value in values.items():
            self._signals.gauge(name).set(value)


def connect_signals(reference: Mapping[str, str] | None) -> None:
    """Put the signals of this process into the page of a sidecar, if it has one."""
    signals_of_this_process().connect({} if reference is None else reference)


class _Process:
    """Keep the signals of this process: one `Signals`, which a forked child disconnects."""

    signals: Signals | None = None


def signals_of_this_process() -> Signals:
    """Return the signals that all sidecars of this process share."""
    if _Process.signals is None:
        _Process.signals = Signals()
        os.register_at_fork(after_in_child=_Process.signals.disconnect)
    return _Process.signals
