"""The search for new processes, over files that a test writes, and the kernel's last id."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitalsd.sources.linux.process_scan import LOOKED_UP_AGAIN, LOOKUPS_PER_PROCESS, SCAN_EVERY_NS, ProcessScan
from vitalsd.sources.linux.system_text import parse_last_pid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Procfs:
    """A procfs of files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def create(self, pid: int, parent: int = 1) -> None:
        """Let a process appear."""
        (self.path / str(pid)).mkdir()
        fields = " ".join(["0"] * 30)
        (self.path / str(pid) / "stat").write_text(f"{pid} (made) S {parent} {fields}\n", encoding="ascii")

    def give(self, pid: int) -> None:
        """Let the kernel have given that id last."""
        (self.path / "loadavg").write_text(f"0.00 0.00 0.00 1/2 {pid}\n", encoding="ascii")


@pytest.fixture
def procfs(tmp_path: Path) -> Iterator[Procfs]:
    procfs = Procfs(tmp_path)
    for pid in (1, 40):
        procfs.create(pid)
    procfs.give(40)
    yield procfs
    os.close(procfs.descriptor)


Look = Callable[..., list[int]]


@pytest.fixture
def look(procfs: Procfs) -> Look:
    """Look for processes, for the first time at the time 0."""
    scan = ProcessScan(procfs.descriptor, is_own_namespace=True)

    def look(now_ns: int = 1, known: tuple[int, ...] = ()) -> list[int]:
        return sorted(scan.look(now_ns, known, closely=False))

    assert look(0) == [1, 40]
    return look


def test_scan_without_a_new_id_looks_up_nothing(procfs: Procfs, look: Look) -> None:
    """The last id stays as long as no process is created; a look at all processes finds what was hidden by that."""
    procfs.create(41)
    assert [look(), look(SCAN_EVERY_NS - 1)] == [[], []]
    assert look(SCAN_EVERY_NS) == [1, 40, 41]


def test_scan_with_new_ids_looks_up_those(procfs: Procfs, look: Look) -> None:
    """Without those that are known, and those that have ended."""
    for pid in (41, 43, 44, 45):
        procfs.create(pid)
    procfs.give(44)
    assert look(1, (43,)) == [41, 44]
    assert look() == []


def test_scan_looks_up_an_id_that_was_not_there_once_more(procfs: Procfs, look: Look) -> None:
    """The kernel gives an id before it shows the process."""
    procfs.give(42)
    assert look() == []
    procfs.create(41)
    assert look() == [41]
    procfs.create(42)
    assert look() == []


def test_scan_of_all_processes_looks_up_the_newest_ids_once_more(procfs: Procfs, look: Look) -> None:
    """One that the listing did not have yet is found by the next look."""
    procfs.give(45)
    assert look(SCAN_EVERY_NS) == [1, 40]
    procfs.create(45)
    procfs.create(45 - LOOKED_UP_AGAIN + 62)
    assert look(SCAN_EVERY_NS + 1) == [43, 45]


@pytest.mark.parametrize("newest", [40 + 2 * LOOKUPS_PER_PROCESS + 1, 39, 2])
def test_scan_after_many_ids_or_a_new_round_looks_at_all(procfs: Procfs, look: Look, newest: int) -> None:
    """Ids begin anew after the highest one."""
    procfs.create(30)
    procfs.give(newest)
    assert look() == [1, 30, 40]
    assert look() == []


@pytest.mark.parametrize("content", ["", "x\n", None])
def test_scan_without_the_last_id_looks_at_all_on_request_and_at_times(procfs: Procfs, content: str | None) -> None:
    """As in another pid namespace, where that id is not of this procfs."""
    if content is None:
        scan = ProcessScan(procfs.descriptor, is_own_namespace=False)
    else:
        (procfs.path / "loadavg").write_text(content, encoding="ascii")
        scan = ProcessScan(procfs.descriptor, is_own_namespace=True)
    assert len(scan.look(0, (), closely=False)) == 2
    assert len(scan.look(1, (), closely=False)) == 0
    assert len(scan.look(1, (), closely=True)) == 2
    assert len(scan.look(SCAN_EVERY_NS, (), closely=False)) == 0
    assert len(scan.look(SCAN_EVERY_NS + 1, (), closely=False)) == 2


def test_last_id_of_the_kernel_is_that_of_a_new_process_or_thread() -> None:
    """Other programs may have got higher ones since, or the ids have begun anew."""

    def newest() -> int:
        return parse_last_pid(Path("/proc/loadavg").read_bytes()) or 0

    for _ in range(20):
        before = newest()
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        tid, between = thread.native_id or 0, newest()
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        if before < tid < pid:
            assert tid <= between < pid <= newest()
            return
    pytest.fail("the ids never ascended")
