"""Runs that another program made or changed: none hangs, fills memory or disk, and no file of the user is touched."""

import ctypes
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from recording.test_black_box import write
from support.crafted import make_endless, make_swollen, plant_journal, state_of
from support.fake_process import IDENTITY, SECOND_NS, Process
from support.paths import TESTS
from support.sidecars import VITALSD, environment, serving
from vitalsd.recording.replay_file import read_replay_file
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_files import is_being_written, is_own_run
from vitalsd.recording.run_image import MAX_RUN_BYTES, read_image
from vitalsd.recording.run_reader import Run, UnreadableRunError, describe, read_run
from vitalsd.recording.scalars import SCALARS
from vitalsd_client import last_crash

NAME = f"{IDENTITY.start_id}-77.sqlite"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems or changes the user, which takes root")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A crashed run of 70 snapshots in a directory of its own, without anything beside it but its lock."""
    process, snapshots = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 9)}), []
    for _ in range(70):
        process.pass_time(SECOND_NS, [1000] * 8)
        snapshots.append(process.snapshot())
    box, record = write(tmp_path / "made", snapshots)
    box.write_mark(record.add_mark("just before"))
    box.close("killed by SIGKILL", crashed=True)
    (made,) = (tmp_path / "made").glob("*.sqlite")
    (tmp_path / "state" / "runs").mkdir(mode=0o700, parents=True)
    (tmp_path / "state").chmod(0o700)
    path = tmp_path / "state" / "runs" / NAME
    shutil.copy(made, path)
    path.with_suffix(".lock").touch(0o600)
    return path


@pytest.fixture
def logged(run: Path, tmp_path: Path) -> Path:
    """A crashed run with its last snapshots in the log, as a killed writer leaves it."""
    box, _ = write(tmp_path / "killed", [Process().snapshot()])
    for suffix in ("", "-wal"):
        shutil.copyfile(tmp_path / "killed" / f"{box.run_id}.sqlite{suffix}", f"{run}{suffix}")
    box.close("over")
    assert Path(f"{run}-wal").stat().st_size
    return run


THERMAL_AT = 8 * SCALARS.index("machine_thermal_level")
THERMAL_LEVEL_9 = (
    f"CAST(substr(numbers, 1, {THERMAL_AT}) || x'09' || zeroblob(7) || substr(numbers, {THERMAL_AT + 9}) AS BLOB)"
)
"""The numbers of a frame with a thermal level that no machine has."""


