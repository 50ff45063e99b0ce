"""The thread for calls that may block: what one of them raises is told, and costs nobody else anything."""

import threading
import time
from functools import partial

import pytest

from support.stopwatch import Stopwatch
from vitalsd.worker_thread import StoppedError, Worker


def test_what_a_call_raises_is_for_its_caller() -> None:
    """The future of a call has its exception, and the next call runs."""
    worker = Worker("w")
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result(5)
    assert worker.submit(lambda: 7).result(5) == 7
    assert worker.stop(5)


def test_a_call_after_the_end_is_not_waited_for() -> None:
    """Its future says so at once."""
    worker = Worker("w")
    assert worker.stop(5)
    with pytest.raises(StoppedError):
        worker.submit(lambda: 7).result(5)


def test_a_bug_in_a_call_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The thread goes on, and the log has the traceback."""
    worker = Worker("w")
    worker.post(lambda: 1 // 0)
    assert worker.submit(lambda: 7).result(5) == 7
    assert worker.stop(5)
    (record,) = caplog.records
    assert (record.levelname, record.message) == ("ERROR", "w: a call failed")
    assert "ZeroDivisionError" in str(record.exc_text)


def test_a_beat_that_raises_is_followed_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    """On the same grid of time, and it is logged once for each reason."""
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


def test_a_pause_is_granted_however_much_there_is_to_do() -> None:
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


def test_a_call_that_does_not_return_holds_up_no_pause() -> None:
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
