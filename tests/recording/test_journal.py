"""The tail: what was appended is there when its writer is gone, whole or not at all."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recording.test_black_box import write
from support.lives import Process
from support.paths import TESTS
from vitalsd.recording.journal import MAX_BYTES, ORPHAN_S, SHARED_MEMORY, Row, Tail, read_tail, remove_tail, sweep_tails

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a directory of shared memory")

ROWS = [
    Row(1, 1, b"first", None, "I"),
    Row(2, 1, b"", 0, "q"),
    Row(7, 3, bytes(range(256)) * 20, 17, "I"),  # over a page
]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")


@pytest.fixture
def tail(tmp_path: Path) -> Iterator[Tail]:
    tail = Tail(tmp_path / "run.tail", SHARED_MEMORY)
    yield tail
    tail.close()


def test_what_was_appended_is_read(tail: Tail, tmp_path: Path) -> None:
    """All rows, in their order, also after the file was let go; nothing is left behind by `remove_tail`."""
    assert read_tail(tmp_path / "run.tail") == []
    assert all(map(tail.append, ROWS))
    assert read_tail(tmp_path / "run.tail") == ROWS
    tail.close()
    assert read_tail(tmp_path / "run.tail") == ROWS
    target = (tmp_path / "run.tail").readlink()
    assert target.stat().st_mode & 0o777 == 0o600
    remove_tail(tmp_path / "run.tail")
    assert not target.exists()
    assert list(tmp_path.iterdir()) == []


def test_cleared_it_holds_what_came_after(tail: Tail, tmp_path: Path) -> None:
    """What was there before is not read again, be it longer than what came after."""
    for row in ROWS:
        tail.append(row)
    tail.clear()
    assert read_tail(tmp_path / "run.tail") == []
    tail.append(Row(8, 3, b"after", None, "I"))
    assert read_tail(tmp_path / "run.tail") == [Row(8, 3, b"after", None, "I")]


def test_wherever_it_is_cut_the_whole_rows_count(tail: Tail, tmp_path: Path) -> None:
    """A writer killed within a row leaves the rows before it, whether the rest is missing or zeros."""
    ends = []
    for row in ROWS:
        tail.append(row)
        ends.append(tail.size_bytes)
    path = (tmp_path / "run.tail").readlink()
    content = path.read_bytes()
    begin = len(content) - tail.size_bytes
    for cut in range(begin, len(content), 37):
        whole = ROWS[: sum(begin + end <= cut for end in ends)]
        for rest in (b"", bytes(len(content) - cut)):
            path.write_bytes(content[:cut] + rest)
            assert read_tail(tmp_path / "run.tail") == whole


@given(st.binary(max_size=400))
def test_garbage_is_no_row(tail_of: Callable[[bytes], list[Row]], content: bytes) -> None:
    """Whatever is in the file, reading it raises nothing."""
    assert all(row.id > 0 for row in tail_of(content))


@pytest.fixture(scope="module")
def tail_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], list[Row]]:
    link = tmp_path_factory.mktemp("garbage") / "run.tail"
    Tail(link, SHARED_MEMORY).close()
    mark = link.readlink().read_bytes()

    def read(content: bytes) -> list[Row]:
        link.readlink().write_bytes(mark + content)
        return read_tail(link)

    return read


def test_it_has_a_bound(tail: Tail, tmp_path: Path) -> None:
    """A row beyond the bound is refused, and those before it stay."""
    count = 0
    while tail.append(Row(count + 1, 1, bytes(10_000), None, "I")):
        count += 1
    assert MAX_BYTES - 20_000 < count * 10_000 < MAX_BYTES
    assert len(read_tail(tmp_path / "run.tail")) == count


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """64 KiB of memory."""
    path = tmp_path / "memory"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@root_only
def test_full_memory_refuses_and_keeps(tmp_path: Path, memory: Path) -> None:
    """Without room in memory a row is refused, nothing of it stays, and with room again it goes on."""
    ballast = memory / "ballast"
    ballast.write_bytes(bytes(32 << 10))
    tail, count = Tail(tmp_path / "run.tail", memory), 0
    while tail.append(Row(count + 1, 1, bytes(5_000), None, "I")):
        count += 1
    assert 2 <= count <= 6
    assert len(read_tail(tmp_path / "run.tail")) == count
    ballast.unlink()
    assert tail.append(Row(100, 1, b"again", None, "I"))
    assert [row.id for row in read_tail(tmp_path / "run.tail")] == [*range(1, count + 1), 100]
    tail.close()


@root_only
def test_another_users_file_is_not_read(tail: Tail, tmp_path: Path) -> None:
    """The file behind the link has to be of whom the link is."""
    tail.append(ROWS[0])
    os.chown((tmp_path / "run.tail").readlink(), 12345, -1)
    with pytest.raises(PermissionError):
        read_tail(tmp_path / "run.tail")


@root_only
def test_a_directory_on_a_disk_is_no_memory(tmp_path: Path) -> None:
    """Only a tmpfs is taken, not just anything that is mounted; and nothing is left there."""
    memory = tmp_path / "memory"
    memory.mkdir()
    with pytest.raises(NotADirectoryError):
        Tail(tmp_path / "run.tail", memory)
    subprocess.run(["mount", "--bind", str(memory), str(memory)], check=True)
    try:
        with pytest.raises(NotADirectoryError):
            Tail(tmp_path / "run.tail", memory)
    finally:
        subprocess.run(["umount", "-l", str(memory)], check=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["memory"]


@root_only
def test_what_is_in_place_of_the_link(tmp_path: Path, memory: Path) -> None:
    """A tail left by a run that was removed goes, with its memory; a file stays, and no memory is left behind."""
    link = tmp_path / "run.tail"
    old = Tail(link, memory)
    old.append(ROWS[0])
    old.close()
    new = Tail(link, memory)
    assert read_tail(link) == []
    assert list(memory.iterdir()) == [link.readlink()]
    new.remove()
    assert list(memory.iterdir()) == []
    link.write_text("mine")
    with pytest.raises(FileExistsError):
        Tail(link, memory)
    assert link.read_text() == "mine"
    assert list(memory.iterdir()) == []


def test_who_has_lost_its_file_is_told(tail: Tail, tmp_path: Path) -> None:
    """Removed by somebody, the file goes on as memory of the writer alone, until it is cleared."""
    assert tail.append(ROWS[0])
    assert tail.clear()
    (tmp_path / "run.tail").readlink().unlink()
    assert tail.append(ROWS[1])
    assert tail.rows() == [ROWS[1]]
    assert not tail.clear()


def test_closed_it_does_nothing(tail: Tail) -> None:
    """It takes nothing and holds nothing, and raises nothing."""
    tail.append(ROWS[0])
    tail.close()
    assert (tail.append(ROWS[1]), tail.clear(), tail.rows()) == (False, False, [])
    tail.remove()


def test_what_is_not_ours_is_neither_read_nor_removed(tmp_path: Path) -> None:
    """A link to a file that is none, to a directory, to nothing or to itself: no rows, and only the link goes."""
    other = tmp_path / "vitalsd-precious"  # named as the files of tails were
    other.write_bytes(b"precious")
    for target in (other, tmp_path, tmp_path / "nothing", tmp_path / "run.tail", Path("/dev/zero")):
        link = tmp_path / "run.tail"
        link.symlink_to(target)
        with pytest.raises(OSError):  # noqa: PT011 - of many kinds
            read_tail(link)
        remove_tail(link)
        assert not link.is_symlink()
    assert other.read_bytes() == b"precious"


# What is left when a state directory was removed


def aged(link: Path, seconds: float) -> Path:
    """The tail behind a link, last written so long ago."""
    target = link.readlink()
    moment = time.time() - seconds
    os.utime(target, (moment, moment))
    return target


@root_only
def test_sweep_tails_removes_the_tail_of_a_dead_writer_whose_run_is_gone(tmp_path: Path, memory: Path) -> None:
    """The link went with the directory; a tail whose run is there, whose writer lives, or that is young stays."""
    kept, orphan, living, young = (tmp_path / f"{name}.tail" for name in ("kept", "orphan", "living", "young"))
    for link in (kept, orphan, young):
        tail = Tail(link, memory)
        assert tail.append(ROWS[0])
        tail.close()
    writer = Tail(living, memory)
    targets = [aged(link, 0 if link == young else 2 * ORPHAN_S) for link in (kept, orphan, living, young)]
    for link in (orphan, living, young):
        link.unlink()
    sweep_tails(memory)
    assert [path.exists() for path in targets] == [True, False, True, True]
    writer.close()
    sweep_tails(memory)
    assert [path.exists() for path in targets] == [True, False, False, True]
    assert read_tail(kept) == [ROWS[0]]


@root_only
def test_sweep_tails_leaves_what_is_not_of_this_user_or_namespace(tmp_path: Path, memory: Path) -> None:
    """Files of other programs and users, links and FIFOs, and the tail of a container, whose run is not seen here."""
    (memory / "vitalsd-notes123").write_text("notes")
    (memory / "vitalsd-notes").write_text("notes")
    (memory / "vitalsd-link0000").symlink_to(tmp_path)
    os.mkfifo(memory / "vitalsd-fifo0000")
    theirs = tmp_path / "theirs.tail"
    Tail(theirs, memory).close()
    os.chown(theirs.readlink(), 65501, 65501)
    aged(theirs, 2 * ORPHAN_S)
    theirs.unlink()
    code = (
        "import sys, pathlib; from vitalsd.recording.journal import Tail\n"
        "Tail(pathlib.Path(sys.argv[1]) / 'inside.tail', pathlib.Path(sys.argv[2])).close()\n"
    )
    command = ["unshare", "-m", sys.executable, "-c", code, str(tmp_path), str(memory)]
    subprocess.run(command, check=True, timeout=60)
    aged(tmp_path / "inside.tail", 2 * ORPHAN_S)
    (tmp_path / "inside.tail").unlink()
    for path in memory.iterdir():
        os.utime(path, (1, 1), follow_symlinks=False)
    before = sorted(memory.iterdir())
    assert len(before) == 6
    sweep_tails(memory)
    assert sorted(memory.iterdir()) == before


def test_sweep_tails_of_a_removed_state_directory_at_the_next_start(tmp_path: Path) -> None:
    """A writer is killed and its directory removed; the next sidecar removes what is left in shared memory."""
    code = (
        "import os, sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from support.lives import Process; from recording.test_black_box import write\n"
        "process = Process(); box, record = write(pathlib.Path(sys.argv[1]), [process.snapshot()])\n"
        "process.pass_time(10**9); segment = record.append(process.snapshot()); box.append(segment, 1)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "runs"), str(TESTS)])
    assert killed.returncode == -9
    (link,) = (tmp_path / "runs").glob("*.tail")
    target = aged(link, 2 * ORPHAN_S)
    shutil.rmtree(tmp_path / "runs")
    assert target.exists()
    box, _ = write(tmp_path / "runs", [Process().snapshot()])
    box.close("over")
    assert not target.exists()
