"""One thread for calls that may block: kernel reads of one target, or writes to disk."""

import asyncio
import heapq
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, TypeVar

__all__ = ["PATIENCE_NS", "REFUSED", "HungError", "NoThreadError", "StoppedError", "Worker", "seen", "start_thread"]

log = logging.getLogger("vitalsd.worker_thread")

T = TypeVar("T")

PATIENCE_NS = 5_000_000_000
"""A call that has taken so long is taken for one that hangs."""
LOOK_S = 0.1
"""Between two looks at a call that is waited for."""
NEVER_NS = 1 << 63
MOST_TIMED = 256
"""With this many calls on the heap, those that were cancelled are removed from it."""


REFUSED = "can't start new thread"
"""Text of the RuntimeError of `threading.Thread.start` where the system gives no thread."""
FATAL_SIGNALS = {
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGSYS)
}
"""Sent to the thread that caused them: blocked there, they would bypass the crash handler of the host program."""


class NoThreadError(RuntimeError):
    """The system gives no more threads; ``str(error)`` names the limits."""

    def __init__(self) -> None:
        super().__init__("the system gives no more threads; raise its limit (ulimit -u, pids.max, TasksMax)")


def start_thread(thread: threading.Thread) -> None:
    """
    Start a thread that takes no signals of the host program.

    A host that collects signals by sigwait(3) or signalfd(2) blocks them in its own threads. One that is not blocked in
    ours would be delivered there, and most of them end the process. The mask is set around the start, so that threads
    which a library starts from ours inherit it. What the host itself blocks of `FATAL_SIGNALS` is open in ours.

    Raises:
        NoThreadError: the system gives no more threads.
        RuntimeError: the interpreter ends.
    """
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - FATAL_SIGNALS)
    try:
        thread.start()
    except RuntimeError as error:
        if str(error) != REFUSED:  # at the end of the interpreter, for example
            raise
        raise NoThreadError from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class HungError(Exception):
    """
    The call under way does not return, and whatever waits behind it does not begin.

    Args:
        what: is under way, and where.
    """

    def __init__(self, what: str = "a call") -> None:
        super().__init__(f"{what} has not returned for {PATIENCE_NS / 1e9:g} s")


class StoppedError(Exception):
    """The thread was told to end before the call was given to it."""


