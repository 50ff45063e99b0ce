"""What the sampler reads in the page of a client: gauges, and hangs by their number."""

import logging
import math
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import pytest

from support.fake_process import IDENTITY, FakeSource, Process
from support.sidecars import eventually
from vitalsd.contract.signals import Signals
from vitalsd.contract.signals_page import (
    GAUGE_STATE,
    GAUGE_WORDS,
    HEADER_WORDS,
    HEARTBEATS,
    SET,
    SLOT_WORDS,
    VALUE,
    MappedPage,
    SignalsPage,
)
from vitalsd.recording.heartbeat_watch import Hang
from vitalsd.recording.recorder import Recorder, RecorderConfig
from vitalsd.sampling.signals_reader import SignalsReader
from vitalsd.sampling.target_reader import TargetReader
from vitalsd.worker_thread import Worker

T = TypeVar("T")
FIRST_GAUGE = HEADER_WORDS + HEARTBEATS * SLOT_WORDS


class CountedPage(SignalsPage):
    """A page that counts how often it is read."""

    reads = 0

    def read(self) -> bytes:
        self.reads += 1
        return super().read()


@pytest.fixture
def page() -> Iterator[CountedPage]:
    page = CountedPage()
    yield page
    page.close()


@pytest.fixture
def signals(page: CountedPage) -> Signals:
    signals = Signals()
    signals.connect(page.reference)
    return signals


@pytest.fixture
def reader(page: CountedPage) -> Iterator[SignalsReader]:
    worker = Worker("reader")
    recorder = Recorder(IDENTITY, RecorderConfig())
    yield SignalsReader(page, FakeSource(Process()), recorder, worker, is_inside=False)
    worker.stop(1)


def test_look_returns_the_gauges_that_are_set(reader: SignalsReader, signals: Signals) -> None:
    """By name; one that is open and was never set, and one that is closed, has no value."""
    fps, queue = signals.gauge("fps"), signals.gauge("Queue-1.x_y")
    signals.gauge("never")
    assert reader.look() == ()
    fps.set(58)
    queue.set(-0.0)
    assert reader.look() == (("Queue-1.x_y", 0.0), ("fps", 58.0))
    assert math.copysign(1, reader.gauges["Queue-1.x_y"]) == -1
    fps.close()
    assert reader.look() == (("Queue-1.x_y", 0.0),)


def test_look_without_signals_reads_the_page_once(page: CountedPage, reader: SignalsReader, signals: Signals) -> None:
    """Heartbeats and gauges share the content."""
    for _ in range(5):
        reader.look()
    signals.gauge("fps").set(1)
    heartbeat = signals.heartbeat("ui", 60)
    reader.look()
    assert page.reads == 6
    assert [each.name for each in reader.statuses] == ["ui"]
    eventually(lambda: page.reads > 6, 10)
    heartbeat.close()
    reader.look()
    eventually(lambda: not reader.statuses, 10)


class PostponedCalls(Worker):
    """A thread that counts the calls that are submitted for later."""

    count = 0

    def submit(self, call: Callable[[], T], at_ns: int | None = None) -> "Future[T]":
        self.count += at_ns is not None
        return super().submit(call, at_ns)


def test_look_with_an_open_heartbeat_plans_one_look(page: CountedPage, signals: Signals) -> None:
    """However many snapshots the recorder takes in between."""
    worker = PostponedCalls("reader")
    reader = SignalsReader(page, FakeSource(Process()), Recorder(IDENTITY, RecorderConfig()), worker, is_inside=False)
    worker.pause(5)
    signals.heartbeat("ui", 60)
    for _ in range(20):
        reader.look()
    assert worker.count == 1
    worker.resume()
    worker.stop(1)


def test_look_at_what_is_no_number_has_no_value(page: CountedPage, reader: SignalsReader, signals: Signals) -> None:
    """NaN and infinity, which a client in another language may store, are not recorded; the other gauges are."""
    signals.gauge("bad").set(1)
    signals.gauge("good").set(2)
    words = MappedPage(page.reference).words
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        (words[FIRST_GAUGE + VALUE],) = struct.unpack("=Q", struct.pack("=d", value))
        assert reader.look() == (("good", 2.0),)


def test_look_at_two_gauges_of_one_name_returns_the_one_set_last(page: CountedPage, reader: SignalsReader) -> None:
    """Two clients of one sidecar may open the same name."""
    for value in (1, 2):
        client = Signals()
        client.connect(page.reference)
        client.gauge("fps").set(value)
    assert reader.look() == (("fps", 2.0),)
    words = MappedPage(page.reference).words
    words[FIRST_GAUGE + SET] = words[FIRST_GAUGE + GAUGE_WORDS + SET] + 1
    assert reader.look() == (("fps", 1.0),)


