"""The black box: what was committed survives whatever happens to the writer, and a bad disk stops nothing."""

import errno
import fcntl
import hashlib
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings

from support.fake_process import ALL_PARTS, IDENTITY, SECOND_NS, Process, lives, same
from support.sidecars import environment
from vitalsd.recording.black_box import BlackBox
from vitalsd.recording.run_database import SCHEMA, SCHEMA_VERSION
from vitalsd.recording.run_directory import MAX_RUNS, RunDirectory
from vitalsd.recording.run_files import delete_run, is_being_written
from vitalsd.recording.run_reader import Run, UnreadableRunError, read_run
from vitalsd.recording.run_writer import RunFile
from vitalsd.recording.scalars import SCALARS
from vitalsd.recording.series import Mark, Record
from vitalsd.snapshot import Child, ProcessTree, Snapshot

T = TypeVar("T")

KILLS = int(os.environ.get("VITALSD_KILLS", "12"))
"""Of each kind; `make torture` raises it."""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")


def write(directory: Path, snapshots: list[Snapshot], **bounds: Any) -> tuple[BlackBox, Record]:
    """Record `snapshots` to disk and wait until they are there."""
    record = Record(IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, max_bytes=2**40)
    box = BlackBox(RunDirectory(directory), IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, **bounds)
    for number, snapshot in enumerate(snapshots):
        segment = record.append(snapshot)
        box.append(segment, len(segment) - 1)
        if number % 50 == 49:
            box.flush()
    box.flush()
    return box, record


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives(max_steps=60))
def test_run_read_back_equals_the_snapshots_written(tmp_path: Path, snapshots: list[Snapshot]) -> None:
    """A run read back holds every snapshot exactly, even while it is still being written."""
    box, _ = write(tmp_path, snapshots)
    assert box.run_id is not None
    run, record = read_run(tmp_path / f"{box.run_id}.sqlite")
    assert run.state == "running"
    assert run.snapshots == len(snapshots)
    assert all(map(same, record.snapshots(), snapshots))
    box.close("the test is over")
    run, record = read_run(tmp_path / f"{box.run_id}.sqlite")
    assert (run.state, run.ended) == ("clean", "the test is over")
    assert len(list(record.snapshots())) == len(snapshots)


def test_run_of_an_earlier_format_is_listed_with_the_reason(tmp_path: Path) -> None:
    """It has other scalars: nothing in it is guessed, and the file stays as it is."""
    box, _ = write(tmp_path, [Process().snapshot()])
    box.close("over")
    (path,) = tmp_path.glob("*.sqlite")
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1")
    content = path.read_bytes()
    found = RunDirectory(tmp_path).scan()
    assert (found.runs, found.unreadable) == (
        [],
        {path.name: f"{path.name} has format 1; this vitalsd reads {SCHEMA_VERSION}"},
    )
    assert path.read_bytes() == content


def test_format_of_a_run_changes_with_the_figures_that_are_recorded() -> None:
    """A file does not name its scalars: who adds one raises `SCHEMA_VERSION`, and enters both here."""
    names = hashlib.sha256(" ".join((*SCALARS, SCHEMA)).encode()).hexdigest()
    assert (SCHEMA_VERSION, names[:16]) == (2, "4190840d476b6420")


def test_run_with_children_that_come_and_go_keeps_those_of_its_segments(tmp_path: Path) -> None:
    """Also across a gap, and when the oldest segments are deleted: their children go with them."""
    process, snapshots = Process(), []
    for second in range(400):
        process.pass_time(SECOND_NS, [1000])
        child = Child(1000 + second, second, f"cc {second}", second, 1, 4096, 2)
        process.tree = ProcessTree(second, 0, 0, 2, 0, (child, child._replace(pid=7, start_key=7, name="make")))
        snapshots.append(process.snapshot(parts=ALL_PARTS))
    record = Record(IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, max_bytes=2**40)
    file = RunFile(
        RunDirectory(tmp_path),
        IDENTITY,
        lives=True,
        interval_ns=SECOND_NS,
        retention_ns=150 * SECOND_NS,
        max_bytes=1 << 24,
    )
    segment_id, shown = 0, None
    for number, snapshot in enumerate(snapshots):
        segment = record.append(snapshot)
        if segment is not shown or number % 50 == 20:
            segment_id, shown = file.insert_segment(segment, len(segment) - 1), segment
            file.trim()
        elif number % 50:  # else a snapshot is missing, and with it the first one of a child
            file.insert_snapshot(segment_id, segment, len(segment) - 1)
    path = file.path
    file.close()
    _, back = read_run(path)
    found = {each.monotonic_ns: each.tree for each in back.snapshots()}
    assert 150 <= len(found) < 250
    assert found.items() <= {each.monotonic_ns: each.tree for each in snapshots}.items()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM child").fetchone()[0] < 300


