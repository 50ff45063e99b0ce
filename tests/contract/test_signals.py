"""Heartbeats and gauges of a client, in the page of its sidecar."""

import asyncio
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.paths import ROOT
from support.stopwatch import Stopwatch
from vitalsd.contract.signals import Signals, this_thread
from vitalsd.contract.signals_page import (
    GAUGES,
    HEARTBEATS,
    PAGE_BYTES,
    GaugeSlot,
    HeartbeatSlot,
    MappedPage,
    PageError,
    SignalsPage,
    gauge_slots,
    heartbeat_slots,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux's")


@pytest.fixture
def page() -> Iterator[SignalsPage]:
    page = SignalsPage()
    yield page
    page.close()


@pytest.fixture
def signals(page: SignalsPage) -> Signals:
    signals = Signals()
    signals.connect(page.reference)
    return signals


def only(page: SignalsPage) -> HeartbeatSlot:
    (slot,) = heartbeat_slots(page.read())
    return slot


def only_gauge(page: SignalsPage) -> GaugeSlot:
    (slot,) = gauge_slots(page.read())
    return slot


def test_heartbeat_after_a_beat_is_in_the_page(page: SignalsPage, signals: Signals) -> None:
    """With its name, limit, process and thread."""
    heartbeat = signals.heartbeat("ui", 1.5)
    assert only(page).beat == 0
    earliest = time.monotonic_ns()
    heartbeat.beat()
    slot = only(page)
    assert earliest <= slot.beat <= time.monotonic_ns()
    assert (slot.name, slot.limit_ns, slot.is_paused, slot.gap_ns) == ("ui", 1_500_000_000, False, 0)
    assert (slot.pid, slot.tid) == (os.getpid(), threading.get_native_id())
    assert slot.owner_start > 0


def test_heartbeat_after_a_gap_beyond_the_limit_notes_its_length(page: SignalsPage, signals: Signals) -> None:
    """A sidecar that was locked out for the same time finds the hang by it."""
    heartbeat = signals.heartbeat("ui", 0.25)
    heartbeat.beat()
    began = only(page).beat
    time.sleep(0.3)
    heartbeat.beat()
    heartbeat.beat()
    slot = only(page)
    assert slot.gap_ns == slot.gap_end - began >= 300_000_000
    assert slot.beat > slot.gap_end


def test_heartbeat_that_is_paused_notes_no_gap_at_its_resume(page: SignalsPage, signals: Signals) -> None:
    """The time in a dialog is no hang."""
    heartbeat = signals.heartbeat("ui", 0.25)
    heartbeat.beat()
    heartbeat.pause()
    assert only(page).is_paused
    time.sleep(0.3)
    heartbeat.resume()
    heartbeat.beat()
    assert (only(page).is_paused, only(page).gap_ns) == (False, 0)


def test_heartbeat_of_another_thread_is_bound_by_that_thread(page: SignalsPage, signals: Signals) -> None:
    """The first beat decides; `bind` changes it."""
    heartbeat = signals.heartbeat("worker")
    tids: list[int] = []

    def run(call: Callable[[], None]) -> None:
        tids.append(threading.get_native_id())
        call()

    for call in (heartbeat.beat, heartbeat.beat, heartbeat.bind):
        thread = threading.Thread(target=run, args=(call,))
        thread.start()
        thread.join()
        assert only(page).tid == (tids[0] if call == heartbeat.beat else tids[-1])


def test_heartbeat_after_close_is_gone_and_frees_its_place(page: SignalsPage, signals: Signals) -> None:
    """A later beat has no effect, and the name can be used again."""
    heartbeat = signals.heartbeat("ui")
    heartbeat.beat()
    heartbeat.close()
    heartbeat.beat()
    heartbeat.close()
    assert list(heartbeat_slots(page.read())) == []
    again = signals.heartbeat("ui")
    assert again is not heartbeat
    assert only(page).beat == 0


def test_heartbeat_with_a_name_that_is_open_is_the_same_one(page: SignalsPage, signals: Signals) -> None:
    """With the new limit."""
    assert signals.heartbeat("ui", 1) is signals.heartbeat("ui", 3)
    assert only(page).limit_ns == 3_000_000_000


@pytest.mark.parametrize("name", ["", "1ui", "u i", "ui\n", "\x1b[31m", "ü", "a" * 33, None, 5])
def test_signals_with_a_bad_name_raise_value_error(signals: Signals, name: str) -> None:
    """The text says what a name may have."""
    for make in (signals.heartbeat, signals.gauge):
        with pytest.raises(ValueError, match=r"a letter and up to 31 of A-Z"):
            make(name)


@pytest.mark.parametrize("limit_s", [0, -1, 0.1, math.nan, math.inf, 3601, "2", None])
def test_heartbeat_with_a_bad_limit_raises_value_error(signals: Signals, limit_s: float) -> None:
    """The text says the range."""
    with pytest.raises(ValueError, match=r"from 0.25 to 3600 s"):
        signals.heartbeat("ui", limit_s)


def test_signals_beyond_thirty_two_of_a_kind_raise_value_error(page: SignalsPage, signals: Signals) -> None:
    """After one is closed there is room again, and every one that was opened is in the page."""
    heartbeats = [signals.heartbeat(f"h{i}") for i in range(HEARTBEATS)]
    gauges = [signals.gauge(f"g{i}") for i in range(GAUGES)]
    with pytest.raises(ValueError, match="32 heartbeats already"):
        signals.heartbeat("more")
    with pytest.raises(ValueError, match="32 gauges already"):
        signals.gauge("more")
    assert {slot.name for slot in heartbeat_slots(page.read())} == {each.name for each in heartbeats}
    assert {slot.name for slot in gauge_slots(page.read())} == {each.name for each in gauges}
    heartbeats[7].close()
    gauges[7].close()
    signals.heartbeat("more")
    signals.gauge("more")


@pytest.mark.parametrize("value", [0.0, -0.0, 58, 1e308, -1.5, 5e-324])
def test_gauge_after_a_value_is_in_the_page(page: SignalsPage, signals: Signals, value: float) -> None:
    """To the bit."""
    signals.gauge("fps").set(value)
    slot = only_gauge(page)
    assert (slot.name, math.copysign(1, slot.value), slot.value) == ("fps", math.copysign(1, value), value)
    assert slot.set_at > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, "x", None, 10**400])
