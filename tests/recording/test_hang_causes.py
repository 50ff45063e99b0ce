"""
Hangs that are planted in real programs, and the causes that vitalsd reports for them.

A wrong cause is a failure; `unknown` is allowed in 5 % of the hangs. Where the machine is busy, a thread that was
planted as busy may starve: then the CPU time that it measured itself states what is right. The long form plants 20 of
each kind.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

if sys.platform != "linux":
    pytest.skip("hangs are planted by means of Linux", allow_module_level=True)

from support.hang_plants import Gap, HangingClient, Programs, hogs, in_group, matrix, watch_for, watch_until
from vitalsd.recording.hang_causes import HangCause

assert sys.platform == "linux"
pytestmark = pytest.mark.live

COUNTS = [pytest.param(2, id="quick"), pytest.param(20, id="torture", marks=pytest.mark.torture)]
PLANT_MS = 1600
"""Length of the first hang that is planted, ms; each further one is a little longer."""


class Plant(NamedTuple):
    """A hang to plant."""

    where: Literal["native", "cond", "beside", "inside"]
    """The client: in C, with a loop that waits in epoll or in a condition variable, or in Python."""
    kind: str
    right: HangCause

    def __str__(self) -> str:
        return f"{self.kind} ({self.where})"


def both(kind: str, right: HangCause) -> list[Plant]:
    """Return a hang of a Python client that is watched from beside, and from inside."""
    return [Plant("beside", kind, right), Plant("inside", kind, right)]


BATCHES: dict[str, list[Plant]] = {
    "waiting": [
        *(Plant("native", kind, "blocked") for kind in ("mutex", "pipe", "socket", "flock", "nanosleep", "waitpid")),
        Plant("native", "cond", "blocked"),
        *(Plant("native", kind, "idle") for kind in ("epoll", "poll", "select")),
        # The thread usually waits in a futex, so a futex says nothing.
        *(Plant("cond", kind, "unknown") for kind in ("cond", "mutex")),
        Plant("cond", "nanosleep", "blocked"),
        Plant("cond", "poll", "idle"),
        *(plant for kind in ("lock", "queue", "sleep") for plant in both(kind, "blocked")),
        *both("asyncio", "idle"),
        Plant("native", "starve", "starved"),
        *both("own_asleep", "blocked"),
        *both("other_asleep", "interpreter_lock"),
    ],
    "at work": [Plant("native", "spin", "busy"), Plant("native", "syscalls", "busy")],
    "at a disk": [Plant("native", "direct", "blocked"), Plant("native", "paging", "paging")],
    "other_busy": both("other_busy", "interpreter_lock"),
    "own_busy": both("own_busy", "busy"),
    "python": both("python", "busy"),
}
"""
Hangs that are planted at the same time, because they do not disturb each other. The long form plants those of a batch
of two one after the other.
"""
Keep = Callable[[HangingClient], HangingClient]


@pytest.fixture(scope="module")
def programs(module_path: Path) -> Programs:
    return Programs(module_path)


@pytest.fixture
def started() -> Iterator[Keep]:
    """Ends each client at the end of the test."""
    with ExitStack() as stack:

        def keep(client: HangingClient) -> HangingClient:
            stack.callback(client.close)
            return client

        yield keep


def rights_of(plant: Plant, gap: Gap) -> set[HangCause]:
    """Return the causes that are right for what was planted, if other programs took the CPU meanwhile."""
    run, wait = gap.cpu_ns / gap.length_ns, gap.wait_ns / gap.length_ns
    match plant.right:
        case "busy":
            return {"busy"} if run > 0.6 else {"starved"} if wait > 0.6 else {"busy", "starved", "unknown"}
        case "interpreter_lock":
            return {"interpreter_lock", "unknown"} if wait > 0.4 else {"interpreter_lock"}
        case "blocked" | "paging" if run + wait > 0.45:
            return {plant.right, "unknown", "starved" if wait > run else "busy"}
        case _:
            return {plant.right}


class Report:
    """What was planted, and the causes that were reported: when the hang was over, and when it was noticed."""

    def __init__(self) -> None:
        self.causes: list[tuple[str, str]] = []
        self.noticed: list[tuple[str, str]] = []
        self.wrong: list[str] = []

    def add(self, plant: Plant, client: HangingClient, least_ns: int) -> None:
        """Compare the last gap of that length with the hang that is reported."""
        gap = next(gap for gap in reversed(client.gaps) if gap.length_ns >= least_ns)
        reported = client.hang_of(gap)
        if reported is None:
            self.wrong.append(f"{plant}: {gap} is not reported: {list(client.hangs.values())}")
            return
        rights = rights_of(plant, gap)
        for hang, causes in zip(reported, (self.noticed, self.causes), strict=True):
            is_right = hang.cause in rights
            causes.append(
                (str(plant), f"{hang.cause} (as measured)" if is_right and hang.cause != plant.right else hang.cause)
            )
            if not is_right and hang.cause != "unknown":
                self.wrong.append(f"{plant}: {hang}, {gap}")

    def check(self, count: int) -> None:
        """Fail if a cause is wrong, or unknown in more than 5 % of the hangs of one kind, but one is allowed."""
        print(f"\nat the end:\n{matrix(self.causes)}\nas it was noticed:\n{matrix(self.noticed)}")
        assert not self.wrong, "\n".join(self.wrong)
        wanted = [label for label, _ in self.causes if "cond)" not in label]
        for label in set(wanted):
            assert self.causes.count((label, "unknown")) <= max(1, count // 20), label


def has_gap(client: HangingClient, number: int, least_ns: int) -> bool:
    """Return whether a client has reported a gap of that length after its first `number` ones."""
    return any(gap.length_ns >= least_ns for gap in client.gaps[number:])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_detector_at_a_planted_hang_reports_its_length_and_cause(
    programs: Programs, started: Keep, batch: str, count: int
) -> None:
    """In each client, `count` times, at the end of the hang and when it was noticed."""
    report = Report()
    clients = [(plant, started(programs.start(plant.where))) for plant in BATCHES[batch]]
    every = [client for _, client in clients]
    watch_until(every, lambda: all(client.is_ready for client in every))
    turns = [clients]
    if len(clients) == 2 and count > 2:  # with a CPU of its own, so that none starves
        turns = [[each] for each in clients]
        for client in every:
            client.hurry()
    for i in range(count):
        for turn in turns:
            plant_turn(turn, every, PLANT_MS + 37 * i, report)
    report.check(count)


def plant_turn(
    turn: list[tuple[Plant, HangingClient]], every: list[HangingClient], plant_ms: int, report: Report
) -> None:
    """Make these clients hang at the same time, and add what is reported."""
    numbers = [len(client.gaps) for _, client in turn]
    for plant, client in turn:
        client.order(plant.kind, plant_ms)
    least_ns = plant_ms * 950_000
    watch_until(every, lambda: all(has_gap(client, n, least_ns) for n, (_, client) in zip(numbers, turn, strict=True)))
    watch_for(every, 0.5)
    for plant, client in turn:
        report.add(plant, client, least_ns)


@contextmanager
def stopped(client: HangingClient) -> Iterator[None]:
    client.process.send_signal(signal.SIGSTOP)
    yield
    client.process.send_signal(signal.SIGCONT)


@contextmanager
def frozen(client: HangingClient, mount: str, file: str, on: str, off: str) -> Iterator[None]:
    with in_group(client.process.pid, mount, file) as path:
        path.write_text(on)
        try:
            yield
        finally:
            path.write_text(off)


@contextmanager
def frozen_2(client: HangingClient) -> Iterator[None]:
    unified = "/sys/fs/cgroup/unified"
    with frozen(client, unified if os.path.isdir(unified) else "/sys/fs/cgroup", "cgroup.freeze", "1", "0"):
        yield


@contextmanager
def under_quota(client: HangingClient) -> Iterator[None]:
    with in_group(client.process.pid, "/sys/fs/cgroup/cpu", "cpu.cfs_quota_us") as path:
        path.write_text("2000")  # of each 100 ms
        client.order("work", 200)
        yield


LEAST_NS = 1_400_000_000
"""Least length of a hang that one of `HALTS` makes, ns."""
HALTS: dict[str, tuple[Callable[[HangingClient], AbstractContextManager[None]], HangCause]] = {
    "SIGSTOP": (stopped, "stopped"),
    "freezer 1": (
        partial(frozen, mount="/sys/fs/cgroup/freezer", file="freezer.state", on="FROZEN", off="THAWED"),
        "stopped",
    ),
    "freezer 2": (frozen_2, "stopped"),
    "quota": (under_quota, "starved"),
}


@pytest.mark.parametrize("count", COUNTS)
def test_detector_at_a_client_that_gets_no_cpu_reports_why(programs: Programs, started: Keep, count: int) -> None:
    """A signal or a freezer stops it, or a quota leaves it no CPU; all at the same time."""
    report = Report()
    clients = {kind: started(programs.start("native")) for kind in HALTS}
    watched = [*clients.values()]
    watch_until(watched, lambda: all(client.is_ready for client in watched))
    for i in range(count):
        numbers = [len(client.gaps) for client in watched]
        planted = []
        with ExitStack() as halts:
            for kind, (halted, _) in HALTS.items():
                try:
                    halts.enter_context(halted(clients[kind]))
                    planted.append(kind)
                except OSError as error:
                    print(f"{kind} cannot be planted: {error}")
            watch_for(watched, 1.7 + i / 50)
        watch_until(
            watched,
            lambda n=numbers, p=planted: all(  # type: ignore[misc]
                has_gap(client, number, LEAST_NS)
                for (kind, client), number in zip(clients.items(), n, strict=True)
                if kind in p
            ),
        )
        watch_for(watched, 0.5)
        for kind in planted:
            report.add(Plant("native", kind, HALTS[kind][1]), clients[kind], LEAST_NS)
    report.check(count)


@pytest.mark.parametrize("count", COUNTS)
def test_detector_stopped_together_with_its_target_reports_no_hang(
    programs: Programs, started: Keep, count: int
) -> None:
    """As in a debugger, a paused virtual machine or a batch system: no beat is missing, since no time was counted."""
    beside, inside = started(programs.start("native")), started(programs.start("inside"))
    both = [beside, inside]
    watch_until(both, lambda: all(client.is_ready for client in both))
    for i in range(count):
        for client in both:
            client.process.send_signal(signal.SIGSTOP)
        time.sleep(1.6)  # this process does not look meanwhile
        for client in both:
            client.process.send_signal(signal.SIGCONT)
        watch_for(both, 0.7)
        watch_until(both, lambda i=i: all(len(client.gaps) > i for client in both))  # type: ignore[misc]
    assert [client.hangs for client in both] == [{}, {}]


@pytest.mark.parametrize("seconds", [5, pytest.param(60, id="torture", marks=pytest.mark.torture)])
def test_detector_at_a_loop_that_beats_under_load_reports_no_hang(
    programs: Programs, started: Keep, seconds: int
) -> None:
    """Beside three programs that take all CPUs. A gap of more than the limit would be a hang, and has to be one."""
    clients = [started(programs.start("native")) for _ in range(3)] + [started(programs.start("inside"))]
    with hogs(3, os.sched_getaffinity(0)):
        watch_for(clients, seconds)
    for client in clients:
        assert len(client.hangs) <= sum(gap.length_ns > 1e9 for gap in client.gaps), (client.hangs, client.gaps)


def test_detector_at_a_thread_that_ended_reports_no_hang(
    programs: Programs, started: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    """The heartbeat of a thread that ended without a close is silent, with that reason, and one warning."""
    client = started(programs.start("native"))
    watch_until([client], lambda: client.is_ready)
    client.order("end", 0)
    watch_until([client], lambda: client.detector.statuses[0].state == "silent")
    watch_for([client], 1)
    status = client.detector.statuses[0]
    assert (status.state, status.cause, status.detail) == ("silent", None, "its thread has ended")
    assert client.hangs == {}
    assert len([record for record in caplog.records if "has ended" in record.getMessage()]) == 1
