"""The detector of hangs over a simulated page, clock and thread; test_hang_causes.py plants hangs in real programs."""

import logging
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalsd.contract.signals_page import (
    BEAT,
    GAP,
    GAP_END,
    HEADER_WORDS,
    HEARTBEAT_NAME,
    HEARTBEATS,
    LIMIT,
    MAGIC,
    OPEN,
    OWNER,
    PAGE_BYTES,
    PAUSED,
    SLOT_WORDS,
    STATE,
    VERSION,
    name_words,
)
from vitalsd.recording.hangs import PERIOD_NS, Hang, HangDetector
from vitalsd.sources.base import KernelError, ThreadLook

MS = 1_000_000
SECOND = 1_000_000_000
LIMIT_NS = SECOND
TID, OWN_TID = 4242, 77
UNIX_NS = 1_700_000_000 * SECOND


@dataclass
class Thread:
    """A thread, and what it does as time passes."""

    doing: str = "epoll"
    """``run``, ``wait`` or ``still`` for a CPU, ``lock`` for the interpreter lock, else a wait channel."""
    cpu_ns: int = 0
    wait_ns: int = 0
    slices: int = 0
    faults: int = 0

    def pass_time(self, ns: int) -> None:
        self.cpu_ns += ns if self.doing == "run" else 0
        self.wait_ns += ns if self.doing == "wait" else 0
        self.slices += ns // (6 * MS) if self.doing == "lock" else 0

    @property
    def state(self) -> str:
        return {"run": "running", "wait": "running", "still": "running", "T": "stopped", "t": "traced"}.get(
            self.doing, "sleeping"
        )

    @property
    def channel(self) -> str | None:
        return None if self.state != "sleeping" else "futex" if self.doing == "lock" else self.doing