def test_gauge_with_what_is_no_number_keeps_the_last_value(page: SignalsPage, signals: Signals, value: float) -> None:
    """And raises nothing."""
    gauge = signals.gauge("fps")
    gauge.set(3)
    gauge.set(value)
    assert only_gauge(page).value == 3


def test_signals_without_a_sidecar_have_no_effect_and_move_to_the_next_one(page: SignalsPage) -> None:
    """The handles of before beat in its page."""
    signals = Signals()
    heartbeat, gauge = signals.heartbeat("ui"), signals.gauge("fps")
    heartbeat.beat()
    heartbeat.pause()
    gauge.set(2)
    signals.connect(page.reference)
    assert only(page).beat > 0
    assert only(page).is_paused
    assert only_gauge(page).value == 2
    second = SignalsPage()
    signals.connect(second.reference)
    heartbeat.resume()
    assert not only(second).is_paused
    assert list(heartbeat_slots(page.read())) == [], "or the first sidecar would see a silence"
    second.close()
    heartbeat.beat()


def test_signals_of_a_page_that_was_cleared_move_whole_to_the_next_one(page: SignalsPage, signals: Signals) -> None:
    """A sidecar that ends clears its page before the client leaves it."""
    beating, paused, gauge = signals.heartbeat("ui"), signals.heartbeat("dialog"), signals.gauge("fps")
    beating.beat()
    paused.pause()
    gauge.set(2)
    page.clear()
    signals.leave(page.reference)
    second = SignalsPage()
    signals.connect(second.reference)
    beating.beat()
    slots = {slot.name: slot for slot in heartbeat_slots(second.read())}
    assert {name: slot.is_paused for name, slot in slots.items()} == {"ui": False, "dialog": True}
    assert slots["ui"].tid == threading.get_native_id()
    (moved,) = gauge_slots(second.read())
    assert moved.value == 2
    assert moved.set_at > 0
    second.close()


@on_linux
def test_lock_of_a_page_is_not_inherited_by_a_forked_child(page: SignalsPage, signals: Signals) -> None:
    """A child that another thread forks during the lock does not inherit it: the page can be locked at once."""
    with MappedPage(page.reference).locked():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        # In a process of its own, because a process does not exclude itself.
        program = f"""
import fcntl
with open({page.reference["path"]!r}, "r+b") as file:
    for lock in (fcntl.lockf, fcntl.flock):
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""
        subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
        signals.heartbeat("ui").beat()
        assert only(page).name == "ui"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@on_linux
def test_heartbeat_while_another_process_keeps_the_lock_takes_its_slot(page: SignalsPage, signals: Signals) -> None:
    """A client that stops or hangs during the lock delays others by a moment, not until it proceeds."""
    program = f"""
