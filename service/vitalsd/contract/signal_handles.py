"""
Store heartbeats and gauges: the handles that a program holds. `vitalsd.contract.signals` makes them.

No method raises, makes a system call or waits, apart from the first beat, which asks for the id of its thread.
"""

import math
import os
import struct
import sys
import threading
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Protocol

from vitalsd.contract.signals_page import (
    BEAT,
    FREE,
    GAP,
    GAP_END,
    GAUGE_NAME,
    GAUGE_STATE,
    GAUGE_WORDS,
    HEARTBEAT_NAME,
    LIMIT,
    OPEN,
    OWNER,
    OWNER_START,
    PAUSED,
    SET,
    SLOT_WORDS,
    STATE,
    VALUE,
    name_words,
)

__all__ = ["Gauge", "Heartbeat", "memory_words", "this_thread"]

Place = tuple["memoryview[int]", int]
"""Words, and the index of the first one of a slot in them."""


def memory_words(words: int) -> "memoryview[int]":
    """Return words that no sidecar reads."""
    return memoryview(bytearray(8 * words)).cast("Q")


def this_thread() -> int:
    """Return the pid in the upper half, and the native id of the calling thread in the lower half, of 64 bits."""
    return (os.getpid() << 32) | (threading.get_native_id() & 0xFFFFFFFF)


class Owner(Protocol):
    """What a handle needs of `vitalsd.contract.signals.Signals`."""

    start_key: int
    owner: Callable[[], int]

    def discard(self, each: "Heartbeat | Gauge") -> None:
        """Release the name of a handle that was closed."""
        ...


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

    __slots__ = ("_limit_ns", "_place", "_signals", "_state", "is_closed", "name")

    def __init__(self, signals: Owner, name: str, limit_s: float) -> None:
        self.is_closed = False
        """Whether `close` was called."""
        self._signals = signals
        self._limit_ns = round(limit_s * 1e9)
        self._place: Place = (memory_words(SLOT_WORDS), 0)
        self.name = name
        self._state = OPEN  # not read from the page: a sidecar clears it when it ends
        self._place[0][STATE] = OPEN

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
        words[at + STATE] = self._state = PAUSED

    def resume(self) -> None:
        """Expect beats again, from now on."""
        words, at = self._place
        if words[at + BEAT]:
            words[at + BEAT] = monotonic_ns()
        words[at + STATE] = self._state = OPEN

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
        self._signals.discard(self)  # first: from now on no other thread moves it
        words, at = self._place
        self._place = (memory_words(SLOT_WORDS), 0)
        words[at + STATE] = FREE

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
        if old[old_at + BEAT] and not keeps_old:  # In a forked child the first beat binds the thread that beats there.
            words[at + BEAT] = monotonic_ns()
            words[at + OWNER] = old[old_at + OWNER]
        words[at + HEARTBEAT_NAME : at + HEARTBEAT_NAME + 4] = _words(name_words(self.name))
        words[at + LIMIT] = self._limit_ns
        words[at + OWNER_START] = self._signals.start_key
        words[at + STATE] = self._state  # last: the sidecar reads a slot that is not free
        self._place = (words, at)
        if not keeps_old:
            old[old_at + STATE] = FREE  # or a sidecar that still runs would see a silence


class Gauge:
    """
    Signal a number of this process, such as frames per second; made by `Signals.gauge`.

    The sidecar records the last value at each of its intervals. `set` may be called from any thread, and never raises.
    """

    __slots__ = ("_last", "_place", "_signals", "name")

    def __init__(self, signals: Owner, name: str) -> None:
        self._signals = signals
        self._place: Place = (memory_words(GAUGE_WORDS), 0)
        self.name = name
        self._place[0][GAUGE_STATE] = OPEN
        self._last = (0, 0)
        """Last value and its time, as in the page. A sidecar clears the page when it ends, and the next one needs them.
        """

    def set(self, value: float) -> None:
        """Set the value. One that is not a finite number is ignored."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return
        if math.isfinite(number):
            words, at = self._place
            self._last = (int.from_bytes(struct.pack("=d", number), sys.byteorder), monotonic_ns())
            words[at + VALUE], words[at + SET] = self._last

    def close(self) -> None:
        """End the gauge, and release its name. A value after it has no effect."""
        self._signals.discard(self)  # first: from now on no other thread moves it
        words, at = self._place
        self._place = (memory_words(GAUGE_WORDS), 0)
        words[at + GAUGE_STATE] = FREE

    def move(self, words: "memoryview[int]", at: int, *, keeps_old: bool = False) -> None:
        """Signal in another slot from now on, which is free, and release the old one unless it is the parent's."""
        old, old_at = self._place
        words[at + VALUE], words[at + SET] = self._last
        words[at + GAUGE_NAME : at + GAUGE_NAME + 4] = _words(name_words(self.name))
        words[at + GAUGE_STATE] = OPEN
        self._place = (words, at)
        if not keeps_old:
            old[old_at + GAUGE_STATE] = FREE


def _words(values: tuple[int, ...]) -> "memoryview[int]":
    return memoryview(struct.pack("=4Q", *values)).cast("Q")