class Worker:
    """
    A daemon thread that runs what it is given, in order, and one call at a steady beat.

    Not an executor: that one's threads are joined when the interpreter exits, and a kernel call that
    hangs would hang the exit of the host program.
    """

    def __init__(self, name: str) -> None:
        self._calls: deque[Callable[[], object] | None] = deque()
        self._bell = threading.Lock()
        """
        Free when something was given that the thread has not looked at.

        A lock and not a queue, whose timeout is an exception, and the beat not on the heap: an idle beat at 4 Hz takes
        76 µs of CPU, and 103 µs with `queue.SimpleQueue` and the heap for 13 lines less.
        """
        self._bell.acquire()
        self._timed: list[tuple[int, int, Future[Any], Callable[[], object]]] = []
        """A heap: monotonic time, number, future, call. Of the thread alone."""
        self._most_timed = MOST_TIMED
        self._numbers = count()
        self._beat: Callable[[], bool]
        self._interval_ns = 0
        self._beat_ns = NEVER_NS
        """When the next beat is due."""
        self._said = ""
        self._stopped = False
        self._calling = threading.Lock()
        self._gate = threading.Lock()
        """Passed before each call: who holds it waits for one call, and not for all that are given without a gap."""
        self.busy_since_ns: int | None = None
        """Monotonic time at which the call under way began; ``None`` when idle."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start_thread(self._thread)

    def pause(self, timeout_s: float) -> bool:
        """
        Let the call under way end and none begin until `resume`; False if it takes longer, or hangs.

        For who is about to fork: what a call holds at that moment is held in the child for ever.
        """
        if self.overdue or not self._gate.acquire(timeout=timeout_s):
            return False
        if self._calling.acquire(timeout=timeout_s):
            return True
        self._gate.release()
        return False

    def resume(self) -> None:
        """After a `pause` that was granted; in the child likewise."""
        self._calling.release()
        self._gate.release()

    @property
    def pending(self) -> int:
        """Calls that wait for their turn."""
        return len(self._calls)

    def post(self, call: Callable[[], object]) -> None:
        """Run `call` on the thread; nobody waits for it, which is cheaper than a future. What it raises is logged."""
        self._give(call)

    def submit(self, call: Callable[[], T], at_ns: int | None = None) -> "Future[T]":
        """
        Run `call` on the thread, at once or at a monotonic time; the future has its result or its exception.

        After `stop` that is `StoppedError`.
        """
        future: Future[T] = Future()
        if self._stopped:
            future.set_exception(StoppedError())
            return future

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - handed to whoever waits, not swallowed
                    future.set_exception(error)

        self._give(run if at_ns is None else partial(self._put_off, at_ns, future, run))
        return future

    async def result(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises on the thread, however long it takes."""
        return await asyncio.wrap_future(self.submit(call))

    async def ask(self, call: Callable[[], T], what: str) -> T:
        """
        The same of a call that may block in the kernel, which is `what`.

        Raises:
            HungError: the thread hangs. What was not begun by then is not done later either.
        """
        if await self.hangs():
            raise HungError(what)
        future = asyncio.wrap_future(self.submit(call))
        try:
            return await self.answer(future)
        except HungError:
            future.cancel()
            raise HungError(what) from None

    @property
    def overdue(self) -> bool:
        """Whether the call under way has taken longer than `PATIENCE_NS`, be it that the process was stopped."""
        since_ns = self.busy_since_ns
        return since_ns is not None and time.monotonic_ns() - since_ns >= PATIENCE_NS

    async def hangs(self) -> bool:
        """Whether the call under way has taken longer than `PATIENCE_NS`, and not because the process was stopped."""
        since_ns = self.busy_since_ns
        if not self.overdue:
            return False
        # The whole process may have been stopped until now: give the thread its turn too.
        await asyncio.sleep(LOOK_S)
        return self.busy_since_ns == since_ns

    async def answer(self, future: asyncio.Future[T]) -> T:
        """
        Wait for what was submitted, unless that is hopeless; whoever leaves cancels nothing.

        Raises:
            HungError: the thread hangs.
        """
        while not (await asyncio.wait((future,), timeout=LOOK_S))[0]:
            if await self.hangs():
                future.add_done_callback(seen)
                raise HungError
        return future.result()

    def every(self, interval_ns: int, beat: Callable[[], bool]) -> None:
        """
        Call `beat` on the thread now and at each `interval_ns`, until it returns False. A second one replaces it.

        Beats stay on one grid of time; those that were missed are left out, not made up for. One that raises is
        logged, if it is for another reason than the one before, and the next comes as if it had not.
        """

        def begin() -> None:
            self._beat, self._interval_ns, self._beat_ns = beat, interval_ns, time.monotonic_ns()

        self._give(begin)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after what it was given before; False if it is still at that after `timeout_s`."""
        self._stopped = True
        self._give(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _give(self, call: Callable[[], object] | None) -> None:
        self._calls.append(call)
        with suppress(RuntimeError):  # free already: it rings
            self._bell.release()

    def _run(self) -> None:
        calls, timed, bell = self._calls, self._timed, self._bell
        call: Callable[[], object] | None
        while True:
            now_ns, due_ns = time.monotonic_ns(), self._beat_ns
            if timed and timed[0][0] < due_ns:
                due_ns = timed[0][0]
            if calls:
                call = calls.popleft()
            elif due_ns > now_ns:
                bell.acquire(timeout=-1 if due_ns == NEVER_NS else (due_ns - now_ns) / 1e9)
                continue
            elif due_ns == self._beat_ns:
                call = self._beat_now
            else:
                call = heapq.heappop(timed)[3]
            if call is None:
                return
            self.busy_since_ns = now_ns
            try:
                with self._gate:
                    self._calling.acquire()
                try:
                    call()
                finally:
                    self._calling.release()
            except Exception as error:  # a bug; whoever else depends on this thread is not to wait for ever
                if self._said != (said := repr(error)):
                    self._said = said
                    log.exception("%s: a call failed", self._thread.name)
            self.busy_since_ns = None

    def _beat_now(self) -> None:
        goes_on = True
        try:
            goes_on = self._beat()
        finally:
            late_ns = time.monotonic_ns() - self._beat_ns
            due_ns = self._beat_ns + (1 + late_ns // self._interval_ns) * self._interval_ns
            self._beat_ns = due_ns if goes_on else NEVER_NS

    def _put_off(self, at_ns: int, future: "Future[Any]", call: Callable[[], object]) -> None:
        timed = self._timed
        if len(timed) >= self._most_timed:
            timed[:] = [each for each in timed if not each[2].cancelled()]
            heapq.heapify(timed)
            self._most_timed = max(MOST_TIMED, 2 * len(timed))  # so that removal costs a constant time per call
        heapq.heappush(timed, (at_ns, next(self._numbers), future, call))


def seen(future: asyncio.Future[T]) -> None:
    """Look at what nobody waits for any more, or asyncio logs it."""
    if not future.cancelled():
        future.exception()
