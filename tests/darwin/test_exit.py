"""How a process of macOS ended: what is made of the kernel's note. Real ones are in `test_mac`."""

import errno
import select
import signal
from typing import Any, NamedTuple

import pytest

from darwin.simulator import Simulator
from vitalsd.sources import Ending, TargetGone
from vitalsd.sources.darwin_exit import NOTE_EXITSTATUS, ExitNote
from vitalsd.sources.libproc import LibprocSource
from workload import ChildWorkload

NOTE_EXIT = 0x80000000


class Event(NamedTuple):
    """One of kqueue(2)."""

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int = 0


class Queue:
    """As filt_procattach and filt_procevent have it: refused at once, or one note when the process exits."""

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
    ("status", "ending"),
    [
        (0, Ending(True, "exit status 0")),
        (3 << 8, Ending(False, "exit status 3")),
        (int(signal.SIGTERM), Ending(True, "killed by SIGTERM")),
        (int(signal.SIGSEGV) | 0x80, Ending(False, "killed by SIGSEGV")),
    ],
)
def test_the_note_is_a_status_of_wait(queues: list[Queue], status: int, ending: Ending) -> None:
    """It is asked for with the exit, told once, and the queue is given back."""
    note = ExitNote(4242)
    assert queues[0].registered == Event(4242, -5, 1, NOTE_EXIT | NOTE_EXITSTATUS)
    note.drop_if_fired()
    assert note.ending() is None
    queues[0].exits(status)
    assert note.ending() == ending
    note.close()
    note.close()
    assert queues[0].closed


@pytest.mark.parametrize("refusal", [errno.ESRCH, errno.EACCES])
def test_without_a_note_nothing_is_known(queues: list[Queue], refusal: int) -> None:
    """The process is gone, or this user may not kill it: no ending, no descriptor."""
    Queue.refusal = refusal
    note = ExitNote(4242)
    assert queues[0].closed
    note.drop_if_fired()
    assert note.ending() is None
    note.close()


def test_the_exit_of_an_earlier_process_of_the_pid_is_not_told(queues: list[Queue]) -> None:
    """One that ended while the source was being opened."""
    note = ExitNote(4242)
    queues[0].exits(11)
    note.drop_if_fired()
    assert queues[0].closed
    assert note.ending() is None


def test_the_source_tells_it_with_the_end(queues: list[Queue], simulator: Simulator, child: ChildWorkload) -> None:
    """Each time it is asked from then on; closing the source gives the queue back."""
    source = LibprocSource(child.pid, lib=simulator.lib)
    source.snapshot()
    simulator.reuse_pid(child.pid)
    queues[0].exits(int(signal.SIGTERM))
    for _ in range(2):
        with pytest.raises(TargetGone) as gone:
            source.snapshot()
        assert gone.value.ending == Ending(True, "killed by SIGTERM")
    assert not queues[0].closed
    source.close()
    assert queues[0].closed
