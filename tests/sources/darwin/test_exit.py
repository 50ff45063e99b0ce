"""How a process of macOS ended: what is made of the kernel's note. Real ones are in `test_mac`."""

import errno
import os
import select
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.as_darwin.emulation import TEARDOWN_MS, Kevent, Kqueue
from support.darwin.simulator import Simulator
from support.sidecars import eventually
from support.workload import ChildWorkload
from vitalsd.snapshot import Part
from vitalsd.sources.base import ExitStatus, SourceError, TargetGoneError
from vitalsd.sources.darwin import libproc_source as libproc
from vitalsd.sources.darwin.exit_status import NOTE_EXITSTATUS, ExitWatch
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.linux.procfs import parse_stat

NOTE_EXIT = 0x80000000


class Event(NamedTuple):
    """One of kqueue(2)."""

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int = 0


class Queue:
    """A queue that is refused at once, or gets one note when the test lets the process exit (filt_procattach)."""

    refusal: int | None = None
    made: "list[Queue]" = []  # noqa: RUF012 - reset by each test

    def __init__(self) -> None:
        self.registered: Event | None = None
        self.note: Event | None = None
        self.closed = False
        Queue.made.append(self)

    def control(self, changes: list[Event] | None, most: int, timeout: float | None = None) -> list[Event]:
        if changes:
            if self.refusal is not None:
                raise OSError(self.refusal, "refused")
            (self.registered,) = changes
        note, self.note = (self.note, None) if most else (None, self.note)
        return [note] if note else []

    def exits(self, status: int) -> None:
        assert self.registered is not None
        self.note = self.registered._replace(data=status)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> list[Queue]:
    Queue.made, Queue.refusal = [], None
    names: dict[str, Any] = {"kqueue": Queue, "kevent": Event}
    numbers = {"KQ_FILTER_PROC": -5, "KQ_EV_ADD": 1, "KQ_NOTE_EXIT": NOTE_EXIT}
    for name, value in (names | numbers).items():
        monkeypatch.setattr(select, name, value, raising=False)
    return Queue.made


@pytest.mark.parametrize(
    ("status", "exit_status"),
    [
        (0, ExitStatus(True, "exit status 0")),
        (3 << 8, ExitStatus(False, "exit status 3")),
        (int(signal.SIGTERM), ExitStatus(True, "killed by SIGTERM")),
        (int(signal.SIGSEGV) | 0x80, ExitStatus(False, "killed by SIGSEGV")),
    ],
)
def test_exit_note_is_the_status_of_wait_and_closes_the_queue(
    queues: list[Queue], status: int, exit_status: ExitStatus
) -> None:
    """The watch requests the status with the exit, returns it once, and closes its queue."""
    note = ExitWatch(4242)
    assert queues[0].registered == Event(4242, -5, 1, NOTE_EXIT | NOTE_EXITSTATUS)
    note.drop_if_fired()
    assert note.exit_status(0) is None
    queues[0].exits(status)
    assert note.exit_status(0) == exit_status
    note.close()
    note.close()
    assert queues[0].closed


@pytest.mark.parametrize("refusal", [errno.ESRCH, errno.EACCES])
def test_exit_watch_refused_leaves_the_status_unknown(queues: list[Queue], refusal: int) -> None:
    """The process is gone, or this user may not kill it: no exit status, no descriptor."""
    Queue.refusal = refusal
    note = ExitWatch(4242)
    assert queues[0].closed
    note.drop_if_fired()
    assert note.exit_status(0) is None
    note.close()


def test_exit_of_an_earlier_process_of_the_pid_is_ignored(queues: list[Queue]) -> None:
    """One that ended while the source was being opened."""
    note = ExitWatch(4242)
    queues[0].exits(11)
    note.drop_if_fired()
    assert queues[0].closed
    assert note.exit_status(0) is None


def test_source_after_the_exit_reports_the_status_each_time(
    queues: list[Queue], simulator: Simulator, child: ChildWorkload
) -> None:
    """Each time it is asked from then on; closing the source gives the queue back."""
    source = LibprocSource(child.pid, lib=simulator.lib)
    source.snapshot()
    simulator.reuse_pid(child.pid)
    queues[0].exits(int(signal.SIGTERM))
    for _ in range(2):
        with pytest.raises(TargetGoneError) as gone:
            source.snapshot()
        assert gone.value.exit_status == ExitStatus(True, "killed by SIGTERM")
    assert not queues[0].closed
    source.close()
    assert queues[0].closed