import sys
from vitalsd.contract.signals_page import MappedPage
with MappedPage({dict(page.reference)!r}).locked():
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PATH},
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline()
            opened = threading.Thread(target=lambda: signals.heartbeat("ui").beat(), daemon=True)
            watch = Stopwatch()
            opened.start()
            opened.join(30)
            assert watch.elapsed_s < watch.allowed_s(1)
            assert holder.poll() is None
            assert only(page).name == "ui"
        finally:
            holder.kill()


def test_signals_that_cannot_be_mapped_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    """And only if there is something to signal."""
    signals = Signals()
    signals.connect({"path": "/nonexistent/page"})
    assert not caplog.messages
    for name in ("a", "b"):
        signals.heartbeat(name).beat()
    (message,) = caplog.messages
    assert "not recorded" in message
    assert "/nonexistent/page" in message


def test_signals_in_a_forked_child_leave_the_page_of_the_parent(page: SignalsPage) -> None:
    """Beats, closes and gauges of the child have no effect there."""
    program = f"""
import os, sys
from vitalsd.contract.signals import signals_of_this_process
signals = signals_of_this_process()
signals.connect({dict(page.reference)!r})
heartbeat, gauge = signals.heartbeat("ui"), signals.gauge("fps")
heartbeat.beat(); gauge.set(1)
child = os.fork()
if not child:
    heartbeat.beat(); heartbeat.pause(); gauge.set(2); gauge.close(); heartbeat.close()
    signals.heartbeat("child").beat()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, env={**os.environ, "PYTHONPATH": PATH})
    assert (only(page).name, only(page).is_paused) == ("ui", False)
    assert only_gauge(page).value == 1


def test_heartbeat_in_a_forked_child_is_bound_by_its_first_beat_there(page: SignalsPage) -> None:
    """With the thread of its parent, a hang in the child would count as the end of that thread."""
    program = f"""
import os, sys, threading
from vitalsd.contract.signals import signals_of_this_process
from vitalsd.contract.signals_page import SignalsPage, heartbeat_slots
signals = signals_of_this_process()
signals.connect({dict(page.reference)!r})
heartbeat = signals.heartbeat("ui")
heartbeat.beat()
child = os.fork()
if not child:
    page = SignalsPage()
    signals.connect(page.reference)
    (before,) = heartbeat_slots(page.read())
    heartbeat.beat()
    (after,) = heartbeat_slots(page.read())
    is_own = (after.pid, after.tid) == (os.getpid(), threading.get_native_id())
    os._exit(0 if before.beat == 0 and is_own else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, env={**os.environ, "PYTHONPATH": PATH})


PATH = os.pathsep.join(map(str, (ROOT / "service", ROOT / "clients")))


@on_linux
def test_page_that_is_truncated_keeps_its_size(page: SignalsPage, signals: Signals) -> None:
    """A shorter page would end the client at its next beat by SIGBUS."""
    heartbeat = signals.heartbeat("ui")
    for size in (0, PAGE_BYTES - 1, PAGE_BYTES + 1):
        with pytest.raises(PermissionError):
            os.truncate(page.reference["path"], size)
    heartbeat.beat()
    assert only(page).beat > 0


def test_page_in_posix_shared_memory_takes_beats_and_is_removed_at_its_end() -> None:
    """As on macOS; a forked child that closes it leaves it to the parent."""
    page = SignalsPage(is_memfd=False)
    signals = Signals()
    signals.connect(page.reference)
    heartbeat = signals.heartbeat("ui")
    heartbeat.beat()
    assert only(page).beat > 0
    child = os.fork()
    if not child:
        page.close()
        os._exit(0)
    os.waitpid(child, 0)
    reference = dict(page.reference)
    MappedPage(reference)
    page.close()
    page.close()
    with pytest.raises(PageError, match="cannot be mapped"):
        MappedPage(reference)
    heartbeat.beat()


@on_linux
def test_page_that_could_shrink_is_not_mapped(tmp_path: os.PathLike[str]) -> None:
    """A file, and a memfd without seals, are refused with the reason."""
    loose = os.memfd_create("loose")  # type: ignore[attr-defined, unused-ignore]
    with SignalsPageFile(loose) as path, pytest.raises(PageError, match="could shrink"):
        MappedPage({"path": path})
    file = os.path.join(tmp_path, "page")
    with open(file, "wb") as written:
        written.write(b"\0" * PAGE_BYTES)
    with pytest.raises(PageError, match="cannot be mapped"):
        MappedPage({"path": file})


