"""Looks at single threads of Linux: of living programs, and of files as other kernels write them."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

from support.target import Target
from vitalsd.sources.base import ThreadLook
from vitalsd.sources.linux.procfs import MalformedError
from vitalsd.sources.linux.source import LinuxSource
from vitalsd.sources.linux.thread_look import MAX_KEPT, ThreadLooks, wait_channel

MS = 1_000_000
STAT = "7 (a) b) {} 1 1 1 0 -1 4194304 10 0 33 0 2 3 0 0 20 0 1 0 500 1000 430 18446744073709551615 1 1 0 0 0 0 0 0\n"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"0", None),
        (b"", None),
        (b"do_epoll_wait", "epoll"),
        (b"ep_poll", "epoll"),
        (b"poll_schedule_timeout.constprop.0", "poll"),
        (b"do_select.isra.12", "select"),
        (b"futex_wait_queue_me", "futex"),
        (b"futex_do_wait", "futex"),
        (b"__refrigerator", "frozen"),
        (b"get_signal", "frozen"),
        (b"do_freezer_trap", "frozen"),
        (b"anon_pipe_read\n", "anon_pipe_read"),
        (b"x" * 200, "x" * 64),
        (b"\x1b[31m", None),
    ],
)
def test_wait_channel_has_one_name_on_all_kernels(content: bytes, name: str | None) -> None:
    """Suffixes of the compiler are cut; a function that the table does not have keeps its name."""
    assert wait_channel(content) == name


class Task:
    """A directory as ``/proc/<pid>/task``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def write(self, tid: int, schedstat: str | None, state: str, wchan: str = "0") -> None:
        thread = self._path / str(tid)
        thread.mkdir(exist_ok=True)
        if schedstat is not None:
            (thread / "schedstat").write_text(schedstat)
        (thread / "stat").write_text(STAT.format(state))
        (thread / "wchan").write_text(wchan)


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Task]:
    made = Task(tmp_path)
    yield made
    os.close(made.fd)


def test_look_has_counters_state_and_channel(task: Task) -> None:
    """Of schedstat, stat and wchan; one that is not close has only the counters."""
    task.write(7, "100 20 3\n", "S", "futex_wait_queue")
    looks = ThreadLooks(task.fd)
    look = looks.look_at(7, closely=True)
    assert look is not None
    assert look[1:] == (100, 20, 3, "sleeping", 33, "futex")
    light = looks.look_at(7, closely=False)
    assert light is not None
    assert light[1:] == (100, 20, 3, None, None, None)
    looks.close()


@pytest.mark.parametrize("schedstat", [None, "0 0 0\n"])
def test_look_on_a_kernel_without_run_times_has_ticks_and_no_wait(task: Task, schedstat: str | None) -> None:
    """The CPU time in stat has a step of 10 ms; wait and slices are unknown, not 0."""
    task.write(7, schedstat, "S")
    looks = ThreadLooks(task.fd)
    for closely in (True, False):
        look = looks.look_at(7, closely=closely)
        assert look is not None
        assert (look.cpu_ns, look.wait_ns, look.slices) == (50 * MS, None, None)
    looks.close()


@pytest.mark.parametrize("state", "ZX")
def test_look_at_a_dead_thread_is_none(task: Task, state: str) -> None:
    """A main thread that has ended before the others is a zombie."""
    task.write(7, "100 20 3\n", state)
    assert ThreadLooks(task.fd).look_at(7, closely=True) is None
    assert ThreadLooks(task.fd).look_at(8, closely=True) is None


def test_look_at_unreadable_content_raises(task: Task) -> None:
    """It quotes what no kernel writes."""
    task.write(7, "100 x 3\n", "S")
    with pytest.raises(MalformedError, match="schedstat"):
        ThreadLooks(task.fd).look_at(7, closely=True)


def test_looks_at_many_threads_keep_few_descriptors(task: Task) -> None:
    """The oldest is closed, and opened again when it is needed."""
    looks = ThreadLooks(task.fd)
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        for tid in range(1, 3 * MAX_KEPT):
            task.write(tid, f"{tid} 0 1\n", "S")
            look = looks.look_at(tid, closely=False)
            assert look is not None
            assert look.cpu_ns == tid
    assert len(os.listdir("/dev/fd")) == before + MAX_KEPT
    looks.close()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.live
def test_look_at_a_thread_of_this_process_names_where_it_sleeps() -> None:
    """In a lock, a socket and a sleep."""
    one, other = socket.socketpair()
    lock = threading.Lock()
    lock.acquire()
    ends = threading.Event()
    waits: dict[str, Callable[[], object]] = {
        "futex": lock.acquire,
        "unix_stream_read_generic": lambda: other.recv(1),
        "hrtimer_nanosleep": lambda: time.sleep(30) if not ends.is_set() else None,
    }
    source = LinuxSource()
    for channel, wait in waits.items():
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert thread.native_id is not None
        eventually(partial(sleeps_in, source, thread.native_id, channel))
        assert look(source, thread.native_id).state == "sleeping"
    lock.release()
    one.send(b"x")
    source.close()
    one.close()
    other.close()


@pytest.mark.live
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")
def test_look_of_another_user_shows_no_wait_channel_but_the_counters() -> None:
    """The kernel writes 0 for a thread that sleeps: that is unknown, and not a thread that runs."""
    with Target("--idle", "1") as target:
        source = LinuxSource(target.pid)
        eventually(lambda: look(source, target.pid).wait_channel is not None)
        source.close()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgid(65534)
                os.setuid(65534)
                found = look(LinuxSource(target.pid), target.pid)
                os.write(writer, json.dumps(found).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            found = ThreadLook(*json.loads(pipe.read()))
        os.waitpid(child, 0)
    assert (found.state, found.wait_channel) == ("sleeping", None)
    assert found.cpu_ns > 0
    assert found.slices is not None


def sleeps_in(source: LinuxSource, tid: int, channel: str) -> bool:
    return look(source, tid).wait_channel == channel


def look(source: LinuxSource, tid: int) -> ThreadLook:
    """A close look at a living thread."""
    found = source.look_at(tid)
    assert found is not None
    return found


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