def test_look_at_noise_warns_once_and_leaves_the_heartbeats(
    page: CountedPage, reader: SignalsReader, signals: Signals, caplog: pytest.LogCaptureFixture
) -> None:
    """Noise in a gauge hides gauges only, noise in the header both; there is one warning for all of it."""
    signals.gauge("fps").set(1)
    signals.heartbeat("ui", 60)
    words = MappedPage(page.reference).words
    words[FIRST_GAUGE + GAUGE_STATE] = 7
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert reader.look() == ()
        assert [each.name for each in reader.statuses] == ["ui"]
        words[0] = 5
        eventually(lambda: not reader.statuses, 10)
        reader.look()
    (message,) = caplog.messages
    assert message == "heartbeats and gauges are ignored while the content of their page is wrong: gauge 0 has no state"
    words[FIRST_GAUGE + GAUGE_STATE] = 1
    words[0] = int.from_bytes(b"VITALSIG", "big")
    assert reader.look() == (("fps", 1.0),)


def test_look_after_the_page_was_closed_finds_nothing(page: CountedPage, reader: SignalsReader) -> None:
    """The sidecar is about to end."""
    page.close()
    assert reader.look() == ()
    assert reader.gauges == {}


def test_pages_of_forty_targets_in_a_row_have_room_for_the_next(page: CountedPage) -> None:
    """None of them closes what it opens. The next one finds a slot, and its reader nothing of those before."""
    worker = Worker("reader")
    for number in range(40):
        recorder = Recorder(IDENTITY, RecorderConfig())
        reader = SignalsReader(page, FakeSource(Process()), recorder, worker, is_inside=False)
        assert reader.look() == ()
        client = Signals(needs_slot=True)
        client.connect(page.reference)
        client.heartbeat(f"h{number}", 60).beat()
        client.gauge(f"g{number}").set(number)
        assert worker.submit(reader.look).result(10) == ((f"g{number}", number),)
        eventually(lambda: [each.name for each in reader.statuses], 10)  # noqa: B023 - called at once
        assert [each.name for each in reader.statuses] == [f"h{number}"]
        worker.submit(reader.close).result(10)
        recorder.close()
    worker.stop(1)


def test_signals_of_a_program_that_was_replaced_are_freed(reader: SignalsReader, page: CountedPage) -> None:
    """What the new program has opened since the last look stays."""
    old, new = Signals(), Signals()
    for client, name in ((old, "old"), (new, "new")):
        client.connect(page.reference)
        client.heartbeat(name, 60).beat()
        client.gauge(name).set(1)
        if client is old:
            reader.look()
    reader.executed()
    assert reader.look() == (("new", 1.0),)
    eventually(lambda: [each.name for each in reader.statuses] == ["new"], 10)


HANG = Hang(5, 7, 1_000_000, "ui", "unknown", "", ongoing=True)


def test_hang_counts_never_decrease_while_the_cause_changes(reader: SignalsReader) -> None:
    """A hang counts once its cause is known, or when it ends; and once."""
    reports = [
        (HANG, {}),
        (HANG._replace(cause="busy"), {("ui", "busy"): 1}),
        (HANG._replace(cause="blocked"), {("ui", "busy"): 1}),
        (HANG._replace(cause="blocked", ongoing=False), {("ui", "busy"): 1}),
        (HANG._replace(monotonic_ns=8), {("ui", "busy"): 1}),
        (HANG._replace(monotonic_ns=8, ongoing=False), {("ui", "busy"): 1, ("ui", "unknown"): 1}),
        (HANG._replace(monotonic_ns=9, cause="busy", ongoing=False), {("ui", "busy"): 2, ("ui", "unknown"): 1}),
        (HANG._replace(heartbeat="io", cause="busy"), {("ui", "busy"): 2, ("ui", "unknown"): 1, ("io", "busy"): 1}),
    ]
    for hang, counts in reports:
        reader._note([hang])
        assert reader.hang_counts == counts


def test_record_with_a_page_that_fails_has_the_snapshots() -> None:
    """A look that raises costs no snapshot."""

    class Broken(SignalsPage):
        def read(self) -> bytes:
            raise RuntimeError("broken")

    worker, broken = Worker("reader"), Broken()
    config = RecorderConfig(interval_s=0.02, page=broken)
    target = TargetReader(lambda: FakeSource(Process(), step_ns=1_000_000), config, worker)
    worker.submit(target.open).result(10)
    recorder = target.recorder
    assert recorder is not None
    eventually(lambda: len(recorder.record) > 3, 10)
    worker.stop(1)
    recorder.close()
    broken.close()
