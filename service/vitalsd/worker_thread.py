"""Run calls that may block on one daemon thread: kernel reads of one target, or writes to disk."""

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

__all__ = [
    "HANG_TIMEOUT_NS",
    "REFUSED",
    "HungError",
    "NoThreadError",
    "StoppedError",
    "Worker",
    "consume_exception",
    "start_thread",
]

log = logging.getLogger("vitalsd.worker_thread")

T = TypeVar("T")

HANG_TIMEOUT_NS = 5_000_000_000
"""Time limit of a call, ns: one that takes longer counts as hung."""
POLL_INTERVAL_S = 0.1
"""Poll interval of a coroutine that waits for a call, s."""
NEVER_NS = 1 << 63
"""A monotonic time, ns, that is never reached: no beat is due."""
MOST_TIMED = 256
"""Calls on the heap of timed calls from which on the cancelled ones are removed."""


REFUSED = "can't start new thread"
"""Text of the RuntimeError of `threading.Thread.start` if the system gives no thread."""
FATAL_SIGNALS = {
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGSYS)
}
"""
Signals that the kernel sends to the thread that caused them. They stay unblocked in our threads, because a blocked one
ends the process without the crash handler of the host program.
"""


class NoThreadError(RuntimeError):
    """The system gives no more threads; ``str(error)`` names the limits."""

    def __init__(self) -> None:
        super().__init__("the system gives no more threads; raise its limit (ulimit -u, pids.max, TasksMax)")


def start_thread(thread: threading.Thread) -> None:
    """
    Start a thread that takes no signals of the host program.

    A host that collects signals by sigwait(3) or signalfd(2) blocks them in its own threads. The kernel would deliver
    to our thread a signal that is not blocked there, and most signals end the process. The mask is set around the
    start, so that threads which a library starts from ours inherit it. `FATAL_SIGNALS` are not blocked in our thread,
    even if the host blocks them.

    Raises:
        NoThreadError: the system gives no more threads.
        RuntimeError: the interpreter is shutting down.
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
    The call under way does not return, and no call that waits behind it begins.

    Args:
        what: description of the call and of where it runs.
    """

    def __init__(self, what: str = "a call") -> None:
        super().__init__(f"{what} has not returned for {HANG_TIMEOUT_NS / 1e9:g} s")


class StoppedError(Exception):
    """`Worker.stop` was called before the call was submitted."""


