"""Hot-first: what is proved without being read is what reading would have found, always."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from target import Target
from vitalsd.sources.linux_counters import SchedstatFiles
from vitalsd.sources.linux_threads import ThreadTable
from vitalsd.sources.procfs import parse_run_times

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Tree:
    """A ``task/`` directory of files, as a kernel would fill it, and the clock that goes with it."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        self.run_ns: dict[int, int] = {}
        self.exited_ns = 12_345
        for tid in range(1, threads + 1):
            self.born(tid)

    def born(self, tid: int) -> None:
        directory = self.root / str(tid)
        directory.mkdir()
        (directory / "stat").write_text(f"{tid} (thread {tid}) S 1 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 {tid} 1 1 1\n")
        (directory / "comm").write_text(f"thread {tid}\n")
        self.run_ns[tid] = 0
        self.burn(tid, 1000)

    def burn(self, tid: int, ns: int) -> None:
        self.run_ns[tid] += ns
        (self.root / str(tid) / "schedstat").write_text(f"{self.run_ns[tid]} 0 1\n")

    def exit(self, tid: int) -> None:
        self.exited_ns += self.run_ns.pop(tid) + 1
        shutil.rmtree(self.root / str(tid))

    def clock(self) -> int:
        return sum(self.run_ns.values()) + self.exited_ns


STEPS = st.lists(
    st.tuples(st.sampled_from(["burn", "burn", "burn", "same", "born", "exit", "ghost"]), st.integers(0, 2**32)),
    max_size=40,
)


@settings(max_examples=60)
@given(st.integers(9, 40), STEPS, st.booleans())
def test_what_is_proved_is_true(
    tmp_path_factory: pytest.TempPathFactory, threads: int, steps: list[tuple[str, int]], few: bool
) -> None:
    """Whoever runs, is born or exits between two readings: an accepted reading has every value right."""
    tree = Tree(tmp_path_factory.mktemp("task"), threads)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadTable(task_fd, SchedstatFiles(task_fd, 1000))
    try:
        for kind, number in steps:
            tids = sorted(tree.run_ns)
            tid = tids[number % (2 if few else len(tids))]
            if kind == "burn":
                tree.burn(tid, 1 + number)
            elif kind == "born":
                tree.born(max(tids) + 1)
            elif kind == "exit" and len(tids) > 9:
                tree.exit(tid)
            elif kind == "ghost":  # born and gone between two readings: only the clock knows
                tree.exited_ns += number
            proved = table.read_proved(tree.clock)
            if proved is None:
                assert table.read() == [tree.run_ns[tid] for tid in sorted(tree.run_ns)]
                table.calibrate(tree.clock(), tree.exited_ns)
            else:
                assert dict(zip(table.tids, proved[0], strict=True)) == tree.run_ns
                assert proved[1:] == (tree.clock(), tree.exited_ns)
    finally:
        table.close()
        os.close(task_fd)


def test_a_few_hot_threads_are_proved_and_many_are_read(tmp_path: Path) -> None:
    """With one thread of forty running, nearly every reading is proved; with all running, none is tried for long."""
    tree = Tree(tmp_path, 40)
    task_fd = os.open(tree.root, os.O_RDONLY)
    table = ThreadTable(task_fd, SchedstatFiles(task_fd, 1000))

    def readings(count: int, who: Callable[[int], int]) -> int:
        before = table.proved
        for number in range(count):
            tree.burn(1 + who(number) % 40, 1000)
            if table.read_proved(tree.clock) is None:
                table.read()
                table.calibrate(tree.clock(), tree.exited_ns)
        return table.proved - before

    assert readings(50, lambda _: 3) >= 47
    assert readings(400, lambda number: number * 7) <= 40
    assert readings(50, lambda _: 5) >= 20
    table.close()
    os.close(task_fd)


@linux_only
@pytest.mark.live
def test_thousands_of_proved_readings_equal_full_ones(start: Callable[..., Target]) -> None:
    """
    On a living process, threads being born and exiting meanwhile, every proved reading equals a full
    reading taken while the process clock stood still.
    """
    target = start("--burn", "10", "5", "--idle", "120")
    clock_id = (~target.pid << 3) | 2

    def clock() -> int:
        return time.clock_gettime_ns(clock_id)

    task_fd = os.open(f"/proc/{target.pid}/task", os.O_RDONLY)
    table = ThreadTable(task_fd, SchedstatFiles(task_fd, 1000))
    checked = 0
    target.tell("churn_for 3 20")
    deadline = time.monotonic() + 60
    while checked < 1500 and time.monotonic() < deadline:
        proved = table.read_proved(clock)
        if proved is None:
            before = clock()
            living_ns = sum(table.read())
            after = clock()
            if before == after:
                table.calibrate(after, after - living_ns)
            continue
        times, total_ns, _ = proved
        try:
            full = parse_run_times(
                [Path(f"/proc/{target.pid}/task/{tid}/schedstat").read_bytes() for tid in table.tids]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if clock() == total_ns:
            assert list(times) == full
            checked += 1
        time.sleep(0.0005)
    table.close()
    os.close(task_fd)
    assert checked == 1500