def test_run_read_back_has_marks_and_events(tmp_path: Path) -> None:
    """Marks and events are on disk too."""
    box, record = write(tmp_path, [Process().snapshot()])
    box.write_mark(record.add_mark("F12 pressed"))
    box.write_event(record.add_event("missed", "2 snapshots"))
    box.close("over")
    _, back = read_run(next(tmp_path.glob("*.sqlite")))
    assert list(back.marks) == list(record.marks)
    assert list(back.events) == list(record.events)


def test_black_box_with_dropped_snapshots_is_exact_afterwards(tmp_path: Path) -> None:
    """A disk that hangs loses what may not wait for it; what is written once it answers again is exact."""

    class Hanging(RunDirectory):
        answers = threading.Event()

        def make_room(self, spare_bytes: int) -> None:
            self.answers.wait()

    process, record = Process(), Record(IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, max_bytes=2**40)
    box = BlackBox(Hanging(tmp_path), IDENTITY, interval_ns=SECOND_NS // 1000, retention_ns=2**62)
    for _ in range(40):
        box.write_mark(Mark(0, 0, "one that waits too"))
    taken = []
    for number in range(60):  # of one segment
        if number == 45:
            Hanging.answers.set()
            box.flush()
        process.pass_time(SECOND_NS, [1000 + number])
        taken.append(process.snapshot())
        segment = record.append(taken[-1])
        box.append(segment, len(segment) - 1)
    box.close("over")
    _, back = read_run(next(tmp_path.glob("*.sqlite")))
    kept = list(back.snapshots())
    assert len(kept) == len(taken) - box.dropped
    assert 15 < box.dropped < 30
    at = {snapshot.monotonic_ns: snapshot for snapshot in taken}
    assert all(same(snapshot, at[snapshot.monotonic_ns]) for snapshot in kept)


def test_run_keeps_the_last_thousand_marks_and_events(tmp_path: Path) -> None:
    """A client that marks each frame of a game keeps the history in the file; the last thousand marks are kept."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    for number in range(3500):
        box.write_mark(record.add_mark(f"frame {number}"))
        box.write_event(record.add_event("failed", f"failure {number}"))
        if number % 20 == 0:
            box.flush()
    box.flush()
    path = next(tmp_path.glob("*.sqlite"))
    with closing(sqlite3.connect(path)) as database:
        for table in ("mark", "event"):
            assert 1000 <= database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] < 2000
    box.close("over")
    _, back = read_run(path)
    assert (list(back.marks), list(back.events)) == (list(record.marks), list(record.events))
    assert box.dropped == 0


def test_run_eviction_without_descriptors_deletes_no_live_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its writer lives cannot be determined then, so `make_room` deletes no run."""
    box, _ = write(tmp_path, [Process().snapshot()])
    path = next(tmp_path.glob("*.sqlite"))

    def scarce(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("vitalsd.recording.run_files.os.open", scarce)
    assert is_being_written(path)
    RunDirectory(tmp_path, max_bytes=1).make_room(1)
    monkeypatch.undo()
    assert path.exists()
    box.close("over")
    assert not is_being_written(path)


def test_run_directory_and_files_are_private_under_every_umask(tmp_path: Path) -> None:
    """The directory is 0700 and every file in it 0600, under an open umask too."""
    before = os.umask(0)
    try:
        box, _ = write(tmp_path / "runs", [Process().snapshot()])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o700
    files = list((tmp_path / "runs").iterdir())
    assert len(files) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    box.close("over")


WRITER = """
    import sys, time
    from pathlib import Path
    from vitalsd.recording.recorder import Recorder, RecorderConfig
    from vitalsd.recording.run_directory import RunDirectory
    from vitalsd.sources import open_source

    directory, interval_s = sys.argv[1:]
    source = open_source()
    runs = RunDirectory(Path(directory))
    recorder = Recorder(source.identity(), RecorderConfig(interval_s=float(interval_s), runs=runs))
    recorder.mark("before the crash")
    while True:
        snapshot = source.snapshot()
        recorder.observe(snapshot)
        print(snapshot.monotonic_ns, flush=True)
        time.sleep(0.005)
"""


def ends(directory: Path) -> tuple[Run, list[int]]:
    """The only run of `directory` and the times of its snapshots."""
    (found,) = RunDirectory(directory).runs()
    run, record = read_run(found.path)
    times = [snapshot.monotonic_ns for snapshot in record.snapshots()]
    assert found.snapshots == run.snapshots == len(times)
    assert found.last_wall_ns == run.last_wall_ns
    return found, times


@pytest.mark.parametrize("interval_s", [0.01, 2])
def test_black_box_killed_at_any_moment_loses_at_most_one_interval(tmp_path: Path, interval_s: float) -> None:
    """
    After SIGKILL at random moments every file opens, no row is torn, and at most the last snapshot is missing.

    So it is when the next start has moved the log into the file.
    """
    for kill in range(KILLS):
        directory = tmp_path / str(kill)
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(directory), f"{interval_s}"],
            stdout=subprocess.PIPE,
        ) as writer:
            assert writer.stdout is not None
            seen = [int(writer.stdout.readline()) for _ in range(3)]
            time.sleep((kill * 7919 % 1000) / 1000 * 0.5)
            writer.kill()
            seen += [int(line) for line in writer.stdout.read().split(b"\n")[:-1]]
        found, times = ends(directory)
        assert (found.state, found.ended) == ("crashed", None)
        assert times == seen[: len(times)] or times[:-1] == seen
        assert len(times) >= len(seen) - 1
        _, record = read_run(found.path)
        assert [mark.label for mark in record.marks] == ["before the crash"]
        RunDirectory(directory).recover_crashed_runs()
        assert not list(directory.glob("*-wal"))
        assert ends(directory)[1] == times
        with sqlite3.connect(found.path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists open files in /proc")
def test_black_box_opens_files_in_its_directory_alone(tmp_path: Path) -> None:
    """So nothing is left elsewhere when a writer is killed and its directory removed."""

    def opened() -> set[str]:
        links = (Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return {os.readlink(link) for link in links if link.is_symlink()}

    before = opened()
    box, _ = write(tmp_path / "runs", [Process().snapshot()])
    files = opened() - before
    assert len(files) >= 3
    assert all(Path(file).parent == tmp_path / "runs" for file in files)
    assert not any(path.is_symlink() for path in (tmp_path / "runs").iterdir())
    box.close("over")


def fails(*_: Any) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def elsewhere(code: str, path: Path) -> str:
    """What another process prints that has `runs`, the directory at `path`."""
    names = (
        "from vitalsd.recording.run_directory import RunDirectory; from vitalsd.recording.run_reader import read_run"
    )
    head = f"import sys, pathlib; {names}; runs = RunDirectory(pathlib.Path(sys.argv[1]));"
    command = [sys.executable, "-c", head + code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def go_on(box: BlackBox, record: Record, process: Process, count: int) -> None:
    """Record so many more snapshots."""
    for _ in range(count):
        process.pass_time(SECOND_NS)
        segment = record.append(process.snapshot())
        box.append(segment, len(segment) - 1)


def test_read_of_the_own_run_keeps_its_locks(tmp_path: Path) -> None:
    """After a look at the run by its own process and one by another, all that follows is still in the file."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    go_on(box, record, process, 5)
    box.flush()
    assert len(read_run(tmp_path / f"{box.run_id}.sqlite")[1]) == 6
    assert elsewhere("print(runs.runs()[0].snapshots)", tmp_path) == "6"
    go_on(box, record, process, 100)
    box.flush()
    assert elsewhere("print(len(read_run(runs.runs()[0].path)[1]))", tmp_path) == "106"
    box.close("over")


def test_read_of_a_dead_run_during_a_listing_has_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing moves the log into the database, and deletes it, between the copies of the two."""
    taken = [Process().snapshot()]
    box, record = write(tmp_path, taken)
    assert box.run_id is not None
    dead = tmp_path / "dead"
    shutil.copytree(tmp_path, dead, symlinks=True, ignore=shutil.ignore_patterns("*.lock", "*-shm", "dead"))
    path = dead / f"{box.run_id}.sqlite"
    assert Path(f"{path}-wal").stat().st_size > 0
    copyfile, copied = shutil.copyfile, list[str]()

    def copy_slowly(source: str, target: str) -> None:
        copyfile(source, target)
        copied.append(source)
        if len(copied) == 1:
            assert len(RunDirectory(dead).runs()) == 1
            assert not Path(f"{path}-wal").exists()

    monkeypatch.setattr(shutil, "copyfile", copy_slowly)
    run, back = read_run(path)
    assert (run.state, len(back)) == ("crashed", len(record))
    box.close("over")


def test_run_without_its_lock_is_recovered_and_still_written(tmp_path: Path) -> None:
    """Without its lock, the next sidecar that starts recovers the run; its writer continues, and it is whole."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    go_on(box, record, process, 20)
    next(tmp_path.glob("*.lock")).unlink()
    RunDirectory(tmp_path).recover_crashed_runs()
    go_on(box, record, process, 300)
    box.close("over")
    run, times = ends(tmp_path)
    assert (run.state, len(times), box.dropped) == ("clean", 321, 0)


def test_run_file_deleted_is_replaced_from_the_next_segment(tmp_path: Path) -> None:
    """From the next snapshot on, and nothing after it is lost."""
    process, record = Process(), Record(IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, max_bytes=2**40)
    box = BlackBox(RunDirectory(tmp_path / "runs"), IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62)
    go_on(box, record, process, 70)
    shutil.rmtree(tmp_path / "runs")
    go_on(box, record, process, 130)
    box.close("over")
    run, back = read_run(next((tmp_path / "runs").glob("*.sqlite")))
    assert (run.state, box.error) == ("clean", None)
    kept, taken = list(back.snapshots()), list(record.snapshots())
    assert len(kept) >= 200 - 2 * 64
    assert all(map(same, kept, taken[-len(kept) :]))


def test_event_flushes_the_snapshots_before_it_to_disk(tmp_path: Path) -> None:
    """The end of the target is on disk with the snapshots before it, though none follows."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    go_on(box, record, process, 3)
    box.write_event(record.add_event("exited", "target 4242 has exited"))
    deadline = time.monotonic() + 5
    count = "SELECT count(*) FROM frame"
    while True:
        with sqlite3.connect(tmp_path / f"{box.run_id}.sqlite") as db:
            (on_disk,) = db.execute(count).fetchone()
        db.close()
        if on_disk == 4:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    box.close("over")


def test_listing_during_a_flush_never_loses_rows(tmp_path: Path) -> None:
    """However often the log moves into the file meanwhile, a listing counts all snapshots of the one before."""
    process, over = Process(), threading.Event()
    box, record = write(tmp_path, [process.snapshot()])

    def keep_writing() -> None:
        while not over.is_set():
            go_on(box, record, process, 1)
            time.sleep(0.0005)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    before = 0
    for _ in range(300):
        (run,) = RunDirectory(tmp_path).runs()
        assert run.snapshots >= before
        before = run.snapshots
    over.set()
    writer.join()
    assert before > 20
    box.close("over")


def test_run_file_deleted_in_mid_segment_is_replaced_at_the_next_write(tmp_path: Path) -> None:
    """Not only when a segment begins, which may be an hour away: with what is written next."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    go_on(box, record, process, 3)
    box.flush()
    delete_run(tmp_path / f"{box.run_id}.sqlite")
    box.write_mark(record.add_mark("after that"))
    box.flush()
    go_on(box, record, process, 3)
    box.close("over")
    (path,) = tmp_path.glob("*.sqlite")
    run, back = read_run(path)
    assert (run.snapshots, [mark.label for mark in back.marks]) == (3, ["after that"])


def test_run_file_replaced_after_the_exit_has_the_exit(tmp_path: Path) -> None:
    """The target has died, its run is deleted, and a client sets a mark."""
    box, record = write(tmp_path, [Process().snapshot()])
    box.end("killed by SIGKILL", crashed=True)
    box.flush()
    delete_run(tmp_path / f"{box.run_id}.sqlite")
    box.write_mark(record.add_mark("after that"))
    box.flush()
    (path,) = tmp_path.glob("*.sqlite")
    run, back = read_run(path)
    assert (run.state, run.ended, len(back.marks)) == ("crashed", "killed by SIGKILL", 1)
    box.close("killed by SIGKILL", crashed=True)


def test_dead_run_of_a_living_process_is_ended_and_not_crashed(tmp_path: Path) -> None:
    """By any sidecar, and nothing of a process with an identity that begins like its own."""
    living, other = IDENTITY.start_id, IDENTITY._replace(boot_id=f"{IDENTITY.boot_id[:7]}0").start_id
    states = {
        f"{living}-7": "clean",
        f"{living}-7-1": "clean",
        f"{living}-77": "clean",
        f"{living}7-7": "crashed",
        f"{other}-7": "crashed",
    }
    left = {name: tmp_path / f"{name}.sqlite" for name in states}
    box, _ = write(tmp_path / "first", [Process().snapshot()])
    box.flush()
    for path in left.values():
        shutil.copyfile(tmp_path / "first" / f"{box.run_id}.sqlite", path)
        shutil.copyfile(f"{tmp_path / 'first' / str(box.run_id)}.sqlite-wal", f"{path}-wal")
    box.close("over")
    RunDirectory(tmp_path).recover_crashed_runs(living)
    assert {name: read_run(path)[0].state for name, path in left.items()} == states


def test_run_directory_unreadable_for_a_moment_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment, after a change of its mode or on a file server: what is open is written, and nothing is lost."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    lstat = os.lstat

    def forbidden(path: Any, **more: Any) -> os.stat_result:
        if str(path).endswith(".sqlite"):
            raise PermissionError(errno.EACCES, "forbidden")
        return lstat(path, **more)

    monkeypatch.setattr("vitalsd.discovery.atomic_file.os.lstat", forbidden)
    for _ in range(3):  # segments
        process.threads[max(process.threads)[0] + 1, 1] = "new", 0
        go_on(box, record, process, 3)
    box.flush()
    monkeypatch.undo()
    assert (box.error, box.dropped) == (None, 0)
    box.close("over")
    (path,) = tmp_path.glob("*.sqlite")
    assert read_run(path)[0].snapshots == 10


def test_run_name_changed_on_a_full_disk_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the target executes another program: the name goes with the next write, or at the end."""
    for closes in (False, True):
        box, _ = write(tmp_path / str(closes), [Process().snapshot()])
        with monkeypatch.context() as full:
            full.setattr(RunFile, "set_identity", fails)
            box.identify(IDENTITY._replace(name="another"))
            box.flush()
        (path,) = (tmp_path / str(closes)).glob("*.sqlite")
        assert read_run(path)[0].identity == IDENTITY
        if closes:
            box.close("over")
        else:
            box.flush()
        assert read_run(path)[0].identity.name == "another"
        box.close("over")


def test_run_file_that_cannot_be_trimmed_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is reported; nothing that is on disk counts as dropped."""

    def full(self: RunFile) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(RunFile, "trim", full)
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    go_on(box, record, process, 100)
    box.close("over")
    assert box.dropped == 0
    assert len(ends(tmp_path)[1]) == 101


@pytest.mark.parametrize("seed", range(3))
def test_black_box_under_random_failures_keeps_or_counts_each_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """
    Each snapshot that is kept is exact and in order, and each other one is counted as dropped.

    Writes that fail in the middle, a database that others hold, threads born and ended, readers all the while: what is
    kept is exact and in order, and what is not was counted as dropped.
    """
    chance = random.Random(seed)
    faulty = True

    def failing(write: Callable[..., T], often: float) -> Callable[..., T]:
        def attempt(*arguments: object) -> T:
            if faulty and chance.random() < often:
                raise sqlite3.OperationalError("database or disk is full")
            return write(*arguments)

        return attempt

    monkeypatch.setattr(RunFile, "_insert_frame", failing(RunFile._insert_frame, 0.1))
    monkeypatch.setattr(RunFile, "_insert_segment_row", failing(RunFile._insert_segment_row, 0.2))

    process = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 40)})
    record = Record(IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, max_bytes=2**40)
    box = BlackBox(RunDirectory(tmp_path), IDENTITY, interval_ns=5_000_000, retention_ns=2**62)
    path = tmp_path / f"{box.run_id}.sqlite"
    assert box._writer._file is not None
    box._writer._file._db.execute("PRAGMA busy_timeout = 30")
    taken: dict[int, Snapshot] = {}

    def check() -> int:
        kept = list(read_run(path)[1].snapshots())
        assert all(same(snapshot, taken[snapshot.monotonic_ns]) for snapshot in kept)
        times = [snapshot.monotonic_ns for snapshot in kept]
        assert times == sorted(set(times))
        return len(kept)

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        for number in range(600):
            if number % 60 == 20:
                other.execute("BEGIN IMMEDIATE")
            elif number % 60 == 40:
                other.execute("ROLLBACK")
            if chance.random() < 0.05:
                process.threads[1000 + number, 1] = "newcomer", 0
                process.end_thread(*min(process.threads))
            process.pass_time(SECOND_NS, [chance.choice([0, 0, 1000, 6 * SECOND_NS]) for _ in process.threads])
            snapshot = process.snapshot()
            taken[snapshot.monotonic_ns] = snapshot
            segment = record.append(snapshot)
            box.append(segment, len(segment) - 1)
            if number % 100 == 99:
                check()
    faulty = False
    box.close("over", timeout_s=10)
    assert check() + box.dropped == len(taken)
    assert 0 < box.dropped < len(taken) // 2
    assert read_run(path)[0].state == "clean"


def test_run_file_at_its_limit_evicts_the_oldest_segments(tmp_path: Path) -> None:
    """A run stays near its byte bound, keeps the end, and is still whole."""
    process = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 501)})
    snapshots = []
    for _ in range(1500):
        process.pass_time(SECOND_NS, [1_000_000] * 500)
        snapshots.append(process.snapshot())
    box, _ = write(tmp_path, snapshots, max_bytes=1 << 20)
    box.close("over")
    run, record = read_run(next(tmp_path.glob("*.sqlite")))
    assert run.size_bytes < 1.5 * (1 << 20)
    kept = list(record.snapshots())
    assert 64 <= len(kept) < 1500
    assert all(map(same, kept, snapshots[-len(kept) :]))


def test_run_directory_at_its_byte_limit_evicts_the_oldest_ended_runs(tmp_path: Path) -> None:
    """The oldest ended runs make room; one that is being written never does."""
    process, snapshots = Process(), []
    for _ in range(5):
        process.pass_time(SECOND_NS)
        snapshots.append(process.snapshot())
    live, _ = write(tmp_path, snapshots)
    ended = []
    for _ in range(4):
        box, _ = write(tmp_path, snapshots)
        box.close("over")
        ended.append(box.run_id)
    directory = RunDirectory(tmp_path, max_bytes=sum(p.stat().st_size for p in tmp_path.iterdir()))
    directory.make_room(60_000)
    left = {run.id for run in directory.runs()}
    assert live.run_id in left
    assert ended[0] not in left
    assert ended[-1] in left
    live.close("over")


@pytest.mark.parametrize("being_written", [0, 5])
def test_run_directory_at_100_runs_evicts_the_oldest_ended_runs(being_written: int, tmp_path: Path) -> None:
    """The oldest ended ones go, also if those that are still being written are older."""
    box, _ = write(tmp_path, [Process().snapshot()])
    box.close("over")
    for number in range(MAX_RUNS + 3):
        shutil.copy(tmp_path / f"{box.run_id}.sqlite", path := tmp_path / f"1-2-boot-{number}.sqlite")
        os.utime(path, (number, number))
    with ExitStack() as stack:
        for number in range(being_written):
            lock = stack.enter_context((tmp_path / f"1-2-boot-{number}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        RunDirectory(tmp_path).make_room(0)
        left = {path.stem for path in tmp_path.glob("*.sqlite")}
    assert len(left) == MAX_RUNS - 1
    assert {f"1-2-boot-{number}" for number in range(being_written)} <= left
    assert f"1-2-boot-{MAX_RUNS + 2}" in left


def test_run_exit_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run will pass for one that crashed, and the log has the reason; all snapshots are there."""
    process = Process()
    box, record = write(tmp_path, [process.snapshot()])
    go_on(box, record, process, 10)
    box.flush()
    path = tmp_path / f"{box.run_id}.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        box.close("over", timeout_s=10)
    assert box.error == "the black box is off: database is locked"
    assert box.error in caplog.text
    RunDirectory(tmp_path).recover_crashed_runs()
    run, back = read_run(path)
    assert (run.state, len(list(back.snapshots()))) == ("crashed", 11)


def test_runs_are_listed_crashed_first_then_newest(tmp_path: Path) -> None:
    """Runs are listed crashed first, then newest first."""
    for ended in ("over", None, "over"):
        box, _ = write(tmp_path, [Process().snapshot()])
        box.close(ended or "killed by signal 9", crashed=ended is None)
    states = [run.state for run in RunDirectory(tmp_path).runs()]
    assert states == ["crashed", "clean", "clean"]


def test_run_in_a_report_is_marked_with_runs_of_the_same_process(tmp_path: Path) -> None:
    """A run that has gone into a report is marked, and so is what another sidecar recorded of the same process."""
    for _ in range(2):
        box, _ = write(tmp_path, [Process().snapshot()])
        box.close("killed", crashed=True)
    directory = RunDirectory(tmp_path)
    run, other = directory.runs()
    assert not run.reported
    assert not other.reported
    directory.mark_reported(run)
    assert [run.reported for run in directory.runs()] == [True, True]


@pytest.mark.parametrize("content", [b"", b"garbage", b"SQLite format 3\0" + bytes(200), b"PK\3\4"])
def test_foreign_file_is_refused_unlisted_and_unchanged(tmp_path: Path, content: bytes) -> None:
    """What is not ours is refused with its name, left out of the list, and not touched."""
    path = tmp_path / "notes.sqlite"
    path.write_bytes(content)
    with pytest.raises(UnreadableRunError, match=r"notes\.sqlite"):
        read_run(path)
    assert RunDirectory(tmp_path).runs() == []
    assert path.read_bytes() == content


def test_damaged_run_raises_only_unreadable_run(tmp_path: Path) -> None:
    """Bytes flipped anywhere give UnreadableRunError or a record, never another exception."""
    box, _ = write(tmp_path, [Process().snapshot()] * 1)
    box.close("over")
    path = next(tmp_path.glob("*.sqlite"))
    good = path.read_bytes()
    for at in range(0, len(good), 997):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            read_run(path)
        except UnreadableRunError:
            continue


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE mark;"
        "CREATE VIEW mark AS WITH RECURSIVE n(a) AS (SELECT 1 UNION ALL SELECT a FROM n) SELECT a, a, a FROM n",
        "CREATE TRIGGER busy BEFORE INSERT ON frame BEGIN SELECT 1; END",
    ],
)
def test_run_with_views_or_triggers_is_refused(tmp_path: Path, change: str) -> None:
    """A view would run when it is read, even without end, and a trigger when the run is recovered."""
    box, _ = write(tmp_path, [Process().snapshot()])
    box.close("over")
    (path,) = tmp_path.glob("*.sqlite")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    with pytest.raises(UnreadableRunError, match="other tables than a run"):
        read_run(path)
    assert RunDirectory(tmp_path).runs() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DROP TABLE mark; CREATE TABLE  mark  (wall_ns, monotonic_ns INT, label TEXT NOT NULL)", None),
        ("DROP TABLE mark; CREATE TABLE mark (wall_ns INT, label TEXT)", "other columns in mark"),
        ("ALTER TABLE mark ADD COLUMN more TEXT", "other columns in mark"),
        ("DROP TABLE mark; CREATE TABLE mark (wall_ns, monotonic_ns, label CHECK (length(label) < 9))", "computes"),
        ("CREATE TABLE more (x)", "other tables"),
        ("DROP TABLE mark", "other tables"),
        ("CREATE INDEX more ON frame (segment)", "other tables"),
    ],
)
def test_run_with_a_table_declared_otherwise_is_read_if_it_has_the_columns(
    tmp_path: Path, change: str, reason: str | None
) -> None:
    """The text of a declaration does not matter; what cannot be read is listed with the reason, not left out."""
    box, _ = write(tmp_path, [Process().snapshot()])
    box.close("over")
    (path,) = tmp_path.glob("*.sqlite")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    found = RunDirectory(tmp_path).scan()
    if reason is None:
        assert len(found.runs) == 1
        assert read_run(path)[0].id == found.runs[0].id
    else:
        assert found.runs == []
        assert reason in found.unreadable[path.name]


