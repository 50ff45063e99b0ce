"""The thread for calls that may block: an exception of one is reported, and affects no other call."""

import threading
import time
from functools import partial

import pytest

from support.stopwatch import Stopwatch
from vitalsd.worker_thread import StoppedError, Worker


def test_worker_call_that_raises_sets_its_future() -> None:
    """The future of a call has its exception, and the next call runs."""
    worker = Worker("w")
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result(5)
    assert worker.submit(lambda: 7).result(5) == 7
    assert worker.stop(5)


def test_worker_call_after_close_fails_at_once() -> None:
    """Its future says so at once."""
    worker = Worker("w")
    assert worker.stop(5)
    with pytest.raises(StoppedError):
        worker.submit(lambda: 7).result(5)


def test_worker_call_without_a_waiter_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The thread continues, and the log has the traceback."""
    worker = Worker("w")
    worker.post(lambda: 1 // 0)
    assert worker.submit(lambda: 7).result(5) == 7
    assert worker.stop(5)
    (record,) = caplog.records
    assert (record.levelname, record.message) == ("ERROR", "w: a call failed")
    assert "ZeroDivisionError" in str(record.exc_text)


def test_worker_timer_call_that_raises_is_logged_and_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """It stays on the same grid of time, and each reason is logged once."""
    worker, times = Worker("w"), list[float]()

    def beat() -> bool:
        times.append(time.monotonic())
        if len(times) <= 5:
            raise RuntimeError("a bug" if len(times) < 4 else "another")
        return len(times) < 8

    worker.every(50_000_000, beat)
    deadline = time.monotonic() + 20
    while len(times) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert worker.stop(5)
    assert len(times) == 8
    assert times[-1] - times[0] >= 0.05 * 7 - 0.025
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["a bug", "another"]


def test_worker_pause_with_a_full_queue_is_granted() -> None:
    """Between two calls that follow each other without a gap; nothing runs until it is over, and then all of it."""
    worker, done = Worker("w"), list[int]()

    def call(number: int) -> None:
        time.sleep(0.02)
        done.append(number)

    for number in range(100):
        worker.post(partial(call, number))
    for _ in range(10):
        assert worker.pause(10)
        before = len(done)
        time.sleep(0.03)
        assert len(done) == before < 100
        worker.resume()
        time.sleep(0.002)
    assert worker.stop(10)
    assert done == list(range(100))


def test_worker_pause_during_a_hung_call_times_out() -> None:
    """Longer than was allowed; afterwards all is as before."""
    worker, begun, over = Worker("w"), threading.Event(), threading.Event()
    worker.post(begun.set)
    worker.post(over.wait)
    assert begun.wait(5)
    time.sleep(0.1)
    watch = Stopwatch()
    assert not worker.pause(0.05)
    assert watch.elapsed_s < watch.allowed_s(2)
    over.set()
    assert worker.submit(lambda: 7).result(5) == 7
    assert worker.pause(1)
    worker.resume()
    assert worker.stop(5)