@dataclass
class World:
    """A page, the thread of its first heartbeat, and a sidecar that looks every 250 ms."""

    inside: bool = False
    now_ns: int = 100 * SECOND
    client_ns: int = 5 * SECOND
    """Distance of the client's clock from ours: it is in another time namespace."""
    wall_ns: int = UNIX_NS
    thread: Thread | None = field(default_factory=Thread)
    own: Thread = field(default_factory=lambda: Thread("hrtimer_nanosleep"))
    hangs: list[Hang] = field(default_factory=list)
    looks: list[bool] = field(default_factory=list)
    """Whether each look at the thread was a close one."""

    def __post_init__(self) -> None:
        self.words = memoryview(bytearray(PAGE_BYTES)).cast("Q")
        self.words[0], self.words[1] = MAGIC, VERSION
        self.detector = HangDetector(own_tid=OWN_TID if self.inside else None, wall_clock=lambda: self.wall_ns)

    def open(self, place: int = 0, name: str = "ui", limit_ns: int = LIMIT_NS, tid: int = TID) -> None:
        at = HEADER_WORDS + SLOT_WORDS * place
        for word in range(SLOT_WORDS):
            self.words[at + word] = 0
        for i, word in enumerate(name_words(name)):
            self.words[at + HEARTBEAT_NAME + i] = word
        self.words[at + LIMIT], self.words[at + OWNER] = limit_ns, 1 << 32 | tid
        self.words[at + STATE] = OPEN

    def set(self, word: int, value: int, place: int = 0) -> None:
        self.words[HEADER_WORDS + SLOT_WORDS * place + word] = value

    def beat(self, place: int = 0) -> None:
        at = HEADER_WORDS + SLOT_WORDS * place
        now, last = self.now_ns + self.client_ns, self.words[at + BEAT]
        if last and now - last > self.words[at + LIMIT]:
            self.words[at + GAP], self.words[at + GAP_END] = now - last, now
        self.words[at + BEAT] = now

    def pass_time(self, ns: int) -> None:
        self.now_ns += ns
        self.wall_ns += ns
        for thread in (self.thread, self.own):
            if thread is not None:
                thread.pass_time(ns)

    def look(self) -> list[Hang]:
        found = self.detector.look(self.now_ns, self.words.tobytes(), self.look_at)
        self.hangs += found
        return found

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        thread = {TID: self.thread, OWN_TID: self.own}.get(tid)
        if tid == TID:
            self.looks.append(closely)
        if thread is None:
            return None
        look = ThreadLook(self.now_ns, thread.cpu_ns, thread.wait_ns, thread.slices)
        if not closely:
            return look
        return look._replace(state=thread.state, major_faults=thread.faults, wait_channel=thread.channel)

    def live(self, ns: int, *, beats: bool = True, places: int = 1) -> None:
        """Let time pass with a beat every 50 ms, and look every 250 ms."""
        for step in range(ns // (50 * MS)):
            self.pass_time(50 * MS)
            for place in range(places if beats else 0):
                self.beat(place)
            if step % 5 == 4:
                self.look()

    @property
    def ended(self) -> list[Hang]:
        return [hang for hang in self.hangs if not hang.ongoing]

    @property
    def state(self) -> str:
        return self.detector.statuses[0].state


@pytest.fixture
def world() -> World:
    made = World()
    made.open()
    made.live(6 * SECOND)
    return made


def hang(world: World, doing: str, ns: int = 2 * SECOND) -> Hang:
    """Let the thread do something without a beat; return the report at the end."""
    assert world.thread is not None
    world.thread.doing = doing
    world.live(ns, beats=False)
    world.thread.doing = "epoll"
    world.beat()
    world.live(SECOND)
    assert len(world.ended) == 1
    return world.ended[0]


@pytest.mark.parametrize(
    ("doing", "cause"),
    [
        ("run", "busy"),
        ("wait", "starved"),
        ("still", "starved"),
        ("futex", "blocked"),
        ("anon_pipe_read", "blocked"),
        ("frozen", "stopped"),
        ("T", "stopped"),
        ("t", "stopped"),
        ("lock", "interpreter_lock"),
        ("epoll", "idle"),
        ("poll", "idle"),
    ],
)
def test_detector_reports_start_true_length_and_cause(world: World, doing: str, cause: str) -> None:
    """The client noted the length; the start is that of the last beat, although its clock has another zero."""
    began_ns, began_wall_ns = world.now_ns, world.wall_ns
    found = hang(world, doing)
    assert (found.cause, found.duration_ns, found.heartbeat) == (cause, 2 * SECOND, "ui")
    assert 0 <= began_ns - found.monotonic_ns <= PERIOD_NS
    assert began_wall_ns - found.wall_ns == began_ns - found.monotonic_ns
    assert {report.monotonic_ns for report in world.hangs} == {found.monotonic_ns}
    ongoing = [report for report in world.hangs if report.ongoing]
    assert [report.cause for report in ongoing] == [cause] * len(ongoing)
    assert ongoing == sorted(ongoing, key=lambda report: report.duration_ns)


def test_detector_reads_the_threads_files_only_in_silence(world: World) -> None:
    """After its first lessons, once in 5 s while all is well; at each look from half of the limit on."""
    world.looks.clear()
    world.live(20 * SECOND)
    assert len(world.looks) == 4
    world.looks.clear()
    world.live(400 * MS, beats=False)
    assert world.looks == []
    world.live(500 * MS, beats=False)
    assert len(world.looks) == 2


def test_detector_without_a_heartbeat_looks_at_nothing() -> None:
    """Neither at the thread of the sidecar nor at another, and there is no status."""
    world = World(inside=True)
    world.live(2 * SECOND)
    assert (world.hangs, world.looks, world.detector.statuses) == ([], [], ())


def test_detector_at_a_late_beat_within_the_limit_reports_nothing(world: World) -> None:
    """A silence a little shorter than the limit is none, whatever the phase of the looks."""
    for extra_ms in range(0, 250, 10):
        world.pass_time(extra_ms * MS)
        world.look()
        world.live(700 * MS, beats=False)
        world.beat()
        world.live(500 * MS)
    assert world.hangs == []


@pytest.mark.parametrize("inside", [False, True])
def test_detector_stopped_with_its_target_reports_nothing(inside: bool) -> None:
    """The client notes a gap of 2 s, in which nothing ran, also the sidecar: no beat is missing."""
    world = World(inside=inside)
    world.open()
    world.live(6 * SECOND)
    for delay_ms in (0, 20, 100, 240):
        world.pass_time(delay_ms * MS)
        for thread in (world.thread, world.own):
            assert thread is not None
            thread.doing = "T"
        world.pass_time(2 * SECOND)
        world.beat()
        world.look()
        for thread in (world.thread, world.own):
            assert thread is not None
            thread.doing = "epoll"
        world.live(2 * SECOND)
    assert world.hangs == []


def test_detector_after_a_sleep_of_the_machine_reports_nothing(world: World) -> None:
    """The clocks of both stand still meanwhile; the wall clock does not."""
    world.live(500 * MS, beats=False)
    world.wall_ns += 3600 * SECOND
    world.live(300 * MS, beats=False)
    world.beat()
    world.live(SECOND)
    assert world.hangs == []


def test_detector_at_a_step_of_the_wall_clock_keeps_start_and_length(world: World) -> None:
    """The start that was reported first stays, and the length comes from a clock that nothing sets."""
    assert world.thread is not None
    began_wall_ns = world.wall_ns
    world.live(1500 * MS, beats=False)
    world.wall_ns -= 7200 * SECOND
    world.live(1500 * MS, beats=False)
    world.beat()
    world.live(SECOND)
    assert world.ended[0].duration_ns == 3 * SECOND
    assert {report.wall_ns for report in world.hangs} == {world.ended[0].wall_ns}
    assert abs(began_wall_ns - world.ended[0].wall_ns) <= PERIOD_NS


def test_detector_stopped_alone_counts_only_what_it_saw(world: World) -> None:
    """A sidecar that was stopped for a minute, during which the client hung, has seen less than the limit."""
    world.pass_time(60 * SECOND)
    world.look()
    assert world.hangs == []
    world.beat()
    world.live(SECOND)
    assert world.hangs == []


@pytest.mark.parametrize("host_first", [False, True])
@pytest.mark.parametrize(
    ("doing", "cause"), [("lock", "interpreter_lock"), ("run", "busy"), ("hrtimer_nanosleep", "blocked")]
)
def test_detector_inside_locked_out_with_its_host_finds_the_hang(host_first: bool, doing: str, cause: str) -> None:
    """Its own thread waited for the interpreter lock: that proves that it was not stopped, whichever wakes first."""
    world = World(inside=True)
    world.open()
    world.live(6 * SECOND)
    assert world.thread is not None
    world.thread.doing, world.own.doing = doing, "lock"
    world.pass_time(2 * SECOND)
    if not host_first:
        world.look()
    world.thread.doing, world.own.doing = "epoll", "hrtimer_nanosleep"
    world.beat()
    world.live(2 * SECOND)
    (found,) = world.ended
    assert (found.cause, found.duration_ns) == (cause, 2 * SECOND)


def test_detector_inside_that_read_the_page_before_the_lock_finds_the_hang() -> None:
    """The read of the page gives the interpreter lock away, and returns what was there two seconds ago."""
    world = World(inside=True)
    world.open()
    world.live(6 * SECOND)
    assert world.thread is not None
    world.pass_time(250 * MS)
    world.beat()
    content = world.words.tobytes()
    world.thread.doing = world.own.doing = "lock"
    world.pass_time(2 * SECOND)
    world.hangs += world.detector.look(world.now_ns, content, world.look_at)
    world.thread.doing, world.own.doing = "epoll", "hrtimer_nanosleep"
    world.beat()
    world.pass_time(8 * MS)
    world.look()
    world.live(SECOND)
    (found,) = world.ended
    assert (found.cause, found.duration_ns) == ("interpreter_lock", 2 * SECOND)


def test_detector_stopped_just_after_it_read_the_page_reports_nothing(world: World) -> None:
    """Its time is that after the stop, and the page is that before it: the gap lies after the beat that it shows."""
    world.pass_time(250 * MS)
    world.beat()
    content = world.words.tobytes()
    world.pass_time(2 * SECOND)
    world.hangs += world.detector.look(world.now_ns, content, world.look_at)
    world.beat()
    world.live(SECOND)
    assert world.hangs == []


def test_detector_at_a_pause_ends_the_hang_and_begins_anew(world: World) -> None:
    """A paused heartbeat is silent for any time; after `resume` the silence counts from then on."""
    world.live(1500 * MS, beats=False)
    world.set(STATE, PAUSED)
    world.live(60 * SECOND, beats=False)
    assert world.state == "paused"
    assert len(world.ended) == 1
    assert world.ended[0].duration_ns < 1600 * MS
    world.set(STATE, OPEN)
    world.live(900 * MS, beats=False)
    assert (world.state, len(world.ended)) == ("beating", 1)
    world.live(600 * MS, beats=False)
    assert world.state == "silent"


def test_detector_at_a_slot_of_another_heartbeat_ends_the_hang(world: World) -> None:
    """The name tells that it is another one, which has not begun to beat."""
    world.live(1500 * MS, beats=False)
    world.open(name="decoder")
    world.look()
    assert [(report.heartbeat, report.ongoing) for report in world.hangs[-1:]] == [("ui", False)]
    assert [(status.name, status.state) for status in world.detector.statuses] == [("decoder", "paused")]
    world.live(10 * SECOND, beats=False)
    assert len(world.ended) == 1


def test_detector_at_a_closed_heartbeat_ends_the_hang(world: World) -> None:
    """With the length that was seen."""
    world.live(1500 * MS, beats=False)
    world.set(STATE, 0)
    world.live(SECOND, beats=False)
    assert len(world.ended) == 1
    assert world.detector.statuses == ()


def test_detector_at_a_thread_that_ended_reports_no_hang(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Its heartbeat stays silent; a beat of another thread lets it live on."""
    world.thread = None
    world.live(5 * SECOND, beats=False)
    status = world.detector.statuses[0]
    assert (world.hangs, status.state, status.cause, status.detail) == ([], "silent", None, "its thread has ended")
    assert len(caplog.records) == 1
    world.thread = Thread()
    world.live(SECOND)
    assert world.state == "beating"
    world.live(2 * SECOND, beats=False)
    assert world.state == "silent"
    assert world.hangs[-1].cause == "idle"


def test_detector_at_a_thread_that_ended_warns_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Also if other threads go on with its heartbeat, now and then."""
    world.thread = None
    for _ in range(10):
        world.live(700 * MS, beats=False)
        world.live(500 * MS)
    assert len(caplog.records) == 1


def test_detector_at_a_beat_of_another_thread_keeps_the_cause(world: World) -> None:
    """The loop hung, and then another thread took it over: the cause is that of the first one."""
    assert world.thread is not None
    world.thread.doing = "futex"
    world.live(2 * SECOND, beats=False)
    world.set(OWNER, 1 << 32 | 9999)
    world.beat()
    world.live(SECOND)
    assert [report.cause for report in world.ended] == ["blocked"]


def test_detector_at_an_old_note_of_a_gap_reports_nothing() -> None:
    """A sidecar that starts finds the longest gap of yesterday in the page."""
    world = World()
    world.open()
    world.beat()
    world.set(GAP, 9 * SECOND)
    world.set(GAP_END, world.now_ns + world.client_ns - 60 * SECOND)
    world.live(5 * SECOND)
    assert world.hangs == []


def test_detector_at_two_gaps_between_looks_reports_one_hang(world: World) -> None:
    """The page has the last one; the sidecar was stopped, so it can vouch for neither."""
    world.pass_time(1500 * MS)
    world.beat()
    world.pass_time(1200 * MS)
    world.beat()
    world.look()
    world.live(SECOND)
    assert len(world.ended) <= 1


def test_detector_at_a_client_without_notes_is_right_within_one_look(world: World) -> None:
    """A client in another language may not note its gaps."""
    world.live(2 * SECOND, beats=False)
    world.set(BEAT, world.now_ns)
    world.look()
    assert abs(world.ended[0].duration_ns - 2 * SECOND) <= PERIOD_NS


def test_detector_at_an_impossible_note_uses_its_own_count(world: World) -> None:
    """A gap of 500 years in the page is noise."""
    world.live(2 * SECOND, beats=False)
    world.set(GAP, 2**63)
    world.set(GAP_END, 5)
    world.set(BEAT, 6)
    world.look()
    assert abs(world.ended[0].duration_ns - 2 * SECOND) <= 2 * PERIOD_NS


def test_detector_at_an_unknown_thread_reports_an_unknown_cause(world: World) -> None:
    """As for a heartbeat that came by HTTP."""
    world.open(tid=0)
    world.beat()
    world.live(SECOND)
    world.live(2 * SECOND, beats=False)
    assert {report.cause for report in world.hangs} == {"unknown"}


def test_detector_at_a_thread_that_cannot_be_read_reports_an_unknown_cause() -> None:
    """An error of the source ends no look."""

    def fail(tid: int, *, closely: bool = True) -> ThreadLook | None:
        raise KernelError("too many open files")

    world = World(inside=True)
    world.look_at = fail  # type: ignore[method-assign]
    world.open()
    world.live(2 * SECOND)
    world.live(2 * SECOND, beats=False)
    assert {report.cause for report in world.hangs} == {"unknown"}


def test_detector_where_the_thread_usually_waits_in_a_futex_says_unknown() -> None:
    """A lock and a condition variable are one thing from outside."""
    world = World()
    world.open()
    assert world.thread is not None
    world.thread.doing = "futex"
    world.live(6 * SECOND)
    world.live(2 * SECOND, beats=False)
    assert {report.cause for report in world.hangs} == {"unknown"}
    assert "usually" in world.hangs[-1].detail


def test_detector_of_a_thread_that_hangs_after_its_first_beats_does_not_take_the_lock_for_usual() -> None:
    """The look that finds its last beat may find it in the lock already."""
    world = World()
    world.open()
    world.beat()
    world.look()
    world.pass_time(200 * MS)
    world.beat()
    assert world.thread is not None
    world.thread.doing = "futex"
    world.pass_time(50 * MS)
    world.look()
    world.live(2 * SECOND, beats=False)
    world.thread.doing = "epoll"
    world.beat()
    world.live(SECOND)
    (found,) = world.ended
    assert (found.cause, found.detail) == ("blocked", "futex")


def test_detector_at_two_causes_that_fit_says_unknown(world: World) -> None:
    """Half of the looks in an event loop, and half in a lock."""
    assert world.thread is not None
    for _ in range(6):
        for doing in ("futex", "poll"):
            world.thread.doing = doing
            world.live(250 * MS, beats=False)
    assert world.hangs[-1].cause == "unknown"


def test_detector_without_a_wait_channel_says_unknown_on_linux_and_blocked_on_macos(world: World) -> None:
    """On macOS no thread has one; on Linux it may not be read, and the thread may as well be idle."""
    for slices, cause in ((0, "unknown"), (None, "blocked")):

        def look_at(tid: int, *, closely: bool = True, slices: int | None = slices) -> ThreadLook | None:
            return ThreadLook(world.now_ns, 0, slices, slices, state="sleeping" if slices == 0 else "waiting")

        world.look_at = look_at  # type: ignore[method-assign]
        world.live(SECOND)
        world.live(2 * SECOND, beats=False)
        assert world.hangs[-1].cause == cause


def test_detector_watches_all_heartbeats_of_a_page_apart() -> None:
    """All 32, of which every other one hangs."""
    world = World()
    for place in range(HEARTBEATS):
        world.open(place, name=f"loop-{place}")
    world.live(2 * SECOND, places=HEARTBEATS)
    for step in range(40):
        world.pass_time(50 * MS)
        for place in range(0, HEARTBEATS, 2):
            world.beat(place)
        if step % 5 == 4:
            world.look()
    assert {report.heartbeat for report in world.hangs} == {f"loop-{place}" for place in range(1, HEARTBEATS, 2)}
    assert [status.state for status in world.detector.statuses] == ["beating", "silent"] * (HEARTBEATS // 2)


def test_detector_at_noise_warns_once_and_ends_its_hangs(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The page may be written by any program of this user."""
    world.live(1500 * MS, beats=False)
    world.set(STATE, 99)
    world.live(5 * SECOND, beats=False)
    assert len(world.ended) == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    world.set(STATE, OPEN)
    world.live(SECOND)
    assert world.state == "beating"


def test_detector_at_a_limit_below_two_looks_counts_two(world: World) -> None:
    """It cannot tell a shorter silence from the time between two looks."""
    world.set(LIMIT, 1)
    for _ in range(20):
        world.pass_time(250 * MS)
        world.look()
        world.pass_time(10 * MS)
        world.beat()
    assert world.hangs == []


@given(st.integers(0, 2**32), st.integers(0, 2**64 - 1))
def test_detector_at_random_pages_does_not_raise(seed: int, word: int) -> None:
    """Also where noise is a heartbeat."""
    world = World()
    world.open()
    world.live(SECOND)
    valid = bytearray(world.words.tobytes())
    for at in (BEAT, GAP, GAP_END, LIMIT, OWNER):
        changed = bytearray(valid)
        struct.pack_into("=Q", changed, 8 * (HEADER_WORDS + at), word)
        world.pass_time(PERIOD_NS)
        world.detector.look(world.now_ns, bytes(changed), world.look_at)
    noise = random.Random(seed).randbytes(PAGE_BYTES - 16)
    world.detector.look(world.now_ns + PERIOD_NS, struct.pack("=2Q", MAGIC, VERSION) + noise, world.look_at)


DOINGS = ["run", "wait", "still", "futex", "lock", "epoll", "poll", "T", "frozen"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["beat", "silence", "stall", "pause", "resume", "set clock", "reuse"]),
            st.sampled_from(DOINGS),
            st.integers(1, 4000),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_detector_reports_a_hang_only_for_a_gap_over_the_limit(steps: list[tuple[str, str, int]], inside: bool) -> None:
    """Whatever happens: each report lies in a real gap, there is one hang for a gap, and none is longer than it."""
    world = World(inside=inside)
    world.open()
    gaps: list[tuple[int, int]] = []
    last = world.now_ns

    def beat() -> None:
        nonlocal last
        gaps.append((last, world.now_ns))
        last = world.now_ns
        world.beat()

    def run(ms: int, each: Callable[[], object]) -> None:
        for step in range(ms // 50):
            world.pass_time(50 * MS)
            each()
            if step % 5 == 4:
                world.look()

    run(2000, beat)
    for kind, doing, ms in steps:
        assert world.thread is not None
        world.thread.doing = doing
        if kind == "beat":
            run(ms, beat)
        elif kind == "silence":
            run(ms, lambda: None)
        elif kind == "stall":
            world.pass_time(ms * MS)
        elif kind == "set clock":
            world.wall_ns += (ms - 2000) * SECOND
        elif kind == "reuse":
            world.open(name=f"x{ms}")
        else:
            world.set(STATE, PAUSED if kind == "pause" else OPEN)
    gaps.append((last, world.now_ns))
    for report in world.hangs:
        began_ns, ended_ns = report.monotonic_ns, report.monotonic_ns + report.duration_ns
        inside_of = [gap for gap in gaps if began_ns >= gap[0] - 2 * PERIOD_NS and ended_ns <= gap[1] + 2 * PERIOD_NS]
        assert any(gap[1] - gap[0] > LIMIT_NS for gap in inside_of), (report, gaps)
    assert len({(report.heartbeat, report.monotonic_ns) for report in world.ended}) == len(world.ended)