class Worker:
    """
    A daemon thread that runs submitted calls in order, and one periodic call, the beat.

    Not an executor: the interpreter joins the threads of an executor when it exits, so a hung kernel call would hang
    the exit of the host program.
    """

    def __init__(self, name: str) -> None:
        self._calls: deque[Callable[[], object] | None] = deque()
        self._wakeup = threading.Lock()
        """
        Unlocked if a call was submitted that the thread has not looked at.

        A lock and not a queue, because the timeout of a queue is an exception; and the beat is not on the heap. So an
        idle beat at 4 Hz takes 76 µs of CPU; `queue.SimpleQueue` and the heap take 103 µs, and 13 lines less.
        """
        self._wakeup.acquire()
        self._timed: list[tuple[int, int, Future[Any], Callable[[], object]]] = []
        """A heap: monotonic time, number, future, call. Only the thread uses it."""
        self._most_timed = MOST_TIMED
        self._numbers = count()
        self._beat: Callable[[], bool]
        self._interval_ns = 0
        self._beat_ns = NEVER_NS
        """Monotonic time at which the next beat is due, ns."""
        self._last_logged_error = ""
        self._stopped = False
        self._calling = threading.Lock()
        self._gate = threading.Lock()
        """The thread takes it before each call: its holder waits for one call, not for all calls without a gap."""
        self.busy_since_ns: int | None = None
        """Monotonic time at which the call under way began; ``None`` when idle."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start_thread(self._thread)

    def pause(self, timeout_s: float) -> bool:
        """
        Let the call under way end and none begin until `resume`; return False if it takes longer, or hangs.

        A caller of fork needs this: a lock that a call holds at the fork is never released in the child.
        """
        if self.overdue or not self._gate.acquire(timeout=timeout_s):
            return False
        if self._calling.acquire(timeout=timeout_s):
            return True
        self._gate.release()
        return False

    def resume(self) -> None:
        """End a `pause` that returned True, in the parent and in the child."""
        self._calling.release()
        self._gate.release()

    @property
    def pending(self) -> int:
        """Number of calls that have not begun."""
        return len(self._calls)

    def post(self, call: Callable[[], object]) -> None:
        """Run `call` on the thread, without a future, which would cost more; an exception of it is logged."""
        self._enqueue(call)

    def submit(self, call: Callable[[], T], at_ns: int | None = None) -> "Future[T]":
        """
        Run `call` on the thread, at once or at a monotonic time in ns; the future gets its result or its exception.

        After `stop` the exception is `StoppedError`.
        """
        future: Future[T] = Future()
        if self._stopped:
            future.set_exception(StoppedError())
            return future

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - the future passes it on
                    future.set_exception(error)

        self._enqueue(run if at_ns is None else partial(self._put_off, at_ns, future, run))
        return future

    async def run_unbounded(self, call: Callable[[], T]) -> T:
        """Return or raise what `call` does on the thread, without a time limit."""
        return await asyncio.wrap_future(self.submit(call))

    async def run(self, call: Callable[[], T], what: str) -> T:
        """
        Return or raise what `call`, which may block in the kernel, does on the thread.

        Args:
            call: runs on the thread.
            what: description of the call, for `HungError`.

        Raises:
            HungError: the thread hangs. A `call` that has not begun is cancelled.
        """
        if await self.hangs():
            raise HungError(what)
        future = asyncio.wrap_future(self.submit(call))
        try:
            return await self.await_or_hang(future)
        except HungError:
            future.cancel()
            raise HungError(what) from None

    @property
    def overdue(self) -> bool:
        """Whether the current call has taken longer than `HANG_TIMEOUT_NS`, also if the process was stopped since."""
        since_ns = self.busy_since_ns
        return since_ns is not None and time.monotonic_ns() - since_ns >= HANG_TIMEOUT_NS

    async def hangs(self) -> bool:
        """Return whether the current call has taken longer than `HANG_TIMEOUT_NS` while the process was running."""
        since_ns = self.busy_since_ns
        if not self.overdue:
            return False
        # The whole process may have been stopped until now: give the thread its turn too.
        await asyncio.sleep(POLL_INTERVAL_S)
        return self.busy_since_ns == since_ns

    async def await_or_hang(self, future: asyncio.Future[T]) -> T:
        """
        Wait for the result of a submitted call; a waiter that is cancelled does not cancel the call.

        Raises:
            HungError: the thread hangs.
        """
        while not (await asyncio.wait((future,), timeout=POLL_INTERVAL_S))[0]:
            if await self.hangs():
                future.add_done_callback(consume_exception)
                raise HungError
        return future.result()

    def every(self, interval_ns: int, beat: Callable[[], bool]) -> None:
        """
        Call `beat` on the thread now and every `interval_ns`, until it returns False. A second beat replaces the first.

        Beats stay on one grid of time, and a missed beat is not made up for. An exception of a beat is logged, unless
        it repeats the last one that was logged, and does not end the beats.
        """

        def begin() -> None:
            self._beat, self._interval_ns, self._beat_ns = beat, interval_ns, time.monotonic_ns()

        self._enqueue(begin)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the calls submitted before; return False if it still runs after `timeout_s`."""
        self._stopped = True
        self._enqueue(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _enqueue(self, call: Callable[[], object] | None) -> None:
        self._calls.append(call)
        with suppress(RuntimeError):  # unlocked already: the thread will look
            self._wakeup.release()

    def _run(self) -> None:
        calls, timed, wakeup = self._calls, self._timed, self._wakeup
        call: Callable[[], object] | None
        while True:
            now_ns, due_ns = time.monotonic_ns(), self._beat_ns
            if timed and timed[0][0] < due_ns:
                due_ns = timed[0][0]
            if calls:
                call = calls.popleft()
            elif due_ns > now_ns:
                wakeup.acquire(timeout=-1 if due_ns == NEVER_NS else (due_ns - now_ns) / 1e9)
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
            except Exception as error:  # a bug; the thread continues, because other callers wait for it
                if self._last_logged_error != (text := repr(error)):
                    self._last_logged_error = text
                    log.exception("%s: a call failed", self._thread.name)
            self.busy_since_ns = None

    def _beat_now(self) -> None:
        continues = True
        try:
            continues = self._beat()
        finally:
            late_ns = time.monotonic_ns() - self._beat_ns
            due_ns = self._beat_ns + (1 + late_ns // self._interval_ns) * self._interval_ns
            self._beat_ns = due_ns if continues else NEVER_NS

    def _put_off(self, at_ns: int, future: "Future[Any]", call: Callable[[], object]) -> None:
        timed = self._timed
        if len(timed) >= self._most_timed:
            timed[:] = [each for each in timed if not each[2].cancelled()]
            heapq.heapify(timed)
            self._most_timed = max(MOST_TIMED, 2 * len(timed))  # so that removal costs a constant time per call
        heapq.heappush(timed, (at_ns, next(self._numbers), future, call))


def consume_exception(future: asyncio.Future[T]) -> None:
    """Retrieve the exception of a future without a waiter, so that asyncio does not log it."""
    if not future.cancelled():
        future.exception()