def vitalsd(run: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    env = environment(run.parents[2]) | {"VITALSD_STATE_DIR": str(run.parents[1])}
    return subprocess.run([*VITALSD, *arguments], env=env, capture_output=True, text=True, timeout=timeout_s)


def listed(run: Path) -> Run:
    (found,) = RunDirectory(run.parent).runs()
    return found


READERS: dict[str, Callable[[Path], object]] = {
    "describe": describe,
    "read_run": read_run,
    "replay": read_replay_file,
    "scan": lambda run: RunDirectory(run.parent).scan(),
    "recover": lambda run: RunDirectory(run.parent).recover_crashed_runs(),
    "recover_living": lambda run: RunDirectory(run.parent).recover_crashed_runs(IDENTITY.start_id),
    "make_room": lambda run: RunDirectory(run.parent, max_bytes=1).make_room(1),
    "vitalsd runs": lambda run: vitalsd(run, "runs"),
    "vitalsd replay": lambda run: vitalsd(run, "replay", str(run)),
    "vitalsd report": lambda run: vitalsd(run, "report", "--run", run.stem, "--out", str(run.parents[2])),
}


# A rollback journal


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("lock", ["none", "free", "directory", "socket"])
def test_run_with_a_planted_journal_deletes_no_file(run: Path, tmp_path: Path, reader: str, lock: str) -> None:
    """SQLite would delete the file that the journal names, as soon as it may write the database."""
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    with closing(sqlite3.connect(run)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    journal = plant_journal(run, str(victim))
    if lock != "free":
        run.with_suffix(".lock").unlink()
    if lock == "directory":
        run.with_suffix(".lock").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        if lock == "socket":
            os.chdir(run.parent)
            listener.bind(f"{run.stem}.lock")
        with suppress(UnreadableRunError):
            READERS[reader](run)
    assert victim.read_text() == "years of work"
    assert journal.exists()
    assert "rollback journal" in RunDirectory(run.parent).scan().unreadable[run.name]


def test_mark_reported_of_a_run_with_a_planted_journal_is_refused(run: Path, tmp_path: Path) -> None:
    """The journal may come between the listing and the mark."""
    found = listed(run)
    victim = tmp_path / "thesis.txt"
    victim.touch()
    plant_journal(run, str(victim))
    with pytest.raises(UnreadableRunError, match="rollback journal"):
        RunDirectory(run.parent).mark_reported(found)
    assert victim.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="watches the directory with inotify(7)")
def test_writer_of_a_run_never_has_a_journal(tmp_path: Path) -> None:
    """So none is left wherever the writer is killed, and marking or recovering a run makes none."""
    libc = ctypes.CDLL(None, use_errno=True)
    tmp_path.chmod(0o700)
    in_create = 0x100
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(watch, os.fsencode(tmp_path), in_create) > 0
    try:
        box, record = write(tmp_path, [Process().snapshot()])
        box.write_mark(record.add_mark("one"))
        box.close("killed", crashed=True)
        directory = RunDirectory(tmp_path)
        assert directory.mark_reported(directory.runs()[0])
        directory.recover_crashed_runs(IDENTITY.start_id)
        made = os.read(watch, 1 << 16)
    finally:
        os.close(watch)
    assert b"-wal" in made
    assert b"-journal" not in made


# What is read is not written


@pytest.mark.parametrize("kind", ["run", "logged"])
def test_listing_and_reading_of_a_run_changes_no_file(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the run nor what is beside it, be its log in the file or not; no file is made."""
    run: Path = request.getfixturevalue(kind)
    monkeypatch.setenv("VITALSD_STATE_DIR", str(run.parents[1]))
    before = state_of(run.parent)
    assert listed(run).state == "crashed"
    assert read_run(run)[0].snapshots == listed(run).snapshots > 0
    assert read_replay_file(run).opened.run.snapshots
    last_crash()
    assert vitalsd(run, "runs").returncode == 0
    assert state_of(run.parent) == before


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "hard link": (lambda run: os.link(run, run.parents[2] / "another"), "hard links"),
    "log that is a link": (lambda run: Path(f"{run}-wal").symlink_to(run.parents[2] / "log"), "not a regular file"),
    "index that is a link": (lambda run: Path(f"{run}-shm").symlink_to(run.parents[2] / "index"), "not a regular file"),
    "index that is a FIFO": (lambda run: os.mkfifo(f"{run}-shm"), "not a regular file"),
    "another journal mode": (lambda run: patch(run, 18, b"\1\1"), "not in WAL mode"),
}


def patch(path: Path, at: int, content: bytes) -> None:
    changed = bytearray(path.read_bytes())
    changed[at : at + len(content)] = content
    path.write_bytes(changed)


@pytest.mark.parametrize("kind", FOREIGN)
def test_run_that_vitalsd_did_not_write_is_not_changed(run: Path, kind: str) -> None:
    """It is listed, and neither marked as reported, nor recovered, nor deleted to make room."""
    found = listed(run)
    (run.parents[2] / "log").touch()
    (run.parents[2] / "index").write_text("mine")
    FOREIGN[kind][0](run)
    before = state_of(run.parents[1])
    directory = RunDirectory(run.parent, max_bytes=1)
    with pytest.raises(UnreadableRunError, match=FOREIGN[kind][1]):
        directory.mark_reported(found)
    directory.recover_crashed_runs(IDENTITY.start_id)
    directory.make_room(1)
    assert state_of(run.parents[1]) == before
    assert (run.parents[2] / "index").read_text() == "mine"


@root_only
def test_run_of_another_user_is_not_changed(run: Path) -> None:
    """In a directory that the user may write, as one that was copied with its owners."""
    found = listed(run)
    os.chown(run, 65501, 65501)
    with pytest.raises(UnreadableRunError, match="belongs to user 65501"):
        RunDirectory(run.parent).mark_reported(found)
    RunDirectory(run.parent, max_bytes=1).make_room(1)
    assert run.exists()


@root_only
def test_run_that_may_not_be_read_is_listed_with_the_reason(run: Path) -> None:
    """By another user than root: mode 000, of the run and of its lock."""
    run.chmod(0)
    run.with_suffix(".lock").chmod(0)
    for path in (run, run.parent, *run.parents[1:3]):
        os.chown(path, 65501, 65501)
    code = (
        "import os; from pathlib import Path; from vitalsd.recording.run_directory import RunDirectory\n"
        "os.setgroups([]); os.setgid(65501); os.setuid(65501)\n"
        "directory = RunDirectory(Path('.'), max_bytes=1)\n"
        "directory.make_room(1); directory.recover_crashed_runs(); found = directory.scan()\n"
        "print(found.runs, *found.unreadable.values())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=run.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"[] {run.name} cannot be read: Permission denied\n", done.stderr
    assert run.exists()


def test_recover_moves_the_log_of_a_crashed_run_into_its_file(logged: Path) -> None:
    """So the next listing has less to do; the time of the file stays."""
    before, modified_ns = describe(logged), logged.stat().st_mtime_ns
    RunDirectory(logged.parent).recover_crashed_runs()
    assert not Path(f"{logged}-wal").exists()
    assert describe(logged)._replace(size_bytes=0) == before._replace(size_bytes=0)
    assert logged.stat().st_mtime_ns == modified_ns


# Small files that are large to their reader


@pytest.mark.parametrize("table", ["frame", "thread", "child"])
def test_run_with_an_endless_page_tree_is_refused(run: Path, table: str) -> None:
    """10^13 rows in 70 KiB: one sentence in a replay, and the listing has the other runs."""
    make_endless(run, table)
    with pytest.raises(UnreadableRunError, match=r"more (rows|threads|children) than fit|hold more than|malformed"):
        read_run(run)
    found = RunDirectory(run.parent).scan()
    assert (table == "frame") == (run.name in found.unreadable)
    done = vitalsd(run, "replay", str(run))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert run.name in done.stderr
    assert vitalsd(run, "runs").returncode == 0


@pytest.mark.parametrize("table", ["segment", "mark", "event"])
def test_run_with_endless_notes_is_read_up_to_a_bound(run: Path, table: str) -> None:
    """Of 10^13 marks the last 1000; of segments those that snapshots name."""
    make_endless(run, table)
    try:
        _, record = read_run(run)
    except UnreadableRunError as error:
        print(error)
    else:
        assert len(record.marks) <= 1000
        assert len(record.events) <= 1000


def test_run_with_values_in_one_endless_page_is_refused(run: Path) -> None:
    """1000 marks of 1 MiB each in 4 MiB: refused, in bounded memory."""
    make_swollen(run)
    code = "import sys, resource, pathlib\nfrom vitalsd.recording.run_reader import *\n"
    code += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "try: read_run(pathlib.Path(sys.argv[1]))\nexcept UnreadableRunError as error: print(error)\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sentence, grown_kb = done.stdout.splitlines()
    assert "its tables hold more than its" in sentence
    assert int(grown_kb) < 64 << 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE mark SET label = printf('%.*c', 201, 'x')", "a label of 201 characters"),
        (
            "INSERT INTO event VALUES (1, 1, 'missed', printf('%.*c', 20000, 'x'), NULL, NULL, NULL, 0)",
            "a text of 20000 characters",
        ),
        ("INSERT INTO event VALUES (1, 1, 'hang', 'x', 1, 'ui', 'sabotage', 0)", "a hang"),
        ("INSERT INTO event VALUES (1, 1, 'hang', 'x', 1, 'u' || char(10), 'busy', 0)", "a hang"),
        ("INSERT INTO event VALUES (1, 1, 'hang', 'x', -1, 'ui', 'busy', 0)", "a number that is negative"),
        ("INSERT INTO event VALUES (1, 1, 'hang', 'x', NULL, NULL, NULL, 0)", "where there should be"),
        ("INSERT INTO event VALUES (1, 1, 'missed', 'x', 1, 'ui', 'busy', 0)", "where there should be"),
        ("INSERT INTO meta VALUES ('app_version', printf('%.*c', 20000, 'x'))", "a text of 20000 characters"),
        ("UPDATE segment SET constants = printf('%.*c', 20000, ' ') || constants", "characters"),
        ("UPDATE meta SET value = '-1' WHERE key = 'interval_ns'", "negative or too large"),
        ("UPDATE meta SET value = '1' || printf('%.*c', 4000, '0') WHERE key = 'retention_ns'", "too large"),
        (
            "DROP TABLE frame; CREATE TABLE frame (id PRIMARY KEY, segment, numbers, moved, code, children, gauges)"
            " WITHOUT ROWID",
            "rowid",
        ),
        ("DROP TABLE mark; CREATE TABLE mark (wall_ns AS (1), monotonic_ns, label)", "other columns"),
        ("UPDATE frame SET children = zeroblob(32)", "more children than there are"),
        ("UPDATE frame SET children = zeroblob(24)", "a child of another length"),
        (f"UPDATE frame SET children = x'{'ff' * 32}'", "a child of another length, or with a negative number"),
        ("INSERT INTO child SELECT NULL, id, 'x', 1, 'sh', 1 FROM segment", "where there should be int"),
        ("UPDATE frame SET gauges = zeroblob(8)", "other gauges than its segment has"),
        ("UPDATE frame SET gauges = x'00'", "bytes length not a multiple"),
        (
            """UPDATE segment SET constants = json_set(constants, '$.gauges', json('["a"]'));"""
            " UPDATE frame SET gauges = x'000000000000f07f'",
            "or with an infinite one",
        ),
        ("""UPDATE segment SET constants = json_set(constants, '$.gauges', json('["=1+1"]'))""", "gauges"),
        ("""UPDATE segment SET constants = json_set(constants, '$.gauges', json('["a", "a"]'))""", "gauges"),
        ("UPDATE segment SET constants = json_set(constants, '$.gauges', json('[5]'))", "expected string"),
        ("UPDATE segment SET constants = json_remove(constants, '$.gauges')", "gauges"),
        ("UPDATE segment SET waits = zeroblob(8000)", "threads without CPU time"),
        (
            "UPDATE frame SET code = code || 'I', numbers = CAST(numbers || zeroblob(4 * ifnull(moved, 0)) AS BLOB)",
            "a snapshot",
        ),
        (f"UPDATE frame SET numbers = {THERMAL_LEVEL_9}", "a machine_thermal_level of 9"),
    ],
)
def test_run_with_values_out_of_bounds_is_refused(run: Path, change: str, reason: str) -> None:
    """Labels, details and numbers are held to what the recorder writes; nothing is sorted in memory or on disk."""
    with closing(sqlite3.connect(run)) as db:
        db.executescript(change)
    with pytest.raises(UnreadableRunError, match=reason):
        read_run(run)


def test_run_with_texts_in_utf_16_is_refused(run: Path) -> None:
    """Its names and labels would be others than they pass for."""
    patch(run, 56, b"\0\0\0\2")
    with pytest.raises(UnreadableRunError, match="not UTF-8"):
        read_run(run)


def test_run_of_the_largest_size_is_read(tmp_path: Path) -> None:
    """16 MiB of many threads that all move: the bounds leave room for it."""
    threads = {(tid, 1): (f"worker {tid}", 0) for tid in range(1, 301)}
    process, snapshots = Process(threads=threads), []
    for _ in range(16_000):
        process.pass_time(SECOND_NS, [1000] * 300)
        snapshots.append(process.snapshot())
    box, _ = write(tmp_path, snapshots)
    box.close("over")
    (path,) = tmp_path.glob("*.sqlite")
    assert 12 << 20 < path.stat().st_size < MAX_RUN_BYTES
    run, record = read_run(path)
    assert run.snapshots == len(record) > 6000


def test_listing_is_interrupted_by_a_signal(run: Path) -> None:
    """Ctrl-C ends a listing of many runs that take as long as a run may."""
    make_endless(run, "frame")
    with run.open("r+b") as file:
        file.truncate(MAX_RUN_BYTES)  # the larger, the longer it may take
    patch(run, 28, (MAX_RUN_BYTES // 4096).to_bytes(4, "big"))
    for number in range(1, 400):
        os.link(run, run.with_name(f"{run.stem}-{number}.sqlite"))
    env = environment(run.parents[2]) | {"VITALSD_STATE_DIR": str(run.parents[1])}
    with subprocess.Popen([*VITALSD, "runs"], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as listing:
        time.sleep(3)
        assert listing.poll() is None, "it was faster than this test thinks"
        listing.send_signal(signal.SIGINT)
        assert listing.wait(20) != 0


# Files that are no files


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


BESIDE: dict[str, Callable[[Path], object]] = {
    "lock is a FIFO": lambda run: instead(run.with_suffix(".lock"), os.mkfifo),
    "log is a FIFO": lambda run: os.mkfifo(f"{run}-wal"),
    "log is a directory": lambda run: Path(f"{run}-wal").mkdir(),
    "log is /dev/zero": lambda run: zero(Path(f"{run}-wal")),
    "log is sparse": lambda run: sparse(Path(f"{run}-wal")),
    "run is a FIFO": lambda run: instead(run, os.mkfifo),
    "run is a directory": lambda run: instead(run, Path.mkdir),
    "run is /dev/zero": lambda run: instead(run, zero),
    "run is sparse": lambda run: sparse(run),
}


def sparse(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 3 << 30)


@pytest.mark.parametrize("kind", BESIDE)
def test_run_with_a_special_file_is_read_within_bounds(run: Path, tmp_path: Path, kind: str) -> None:
    """A FIFO, a device, a directory or 3 GiB of nothing: neither a hang, nor a copy in the temporary directory."""
    BESIDE[kind](run)
    (temporary := tmp_path / "tmp").mkdir()

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    env = environment(tmp_path) | {"VITALSD_STATE_DIR": str(run.parents[1]), "TMPDIR": str(temporary)}
    code = (
        "import sys, pathlib; from vitalsd.recording.replay_file import *\n"
        "from vitalsd.recording.run_reader import UnreadableRunError\n"
        "try: read_replay_file(pathlib.Path(sys.argv[1]))\n"
        "except (UnreadableRunError, OSError) as error: print(error)\n"
    )
    for command in ([*VITALSD, "runs"], [sys.executable, "-c", code, str(run)]):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, preexec_fn=limits)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) <= 1
    assert list(temporary.iterdir()) == []


def test_lock_that_is_no_regular_file_counts_as_not_held(run: Path) -> None:
    """The run has crashed, and does not pass for one that is being written."""
    lock = run.with_suffix(".lock")
    lock.unlink()
    os.mkfifo(lock)
    assert not is_being_written(run)
    lock.unlink()
    lock.symlink_to("/dev/null")
    assert not is_being_written(run)


# A full disk


@root_only
@pytest.mark.parametrize("kind", ["run", "logged"])
def test_crashed_run_is_in_the_report_if_disk_and_temporary_directories_are_full(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As on a machine with one file system: it is listed, and its record is read."""
    run: Path = request.getfixturevalue(kind)
    (disk := tmp_path / "disk").mkdir()
    code = (
        "import os, pathlib, shutil, subprocess, sys\n"
        "from vitalsd.report.previous_run import ReportSubject, find\n"
        "from vitalsd.recording.run_directory import RunDirectory\n"
        "disk, made = map(pathlib.Path, sys.argv[1:])\n"
        "def mount(*options): subprocess.run(['mount', *options], check=True)\n"
        "mount('-t', 'tmpfs', '-o', 'size=1m', 'none', str(disk))\n"
        "shutil.copytree(made, disk / 'runs')\n"
        "try:\n"
        "    with open(disk / 'ballast', 'wb', buffering=0) as file:\n"
        "        while file.write(bytes(4096)): pass\n"
        "except OSError: pass\n"
        "for each in '/var/tmp', '/dev/shm', '/tmp': mount('--bind', str(disk), each)\n"
        "os.chdir('/tmp')\n"
        "(run,) = RunDirectory(pathlib.Path('/tmp/runs')).runs()\n"
        "found = find(RunDirectory(pathlib.Path('/tmp/runs')), ReportSubject(), run.id)\n"
        "print(run.state, len(found.record))\n"
    )
    command = ["unshare", "-m", sys.executable, "-c", code, str(disk), str(run.parent)]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"crashed {describe(run).snapshots}\n", done.stderr


def test_run_is_read_where_sqlite_has_no_deserialize(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with SQLite before 3.36: a copy in a private directory, of which nothing is left."""

    class Older(sqlite3.Connection):
        @property
        def deserialize(self) -> None:  # type: ignore[override]
            raise AttributeError

    expected = read_run(logged)[0]
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Older))
    assert read_run(logged)[0] == expected


# The log, read by hand


def numbers_in(path: Path) -> list[int]:
    """The content as SQLite reads it, from a copy that it may change."""
    copy = path.with_name("copy")
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    try:
        with closing(sqlite3.connect(copy)) as db:
            return [number for (number,) in db.execute("SELECT length(x) FROM t ORDER BY rowid")]
    except sqlite3.DatabaseError:
        return [-1]


def numbers_of(image: bytearray) -> list[int]:
    with closing(sqlite3.connect(":memory:")) as db:
        try:
            db.deserialize(image)
            return [number for (number,) in db.execute("SELECT length(x) FROM t ORDER BY rowid")]
        except sqlite3.DatabaseError:
            return [-1]


@pytest.mark.parametrize("page_bytes", [512, 4096, 65536])
def test_read_image_equals_what_sqlite_reads(tmp_path: Path, page_bytes: int) -> None:
    """After transactions, rollbacks, checkpoints, and whatever a log is cut to or overwritten with."""
    dice, path = random.Random(page_bytes), tmp_path / "run.sqlite"
    steps = 120 if page_bytes < 65536 else 40  # The checksum of a log of large pages takes long.
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA page_size = {page_bytes}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {dice.randrange(5, 50)}")
        db.execute("CREATE TABLE t (x BLOB)")
        compared = 0
        for step in range(steps):
            db.execute("BEGIN")
            for _ in range(dice.randrange(1, 6)):
                db.execute("INSERT INTO t VALUES (?)", (dice.randbytes(dice.randrange(2 * page_bytes)),))
            if dice.randrange(6) == 0:
                db.execute("DELETE FROM t WHERE rowid % 3 = 0")
            db.execute("ROLLBACK" if dice.randrange(8) == 0 else "COMMIT")
            if dice.randrange(25) == 0:
                db.execute(f"PRAGMA wal_checkpoint({dice.choice(['PASSIVE', 'TRUNCATE', 'RESTART'])})")
            assert numbers_of(read_image(path)) == numbers_in(path), step
            damaged = tmp_path / "damaged.sqlite"
            shutil.copyfile(path, damaged)
            log = bytearray(Path(f"{path}-wal").read_bytes())
            if log:
                at = dice.randrange(len(log))
                log[at : at + 1] = dice.choice([b"\xff", b"", b"\0", dice.randbytes(3)])
                Path(f"{damaged}-wal").write_bytes(log[: dice.randrange(1, len(log) + 1)])
                found = numbers_in(damaged)
                compared += found != [-1]
                assert numbers_of(read_image(damaged)) == found, (step, at)
        assert compared > steps // 3


def test_run_read_during_writes_is_always_complete(tmp_path: Path) -> None:
    """By another process, and by this one: marks are a row of numbers without a gap, and never fewer than before."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from support.fake_process import IDENTITY, Process; from recording.test_black_box import write\n"
        "box, record = write(pathlib.Path(sys.argv[1]), [Process().snapshot()]); print('up', flush=True)\n"
        "for number in range(10**6):\n"
        "    done = box.write_mark(record.add_mark(f'{number:06}' + 150 * 'x'))\n"
        "    done.result(30) if done else None\n"
        "    number % 100 or box.flush()\n"
    )
    here = str(TESTS)
    command = [sys.executable, "-c", code, str(tmp_path), here]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "up\n"
            (path,) = tmp_path.glob("*.sqlite")
            last, reads = -1, 0
            deadline = time.monotonic() + 60
            while reads < 150 and time.monotonic() < deadline:
                run, record = read_run(path)
                assert run.state == "running"
                numbers = [int(mark.label[:6]) for mark in record.marks]
                if numbers:
                    assert numbers == list(range(numbers[0], numbers[-1] + 1))
                    assert numbers[-1] >= last
                    last = numbers[-1]
                reads += 1
            assert last > 1000
        finally:
            writer.kill()


def test_planted_log_is_bounded(run: Path) -> None:
    """A log that says the database has 2^31 pages, with right checksums."""
    from vitalsd.recording.run_image import FRAME_HEADER, LOG_HEADER, LOG_MAGIC, _checksum, _words

    head = LOG_HEADER.pack(LOG_MAGIC, 3007000, 4096, 0, 1, 2, 0, 0)
    checksum = _checksum(_words(head[:24], False), (0, 0))
    head = head[:24] + b"".join(number.to_bytes(4, "big") for number in checksum)
    page = bytes(4096)
    first = FRAME_HEADER.pack(2**31, 2**31, 1, 2, 0, 0)
    checksum = _checksum(_words(first[:8] + page, False), checksum)
    frame = FRAME_HEADER.pack(2**31, 2**31, 1, 2, *checksum) + page
    Path(f"{run}-wal").write_bytes(head + frame)
    with pytest.raises(UnreadableRunError, match="with its log; a run has at most"):
        read_run(run)
    RunDirectory(run.parent).recover_crashed_runs()
    assert run.stat().st_size < 1 << 20


# Files of other programs


def databases(directory: Path, count: int, size: int) -> list[Path]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = []
    for number in range(count):
        path = directory / f"project-{number}.sqlite"
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE notes (text)")
            db.execute("INSERT INTO notes VALUES (zeroblob(?))", (size,))
            db.commit()
        os.utime(path, (number + 1, number + 1))
        made.append(path)
    return made


def test_serve_deletes_no_database_of_another_program(short_path: Path) -> None:
    """As in a project that has its own directory ``runs``: 4 of 20 MiB, which is more than runs may take."""
    files = databases(short_path / "state" / "runs", 4, 20 << 20)
    (short_path / "state").chmod(0o700)
    with serving(short_path, "--pid", str(os.getpid()), "--record-interval", "0.05"):
        pass
    assert all(path.exists() for path in files)
    done = subprocess.run([*VITALSD, "runs"], env=environment(short_path), capture_output=True, text=True)
    assert "does not have the name of a run, so it is left alone" in done.stderr


def test_make_room_deletes_only_files_with_the_application_id(run: Path) -> None:
    """A database of another program with a name like that of a run stays; an empty file of a killed writer goes."""
    (foreign,) = databases(run.parent, 1, 100)
    foreign = foreign.rename(run.with_name(f"{run.stem}-1.sqlite"))
    empty = run.with_name(f"{run.stem}-2.sqlite")
    empty.touch(0o600)
    assert [is_own_run(path) for path in (run, foreign, empty)] == [True, False, True]
    RunDirectory(run.parent, max_bytes=1).make_room(2)
    assert [path.exists() for path in (run, foreign, empty)] == [False, True, False]


def test_new_run_avoids_a_name_with_leftover_files(tmp_path: Path) -> None:
    """SQLite would take the log or the journal of another run for that of the new one."""
    tmp_path.chmod(0o700)
    stem = f"{IDENTITY.start_id}-{os.getpid()}"
    beside = [tmp_path / f"{stem}.sqlite-journal", tmp_path / f"{stem}-1.sqlite-wal", tmp_path / f"{stem}-2.lock"]
    for path in beside[:2]:
        path.write_text("planted")
    os.mkfifo(beside[2])
    box, _ = write(tmp_path, [Process().snapshot()])
    box.close("over")
    assert box.run_id == f"{stem}-3"
    assert [path.read_text() for path in beside[:2]] == ["planted"] * 2


def test_directory_of_runs_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    """It holds files that may be for them; it is not closed to them, and the reason says what to do."""
    files = databases(tmp_path / "runs", 1, 100)
    (tmp_path / "runs").chmod(0o755)
    box, _ = write(tmp_path / "runs", [Process().snapshot()])
    assert box.error is not None
    assert "open to other users" in box.error
    assert "set VITALSD_STATE_DIR to use another" in box.error
    assert (tmp_path / "runs").stat().st_mode & 0o777 == 0o755
    assert list((tmp_path / "runs").iterdir()) == files
    box.close("over")
