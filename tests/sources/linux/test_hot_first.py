"""Hot-first: what is proved without being read is what reading would have found, always."""

import errno
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from operator import le
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.target import Target
from vitalsd.sources.linux.cpu_counters import CommFiles, Reading, SchedstatFiles
from vitalsd.sources.linux.procfs import parse_schedstats
from vitalsd.sources.linux.thread_times import COUNT_EVERY_NS, ThreadTimes
from vitalsd.sources.linux.threads import ThreadList

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Tree:
    """A ``task/`` directory of files, as a kernel would fill it, and the clock that goes with it."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        self.run_ns: dict[int, int] = {}
        self.wait_ns: dict[int, int] = {}
        self.waited_ns = 0
        self.names: dict[int, str] = {}
        self.exited_ns = 12_345
        for tid in range(1, threads + 1):
            self.born(tid)

    def born(self, tid: int, ns: int = 1000) -> None:
        (self.root / str(tid)).mkdir()
        self.run_ns[tid] = self.wait_ns[tid] = 0
        self.burn(tid, ns)
        self.call(tid, f"thread {tid}")

    def call(self, tid: int, name: str) -> None:
        directory = self.root / str(tid)
        (directory / "stat").write_text(f"{tid} ({name}) S 1 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 {tid} 1 1 1\n")
        (directory / "comm").write_text(f"{name}\n")
        self.names[tid] = name

    def burn(self, tid: int, ns: int) -> None:
        self.run_ns[tid] += ns
        self.wait(tid, ns // 3)

    def wait(self, tid: int, ns: int) -> None:
        self.wait_ns[tid] += ns
        self.waited_ns += ns
        (self.root / str(tid) / "schedstat").write_text(f"{self.run_ns[tid]} {self.wait_ns[tid]} 1\n")

    def exit(self, tid: int) -> None:
        self.exited_ns += self.run_ns.pop(tid) + 1
        del self.names[tid], self.wait_ns[tid]
        shutil.rmtree(self.root / str(tid))

    def clock(self) -> int:
        return sum(self.run_ns.values()) + self.exited_ns


class BoundFiles(SchedstatFiles):
    """Its files answer no more once their thread is gone, as those of a kernel."""

    def read(self, handles: Collection[int]) -> list[Reading]:
        if not all(os.fstat(handle).st_nlink for handle in handles if handle >= 0):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return super().read(handles)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["burn", "burn", "burn", "same", "born", "exit", "ghost", "rename"]), st.integers(0, 2**32)
    ),
    max_size=40,
)


def taken(tree: Tree, steps: list[tuple[str, int]], *, few: bool) -> Iterator[None]:
    """Do the steps to the tree, one by one."""
    for kind, number in steps:
        tids = sorted(tree.run_ns)
        tid = tids[number % (2 if few else len(tids))]
        if kind == "burn":
            tree.burn(tid, 1 + number)
        elif kind == "rename":
            tree.burn(tid, 1)
            tree.call(tid, f"name {number}")
        elif kind == "born":
            tree.born(max(tids) + 1)
        elif kind == "exit" and len(tids) > 9:
            tree.exit(tid)
        elif kind == "ghost":  # born and gone between two readings: only the clock knows
            tree.exited_ns += number
        yield


@settings(max_examples=60)
@given(st.integers(9, 40), STEPS, st.booleans())
def test_hot_first_accepted_reading_is_exact(
    tmp_path_factory: pytest.TempPathFactory, threads: int, steps: list[tuple[str, int]], few: bool
) -> None:
    """Whichever threads run, start or exit between two readings, each value of an accepted reading is right."""
    tree = Tree(tmp_path_factory.mktemp("task"), threads)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadList(task_fd, SchedstatFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)
    try:
        for _ in taken(tree, steps, few=few):
            proved = times.read_hot(tree.clock(), tree.clock)
            if proved is None:
                assert times.read(tree.clock) == ([tree.run_ns[tid] for tid in sorted(tree.run_ns)], tree.clock())
                times.set_exited_total(tree.clock(), tree.exited_ns)
            else:
                assert dict(zip(table.roster.tids, proved[0], strict=True)) == tree.run_ns
                assert proved[1:] == (tree.clock(), tree.exited_ns)
            assert times.wait_ns == [tree.wait_ns[tid] for tid in sorted(tree.run_ns)]
    finally:
        table.close()
        os.close(task_fd)


@settings(max_examples=60)
@given(st.integers(1, 40), st.lists(STEPS, max_size=20), st.data())
def test_hot_first_reading_equals_a_full_reading(
    tmp_path_factory: pytest.TempPathFactory, threads: int, between: list[list[tuple[str, int]]], data: st.DataObject
) -> None:
    """
    However many run, name themselves, come and go between two readings, proved or full.

    Times, waits, their sums and names are those of the files, and no list that was handed out changes afterwards.
    """
    tree = Tree(tmp_path_factory.mktemp("task"), threads)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadList(task_fd, BoundFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)
    handed_out = []
    begun_ns, last_ns = tree.waited_ns, 0
    try:
        for number, steps in enumerate(between, 1):
            deque(taken(tree, steps, few=False), maxlen=0)
            proved = times.read_hot(tree.clock(), tree.clock) if data.draw(st.booleans()) else None
            cpu_ns = proved[0] if proved else times.read(tree.clock)[0]
            assert times.wait_ns is not None
            times.set_exited_total(tree.clock(), tree.exited_ns)
            handed_out += [(cpu_ns, list(cpu_ns)), (times.wait_ns, list(times.wait_ns))]
            assert dict(zip(table.roster.tids, times.wait_ns, strict=True)) == tree.wait_ns
            # It lacks what threads waited between their last reading and their exit.
            assert last_ns <= times.waited_ns <= tree.waited_ns - begun_ns
            last_ns = times.waited_ns
            if not any(kind in ("exit", "ghost") for steps in between[:number] for kind, _ in steps):
                assert times.waited_ns == tree.waited_ns - begun_ns
            assert dict(zip(table.roster.tids, cpu_ns, strict=True)) == tree.run_ns
            assert times.living_ns == sum(cpu_ns)
            assert times.refresh_list(number * COUNT_EVERY_NS, names=True)
            assert dict(zip(table.roster.tids, table.roster.names, strict=True)) == tree.names
    finally:
        table.close()
        os.close(task_fd)
    assert all(list_ == as_it_was for list_, as_it_was in handed_out)


def test_hot_first_with_few_busy_threads_accepts_nearly_all_readings(tmp_path: Path) -> None:
    """With one running thread of forty nearly every reading is proved; with all running, few are tried."""
    tree = Tree(tmp_path, 40)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadList(task_fd, SchedstatFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)

    def readings(count: int, index: Callable[[int], int]) -> int:
        before = times.proved
        for number in range(count):
            tree.burn(1 + index(number) % 40, 1000)
            if times.read_hot(tree.clock(), tree.clock) is None:
                times.read(tree.clock)
                times.set_exited_total(tree.clock(), tree.exited_ns)
        return times.proved - before

    assert readings(50, lambda _: 3) >= 47
    assert readings(400, lambda number: number * 7) <= 40
    assert readings(50, lambda _: 5) >= 20
    table.close()
    os.close(task_fd)


def test_hot_first_finds_a_thread_that_never_ran_within_a_second(tmp_path: Path) -> None:
    """A thread that was created and has not run for a nanosecond is missing for a second at most."""
    tree = Tree(tmp_path, 40)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadList(task_fd, SchedstatFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)
    tree.burn(3, 1000)
    times.read(tree.clock)
    times.set_exited_total(tree.clock(), tree.exited_ns)
    assert times.refresh_list(COUNT_EVERY_NS, names=True)
    tree.born(41, 0)
    tree.burn(3, 1000)
    assert times.read_hot(tree.clock(), tree.clock) is not None
    assert times.refresh_list(2 * COUNT_EVERY_NS - 1, names=True)
    assert not times.refresh_list(2 * COUNT_EVERY_NS, names=True)
    assert times.read_hot(tree.clock(), tree.clock) is None
    assert len(times.read(tree.clock)[0]) == 41
    assert times.refresh_list(3 * COUNT_EVERY_NS, names=True)
    table.close()
    os.close(task_fd)


@pytest.mark.parametrize("reached", range(12))
def test_hot_first_listing_that_fails_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: int
) -> None:
    """A listing that fails midway leaves no descriptor open, and the next reading finds all threads."""
    tree = Tree(tmp_path, 6)
    task_fd = os.open(tree.root, os.O_RDONLY)
    held = len(os.listdir("/proc/self/fd"))
    calls = iter(range(100))
    real = os.open

    def scarce(path: str, flags: int, **options: int) -> int:
        if next(calls) >= reached:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, **options)

    monkeypatch.setattr("vitalsd.sources.linux.cpu_counters.os.open", scarce)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        ThreadList(task_fd, BoundFiles(task_fd, 1000), CommFiles(task_fd, 100))
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == held

    table = ThreadList(task_fd, BoundFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)
    for tid in (2, 5):
        tree.exit(tid)
    for tid in range(1, 13):
        if tid in tree.run_ns:
            tree.burn(tid, 10)
        else:
            tree.born(tid)
    calls = iter(range(100))
    monkeypatch.setattr("vitalsd.sources.linux.cpu_counters.os.open", scarce)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        times.read(tree.clock)
    monkeypatch.undo()
    cpu_ns, _ = times.read(tree.clock)
    assert dict(zip(table.roster.tids, cpu_ns, strict=True)) == tree.run_ns
    assert dict(zip(table.roster.tids, table.roster.names, strict=True)) == tree.names
    table.close()
    assert len(os.listdir("/proc/self/fd")) == held
    os.close(task_fd)


def test_hot_first_with_new_threads_still_reads_names(tmp_path: Path) -> None:
    """Although a new thread is found each second, a name set by another thread is read at once."""
    tree = Tree(tmp_path, 40)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadList(task_fd, SchedstatFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)
    times.read(tree.clock)
    assert times.refresh_list(COUNT_EVERY_NS, names=True)
    tree.call(20, "renamed")
    for second in range(2, 12):
        tree.born(100 + second, 0)
        if not times.refresh_list(second * COUNT_EVERY_NS, names=True):
            times.read(tree.clock)
            assert times.refresh_list(second * COUNT_EVERY_NS, names=True)
    assert table.roster.names[19] == "renamed"
    assert len(table.roster) == 40 + 10
    table.close()
    os.close(task_fd)


@linux_only
@pytest.mark.live
@pytest.mark.parametrize(
    "readings", [pytest.param(500, id="quick"), pytest.param(5000, id="torture", marks=pytest.mark.torture)]
)
def test_proved_readings_equal_full_ones(start: Callable[..., Target], readings: int) -> None:
    """
    The process is real, and its threads start and exit meanwhile.

    Every proved reading equals a full reading taken while the process clock stood still. A wait may be missing: the
    kernel adds it, without a thread running, when it moves a waiting thread.
    """
    target = start("--burn", "10", "5", "--idle", "120")
    clock_id = (~target.pid << 3) | 2

    def clock() -> int:
        return time.clock_gettime_ns(clock_id)

    task_fd = os.open(f"/proc/{target.pid}/task", os.O_RDONLY)
    table = ThreadList(task_fd, SchedstatFiles(task_fd, 1000), CommFiles(task_fd, 100))
    times = ThreadTimes(table)
    checked = equal = 0
    target.tell(f"churn_for {readings // 500 + 1} 20")
    deadline = time.monotonic() + readings / 10
    while checked < readings and time.monotonic() < deadline:
        proved = times.read_hot(clock(), clock)
        if proved is None:
            before = clock()
            cpu_ns, after = times.read(clock)
            living_ns = sum(cpu_ns)
            if before == after:
                times.set_exited_total(after, after - living_ns)
            continue
        cpu_ns, total_ns, _ = proved
        try:
            full, waits = parse_schedstats(
                [Path(f"/proc/{target.pid}/task/{tid}/schedstat").read_bytes() for tid in table.roster.tids]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if clock() == total_ns:
            assert list(cpu_ns) == full
            assert times.wait_ns is not None
            assert all(map(le, times.wait_ns, waits))
            equal += times.wait_ns == waits
            checked += 1
        time.sleep(0.0005)
    table.close()
    os.close(task_fd)
    assert checked == readings
    assert equal > checked / 2