class SignalsPageFile:
    """A file descriptor of this process by a path."""

    def __init__(self, fd: int) -> None:
        os.ftruncate(fd, PAGE_BYTES)
        self._fd = fd

    def __enter__(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


@given(st.binary(max_size=64) | st.binary(min_size=1, max_size=64).map(lambda part: (part * PAGE_BYTES)[:PAGE_BYTES]))
def test_page_with_noise_is_refused(content: bytes) -> None:
    """By `ValueError` alone."""
    for slots in (heartbeat_slots, gauge_slots):
        with pytest.raises(ValueError, match=r"page"):
            list(slots(content))


def test_page_with_noise_in_a_slot_is_refused(page: SignalsPage) -> None:
    """A state, a limit or a name that no client writes."""
    for word, value in ((6, 9), (6, 1), (8, 0x0A)):
        content = bytearray(page.read())
        words = memoryview(content).cast("Q")
        words[16 + 3], words[16 + 6], words[16 + 8] = 1, 1, ord("a")
        words[16 + word] = value
        if (word, value) == (6, 1):
            words[16 + 3] = 0
        words.release()
        with pytest.raises(ValueError, match=r"heartbeat 0 has no state or no limit|a name"):
            list(heartbeat_slots(bytes(content)))


def test_heartbeat_on_a_busy_machine_is_never_torn(page: SignalsPage, signals: Signals) -> None:
    """A reader finds times that were beaten, and never half of one: the two halves of a word would be far apart."""
    heartbeat, stop = signals.heartbeat("ui"), threading.Event()

    def beat() -> None:
        while not stop.is_set():
            heartbeat.beat()

    threads = [threading.Thread(target=beat) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        last = time.monotonic_ns()
        for _ in range(3000):
            read = only(page).beat
            assert read == 0 or last - 60_000_000_000 < read <= time.monotonic_ns()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@on_linux
def test_beats_make_no_system_call(signals: Signals) -> None:
    """Time in the kernel does not grow with the number of beats."""
    heartbeat = signals.heartbeat("ui")
    heartbeat.beat()
    before = resource.getrusage(resource.RUSAGE_THREAD)  # type: ignore[attr-defined, unused-ignore]
    for _ in range(200_000):
        heartbeat.beat()
    after = resource.getrusage(resource.RUSAGE_THREAD)  # type: ignore[attr-defined, unused-ignore]
    used_s, kernel_s = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    assert kernel_s <= 0.05 + used_s / 2


def test_heartbeat_on_asyncio_beats_until_it_is_closed(page: SignalsPage, signals: Signals) -> None:
    """A blocked loop does not beat."""
    heartbeat = signals.heartbeat("loop", 0.25)

    async def program() -> None:
        heartbeat.beat_on_asyncio(asyncio.get_running_loop())
        await until(lambda: only(page).beat > 0)
        first = only(page).beat
        await until(lambda: only(page).beat > first)
        time.sleep(0.4)
        assert time.monotonic_ns() - only(page).beat >= 300_000_000
        heartbeat.close()
        await asyncio.sleep(0.1)

    asyncio.run(program())
    assert list(heartbeat_slots(page.read())) == []


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


class Timer:
    """The part of a QTimer and of a Tk widget that an adapter uses."""

    def __init__(self) -> None:
        self.timeout = self
        self.calls: list[Callable[[], object]] = []
        self.running = False

    def connect(self, call: Callable[[], object]) -> None:
        self.calls.append(call)

    def start(self, ms: int) -> None:
        assert ms > 0
        self.running = True

    def stop(self) -> None:
        self.running = False

    def after(self, ms: int, func: Callable[[], object]) -> None:
        assert ms > 0
        self.calls.append(func)


def test_heartbeat_on_qt_and_tk_beats_until_it_is_closed(page: SignalsPage, signals: Signals) -> None:
    """With what both toolkits offer; `tests/hosts` has a real Qt."""
    qt, tk = Timer(), Timer()
    heartbeat = signals.heartbeat("ui")
    heartbeat.beat_on_qt(qt)
    assert qt.running
    qt.calls[0]()
    first = only(page).beat
    heartbeat.beat_on_tk(tk)
    tk.calls[0]()
    assert 0 < first < only(page).beat
    heartbeat.close()
    count = len(tk.calls)
    tk.calls[-1]()
    qt.calls[0]()
    assert (len(tk.calls), qt.running) == (count, False)


def test_signals_with_another_owner_name_no_thread(page: SignalsPage) -> None:
    """As those that a client posts over HTTP."""
    signals = Signals(owner=lambda: 0)
    signals.connect(page.reference)
    signals.heartbeat("ui").beat()
    assert (only(page).pid, only(page).tid) == (0, 0)
    assert this_thread() >> 32 == os.getpid()