TEARDOWN_S = 0.6


@pytest.fixture
def slow_exit(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    """Let the kernel take 0.6 s for the teardown of a process, and send real notes of real processes."""
    monkeypatch.setenv(TEARDOWN_MS, str(TEARDOWN_S * 1000))
    # The kernel sends the note before the process is a zombie; here two threads count that time, one of them late.
    simulator.teardown(round((TEARDOWN_S + 0.3) * 1e9))
    for name, value in {"kqueue": Kqueue, "kevent": Kevent}.items():
        monkeypatch.setattr(select, name, value, raising=False)
    for name, number in {"KQ_FILTER_PROC": -5, "KQ_EV_ADD": 1, "KQ_NOTE_EXIT": NOTE_EXIT}.items():
        monkeypatch.setattr(select, name, number, raising=False)


def exits(code: str) -> "subprocess.Popen[bytes]":
    program = f"import os, sys; sys.stdin.readline(); {code}"
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)


def await_state(pid: int, state: str) -> None:
    """Wait until all threads of a process are in a state of Linux."""
    stats = Path(f"/proc/{pid}/task").glob
    eventually(lambda: {parse_stat(stat.read_bytes()).state for stat in stats("*/stat")} == {state})


@pytest.mark.parametrize(
    ("code", "exit_status"),
    [("", ExitStatus(True, "exit status 0")), ("os.kill(os.getpid(), 11)", ExitStatus(False, "killed by SIGSEGV"))],
)
def test_snapshot_during_teardown_waits_for_the_status(
    slow_exit: None, simulator: Simulator, code: str, exit_status: ExitStatus
) -> None:
    """The process is not found for 0.6 s before its note: no snapshot says that the exit status is unknown."""
    with exits(code) as child, closing(LibprocSource(child.pid, lib=simulator.lib)) as source:
        source.snapshot()
        assert child.stdin is not None
        child.stdin.close()
        errors: list[SourceError] = []
        while not (errors and isinstance(errors[-1], TargetGoneError)):
            try:
                source.snapshot()
            except SourceError as error:
                errors.append(error)
        *before, last = errors
        assert isinstance(last, TargetGoneError)
        assert last.exit_status == exit_status
        assert [str(error) for error in before] == [
            f"target {child.pid} is exiting: the kernel still frees its memory and files; ask again"
        ]


def test_snapshot_after_an_endless_teardown_gives_up(
    slow_exit: None, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teardown that takes longer than the limit leaves the exit status unknown."""
    monkeypatch.setattr(libproc, "EXIT_LIMIT_S", 0.1)
    with exits("") as child, closing(LibprocSource(child.pid, lib=simulator.lib)) as source:
        source.snapshot()
        simulator.teardown(60_000_000_000)
        monkeypatch.setattr(Kqueue, "control", lambda *_: [])
        assert child.stdin is not None
        child.stdin.close()
        await_state(child.pid, "Z")
        with pytest.raises(TargetGoneError) as gone:
            source.snapshot()
        assert gone.value.exit_status is None


def test_snapshot_without_a_note_does_not_wait(simulator: Simulator, child: ChildWorkload) -> None:
    """If the kernel refuses the queue, no note can come at the end of the teardown."""
    simulator.teardown(60_000_000_000)
    with closing(LibprocSource(child.pid, lib=simulator.lib)) as source:
        source.snapshot()
        child.kill()
        with pytest.raises(TargetGoneError) as gone:
            source.snapshot()
        assert gone.value.exit_status is None


def test_stopped_process_is_stopped_and_its_threads_wait(simulator: Simulator, child: ChildWorkload) -> None:
    """SIGSTOP is p_stat SSTOP; TH_STATE_STOPPED is of thread_stop alone (osfmk/kern/sched_prim.c)."""
    child.start_thread("render")
    with closing(LibprocSource(child.pid, lib=simulator.lib)) as source:
        os.kill(child.pid, signal.SIGSTOP)
        try:
            await_state(child.pid, "T")
            snapshot = source.snapshot(parts=Part.DETAIL)
        finally:
            os.kill(child.pid, signal.SIGCONT)
        assert snapshot.state == "stopped"
        assert snapshot.thread_figures is not None
        assert set(snapshot.thread_figures.states) == {"waiting"}
        assert source.snapshot().state != "stopped"