def check_it_is_off(box: BlackBox, reason: str) -> None:
    assert box.error is not None
    assert reason in box.error
    box.close("over")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the read-only mount covers it")
def test_black_box_in_an_unwritable_directory_is_off_with_the_reason(tmp_path: Path) -> None:
    """Without permission the black box is off, with the reason, and nothing is raised."""
    tmp_path.chmod(0o500)
    box, _ = write(tmp_path / "runs", [Process().snapshot()])
    check_it_is_off(box, "Permission denied")


def test_run_directory_that_is_a_symlink_is_refused(tmp_path: Path) -> None:
    """A directory that is a symlink is not followed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    box, _ = write(tmp_path / "runs", [Process().snapshot()])
    check_it_is_off(box, "is a symbolic link")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_run_directory_that_is_a_file_turns_the_black_box_off(tmp_path: Path) -> None:
    """A file where the directory should be turns the black box off."""
    (tmp_path / "runs").write_text("hello")
    box, _ = write(tmp_path / "runs", [Process().snapshot()])
    check_it_is_off(box, "is not a directory; set VITALSD_STATE_DIR")


@root_only
def test_black_box_on_a_full_disk_warns_once_and_recovers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a full disk it says why, once; what was written stays whole; with room again it is written by itself."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], check=True)
    try:
        process = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 2001)})
        (tmp_path / "ballast").write_bytes(bytes(600_000))
        box, record = write(tmp_path / "runs", [process.snapshot()])
        assert box.error is None

        def step() -> None:
            process.pass_time(SECOND_NS, [1_000_000] * 2000)
            segment = record.append(process.snapshot())
            box.append(segment, len(segment) - 1)
            box.flush()

        for _ in range(200):
            step()
        assert box.error is not None
        assert "full" in box.error
        assert box.dropped > 0
        assert len([r for r in caplog.records if r.name == "vitalsd.recording.black_box"]) == 1
        # A thread that began on a full disk is in the file too once there is room.
        process.threads |= {(tid, 2): (f"latecomer {tid}", 0) for tid in range(3000, 3500)}
        for _ in range(3):
            step()
        assert box.error is not None
        (tmp_path / "ballast").unlink()
        step()
        assert box.error is None
        box.close("over")
        _, back = read_run(next((tmp_path / "runs").glob("*.sqlite")))
        last = list(back.snapshots())[-1]
        assert record.last is not None
        assert same(last, record.last)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@root_only
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_crashed_run_on_a_full_or_read_only_disk_is_listed(disk: str, tmp_path: Path) -> None:
    """Which may be why it crashed. It is listed and read, though SQLite can make no files of its own beside it."""
    box, _ = write(tmp_path / "first", [Process().snapshot()])
    box.flush()
    (runs := tmp_path / "runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(runs)], check=True)
    try:
        for suffix in (".sqlite", ".sqlite-wal"):
            shutil.copyfile(tmp_path / "first" / f"{box.run_id}{suffix}", runs / f"{box.run_id}{suffix}")
        (runs / f"{box.run_id}.lock").touch()
        if disk == "full":
            with suppress(OSError), (runs / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(runs)], check=True)
        directory = RunDirectory(runs)
        assert [(run.id, run.state, run.snapshots) for run in directory.runs()] == [(box.run_id, "crashed", 1)]
        with pytest.raises(UnreadableRunError, match="cannot be opened"):
            directory.mark_reported(directory.runs()[0])
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)
        box.close("over")


@root_only
def test_black_box_on_a_read_only_disk_is_off_with_the_reason(tmp_path: Path) -> None:
    """On a read-only file system the black box is off, with the reason."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)], check=True)
    try:
        box, _ = write(tmp_path / "runs", [Process().snapshot()])
        check_it_is_off(box, "Read-only file system")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_black_box_on_a_slow_disk_drops_and_counts_without_waiting(tmp_path: Path) -> None:
    """While the writer hangs, snapshots beyond a few are dropped and counted; the caller never waits."""
    process = Process()
    record = Record(IDENTITY, interval_ns=SECOND_NS)
    box = BlackBox(RunDirectory(tmp_path), IDENTITY, interval_ns=1_000_000, retention_ns=SECOND_NS)
    with sqlite3.connect(tmp_path / f"{box.run_id}.sqlite", isolation_level=None) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        for _ in range(300):
            process.pass_time(SECOND_NS)
            segment = record.append(process.snapshot())
            box.append(segment, len(segment) - 1)
        blocker.execute("ROLLBACK")
    blocker.close()
    assert box.dropped > 0
    box.close("over")


def test_python_without_sqlite_records_in_memory_with_the_reason(short_path: Path) -> None:
    """`start` and its routes work; the black box is off with the reason, and a report has everything but runs."""
    code = (
        "import json, sys, time, urllib.request\n"
        "sys.modules['_sqlite3'] = None\n"
        "import vitalsd\n"
        "from vitalsd_client import BugReport, last_crash\n"
        "sidecar = vitalsd.start(port=0, record_interval_s=0.05)\n"
        "def get(path): return json.loads(urllib.request.urlopen(sidecar.url + path).read())\n"
        "while get('/info')['recorder']['snapshots'] < 4: time.sleep(0.02)\n"
        "assert 'built without SQLite' in get('/info')['recorder']['black_box']['error']\n"
        "assert get('/runs') == [] and get('/history')['time_ms']\n"
        "assert last_crash('viewer') is None\n"
        "print(*BugReport('viewer', window_ms=50).preview())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(short_path), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("metadata.json", "runtime-metrics.json", "runtime-history.json", "marks.json", "manifest.json")
    ]
