"""How long threads wait for a CPU, beside the kernel's own counters, which another parser reads."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from support import tools
from support.paths import SUPPORT
from support.sidecars import eventually
from support.target import spin
from vitalsd.contract.encoding import encode
from vitalsd.snapshot import Measurement, Part, Snapshot, measure
from vitalsd.sources.linux.cpu_counters import CommFiles, SchedstatFiles
from vitalsd.sources.linux.source import LinuxSource
from vitalsd.sources.linux.thread_times import ThreadTimes
from vitalsd.sources.linux.threads import ThreadList

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MS = 1_000_000
MISSING = "wait_percent: this kernel does not count how long a thread waits for a CPU (schedstat): null"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to prefer a thread to other programs")

Burners = Callable[[int], list[int]]


@pytest.fixture(scope="module")
def program(module_path: Path) -> Path:
    built = module_path / "odd_target"
    source = SUPPORT / "programs" / "odd_target.c"
    subprocess.run([tools.program("cc", package="gcc"), "-O1", "-pthread", "-o", built, source], check=True)
    return built


@pytest.fixture
def burners(program: Path) -> Iterator[Burners]:
    """
    Starts a process with threads that burn, all on one CPU; returns the ids of its main thread and of these.

    The scheduler divides a CPU between sessions first. Root gives this one nearly all of it, beside other programs.
    """
    with ExitStack() as stack:

        def started(count: int) -> list[int]:
            process = stack.enter_context(
                subprocess.Popen(
                    [program, "burners", str(count)], stdout=subprocess.PIPE, start_new_session=True, bufsize=0
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            tids = sorted(map(int, os.listdir(f"/proc/{process.pid}/task")))
            assert len(tids) == count + 1
            for tid in tids:
                os.sched_setaffinity(tid, {cpus()[-1]})  # type: ignore[attr-defined, unused-ignore]
            with suppress(OSError):
                Path(f"/proc/{process.pid}/autogroup").write_text("-20", encoding="ascii")
            return tids

        yield started


def cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))  # type: ignore[attr-defined, unused-ignore]


def kernel_wait_ns(pid: int, tid: int) -> int:
    """Return what the kernel shows now; shares no code with vitalsd."""
    return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text(encoding="ascii").split(" ")[1])


def wait_of(snapshot: Snapshot, tid: int) -> int:
    assert snapshot.thread_wait_ns is not None
    return snapshot.thread_wait_ns[snapshot.roster.tids.index(tid)]


def percents(m: Measurement, tid: int) -> tuple[float, float]:
    """Return how much of the window a thread ran and waited."""
    index = m.last.roster.tids.index(tid)
    assert m.thread_wait_ns is not None
    return 100 * m.thread_cpu_ns[index] / m.elapsed_ns, 100 * m.thread_wait_ns[index] / m.elapsed_ns


@as_root
@pytest.mark.parametrize("windows", [3, pytest.param(20, id="torture", marks=pytest.mark.torture)])
def test_two_threads_on_one_cpu_run_or_wait_all_the_time(burners: Burners, windows: int) -> None:
    """
    Run and wait of each add up to 100 % within 3, and the process waited as long as both.

    A wait in progress is missing, so a window begins and ends where none is long: both have just run and waited.
    """
    pid, *tids = burners(2)
    with closing(LinuxSource(pid)) as source:

        def alternating() -> Snapshot | None:
            first = source.snapshot()
            time.sleep(0.015)
            last = source.snapshot()
            brief = last.monotonic_ns - first.monotonic_ns < 20 * MS
            return last if brief and all(min(percents(measure(first, last), tid)) > 5 for tid in tids) else None

        last: Snapshot = eventually(alternating, timeout_s=20)
        for _ in range(windows):
            time.sleep(1)
            first, last = last, eventually(alternating, timeout_s=20)
            m = measure(first, last)
            for tid in tids:
                run, wait = percents(m, tid)
                assert run + wait == pytest.approx(100, abs=3)
                assert wait > 20
            assert m.thread_wait_ns is not None
            assert m.wait_ns == sum(m.thread_wait_ns)
            assert last.wait_error_ns is None
            assert last.cpu_count == os.cpu_count()


def test_wait_lies_between_readings_of_the_kernel(burners: Burners) -> None:
    """
    A window has no less wait than the kernel added inside it, and no more than it added around it.

    Each snapshot reads all threads: a thread that got a CPU just now is not read again until its process's clock has
    advanced, at a tick.
    """
    pid, *tids = burners(2)
    with closing(LinuxSource(pid)) as source:

        def read() -> Snapshot:
            source.restart()
            return source.snapshot()

        for _ in range(10):
            outer = [kernel_wait_ns(pid, tid) for tid in tids]
            first = read()
            inner = [kernel_wait_ns(pid, tid) for tid in tids]
            time.sleep(0.1)
            inner = [kernel_wait_ns(pid, tid) - before for tid, before in zip(tids, inner, strict=True)]
            last = read()
            outer = [kernel_wait_ns(pid, tid) - before for tid, before in zip(tids, outer, strict=True)]
            for tid, least, most in zip(tids, inner, outer, strict=True):
                assert least <= wait_of(last, tid) - wait_of(first, tid) <= most


def test_sum_of_waits_grows_as_those_of_the_threads(burners: Burners) -> None:
    """It has what the waits grew by since the source was opened."""
    pid, *_ = burners(2)
    with closing(LinuxSource(pid)) as source:

        def sums() -> tuple[int, int]:
            snapshot = source.snapshot()
            assert snapshot.thread_wait_ns is not None
            assert snapshot.wait_ns is not None
            return snapshot.wait_ns, sum(snapshot.thread_wait_ns)

        first_ns, first_threads_ns = sums()
        for _ in range(5):
            time.sleep(0.05)
            last_ns, last_threads_ns = sums()
            assert last_ns - first_ns == last_threads_ns - first_threads_ns
        eventually(lambda: sums()[0] > first_ns)


@as_root
def test_thread_alone_on_a_cpu_waits_for_less_than_five_percent(burners: Burners) -> None:
    """
    Other programs do not run beside a real-time thread, but for 50 ms in 1 s, which the kernel keeps for them.

    So every other window is free of them. Where the class is not allowed, they get a hundredth of the CPU.
    """
    pid, tid = burners(1)
    with suppress(PermissionError):
        os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(50))  # type: ignore[attr-defined, unused-ignore]
    found = []
    with closing(LinuxSource(pid)) as source:

        def alone() -> bool:
            first = source.snapshot()
            time.sleep(0.3)
            found.append(percents(measure(first, source.snapshot()), tid))
            run, wait = found[-1]
            return run > 90 and wait <= 5

        eventually(alone, timeout_s=30)


@contextmanager
def starving(burners: Burners) -> Iterator[tuple[LinuxSource, int, int]]:
    """A thread at nice -20 and, beside it, a thread of the class SCHED_IDLE, which waits and runs hardly ever."""
    pid, winner, loser = burners(2)
    os.setpriority(os.PRIO_PROCESS, winner, -20)
    os.sched_setscheduler(loser, os.SCHED_IDLE, os.sched_param(0))  # type: ignore[attr-defined, unused-ignore]
    with closing(LinuxSource(pid)) as source:
        yield source, winner, loser


@as_root
def test_thread_that_waits_through_a_window_is_runnable(burners: Burners) -> None:
    """The kernel adds the wait when it ends, so the counter is still; the state shows it."""
    with starving(burners) as (source, winner, loser):

        def still() -> Measurement | None:
            first = source.snapshot(parts=Part.DETAIL)
            time.sleep(0.2)
            m = measure(first, source.snapshot(parts=Part.DETAIL))
            return m if percents(m, loser)[0] == 0 < percents(m, winner)[0] else None

        m: Measurement = eventually(still, timeout_s=30)
        answer = json.loads(encode(m, source.identity(), requested_ms=200, detail="full"))
    states = {thread["tid"]: thread["state"] for thread in answer["threads"]}
    assert states == {source.identity().pid: "sleeping", winner: "running", loser: "runnable"}


@as_root
@pytest.mark.skipif(sys.platform == "linux" and len(cpus()) < 2, reason="needs two CPUs")
def test_wait_of_earlier_windows_is_cut_to_the_window_in_which_it_ended(burners: Burners) -> None:
    """
    A thread that moves to another CPU has its wait added at once, also what it waited before the window.

    Of so few threads each snapshot reads all. Of many it may read the wait of a thread that did not run later.
    """
    with starving(burners) as (source, _, loser):

        def moved() -> Measurement | None:
            os.sched_setaffinity(loser, {cpus()[-1]})  # type: ignore[attr-defined, unused-ignore]
            time.sleep(1)
            first = source.snapshot()
            os.sched_setaffinity(loser, {cpus()[0]})  # type: ignore[attr-defined, unused-ignore]
            time.sleep(0.1)
            m = measure(first, source.snapshot())
            return m if wait_of(m.last, loser) - wait_of(first, loser) > m.elapsed_ns + 300 * MS else None

        m: Measurement = eventually(moved, timeout_s=40)
    index = m.last.roster.tids.index(loser)
    assert m.thread_wait_ns is not None
    assert m.thread_wait_ns[index] == m.elapsed_ns - m.thread_cpu_ns[index]
    (warning,) = m.warnings
    assert warning.startswith("a thread waited for a CPU for ")
    assert warning.endswith(" s before the window, which ended in it")


@contextmanager
def limited(pid: int) -> Iterator[None]:
    """Let a process use 20 ms of CPU in 100 ms, by a control group of either version."""
    v1 = Path("/sys/fs/cgroup/cpu")
    top = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
    group = top / f"vitalsd-test-{pid}"
    try:
        group.mkdir()
        if v1.is_dir():
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text("20000")
        else:
            (group / "cpu.max").write_text("20000 100000")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group with a CPU quota can be made here: {error}")
    try:
        yield
    finally:
        (top / "cgroup.procs").write_text(str(pid))
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@as_root
def test_throttling_by_a_cpu_quota_counts_as_waiting(burners: Burners) -> None:
    """The thread runs for a fifth of the time at most, and waits for the rest; the window is from wait to wait."""
    pid, tid = burners(1)
    with limited(pid), closing(LinuxSource(pid)) as source:

        def after_a_wait() -> Snapshot:
            known_ns = wait_of(source.snapshot(), tid)
            found: Snapshot = eventually(lambda: wait_of(s := source.snapshot(), tid) > known_ns and s, timeout_s=20)
            return found

        after_a_wait()
        first = after_a_wait()
        time.sleep(2)
        run, wait = percents(measure(first, after_a_wait()), tid)
    assert run <= 30
    assert wait >= 65
    assert run + wait <= 100.1


def test_own_thread_that_ran_has_its_present_wait() -> None:
    """The clocks of our own threads show no waits, so the files of those that ran are read."""
    done, go = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        while go.acquire() and not done.is_set():
            spin(5)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    pid = os.getpid()
    descriptors = set(os.listdir("/proc/self/fd"))
    with closing(LinuxSource()) as source:
        kept = len(os.listdir("/proc/self/fd")) - len(descriptors)
        snapshot, compared = source.snapshot(), 0
        for _ in range(20):
            for _ in threads:
                go.release()
            time.sleep(0.03)
            tids = [thread.native_id or 0 for thread in threads]
            before = [kernel_wait_ns(pid, tid) for tid in tids]
            last, snapshot = snapshot, source.snapshot()
            after = [kernel_wait_ns(pid, tid) for tid in tids]
            for tid, least, most in zip(tids, before, after, strict=True):
                assert wait_of(snapshot, tid) <= most
                if percents(measure(last, snapshot), tid)[0] > 0:
                    assert wait_of(snapshot, tid) >= least
                    compared += 1
        assert compared >= 20
        assert snapshot.source == "clock_gettime"
        assert kept == len(os.listdir("/proc/self/fd")) - len(descriptors)
        assert kept < 8
    done.set()
    for _ in threads:
        go.release()
    for thread in threads:
        thread.join()


def test_own_threads_that_exit_while_their_waits_are_read_do_not_fail_the_snapshot() -> None:
    """The sum of the waits never decreases, whatever threads start and exit."""
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            thread = threading.Thread(target=spin, args=(0.2,))
            thread.start()
            thread.join()

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with closing(LinuxSource()) as source:
            waited_ns = 0
            for _ in range(300):
                snapshot = source.snapshot()
                assert snapshot.wait_ns is not None
                assert snapshot.thread_wait_ns is not None
                assert len(snapshot.thread_wait_ns) == len(snapshot.roster)
                assert snapshot.wait_ns >= waited_ns
                waited_ns = snapshot.wait_ns
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_own_process_without_schedstat_has_no_waits(tmp_path: Path) -> None:
    """On a kernel without CONFIG_SCHED_INFO; the clocks of the threads are read all the same."""
    pid = os.getpid()
    (tmp_path / "self").symlink_to(str(pid))
    for name in (f"{pid}/stat", f"{pid}/statm", f"{pid}/status"):
        copy(name, tmp_path)
    for tid in os.listdir("/proc/self/task"):
        for name in ("stat", "statm", "status", "comm"):
            with suppress(FileNotFoundError):
                copy(f"{pid}/task/{tid}/{name}", tmp_path)
    with closing(LinuxSource(root=str(tmp_path))) as source:
        first = source.snapshot(parts=Part.DETAIL)
        spin(20)
        m = measure(first, source.snapshot(parts=Part.DETAIL))
    assert m.last.source == "clock_gettime"
    assert m.cpu_ns >= 20 * MS
    assert (m.last.thread_wait_ns, m.last.wait_ns) == (None, None)
    assert (m.thread_wait_ns, m.wait_ns) == (None, None)
    assert m.warnings.count(MISSING) == 1


def copy(name: str, root: Path) -> None:
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(Path("/proc", name).read_bytes())


class Task:
    """A ``task/`` directory of files with the times of threads; births are in ticks."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, tid: int, run_ns: int, wait_ns: int, birth: int = 1) -> None:
        directory = self.root / str(tid)
        directory.mkdir(exist_ok=True)
        (directory / "stat").write_text(f"{tid} (a) S 1 1 1 0 0 0 0 0 0 0 0 0 0 0 20 0 1 0 {birth} 1 1 1\n")
        (directory / "schedstat").write_text(f"{run_ns} {wait_ns} 1\n")

    def remove(self, tid: int) -> None:
        for file in (self.root / str(tid)).iterdir():
            file.unlink()
        (self.root / str(tid)).rmdir()


@contextmanager
def times_of(task: Task) -> Iterator[ThreadTimes]:
    task_fd = os.open(task.root, os.O_RDONLY)
    table = ThreadList(
        task_fd, SchedstatFiles(task_fd, 0), CommFiles(task_fd, 0)
    )  # Each file is opened when it is read.
    try:
        yield ThreadTimes(table)
    finally:
        table.close()
        os.close(task_fd)


def test_wait_of_a_thread_that_executes_a_program_counts_once(tmp_path: Path) -> None:
    """It gets the id and the birth of the main thread, and keeps its times; the sum has seen its wait already."""
    task = Task(tmp_path)
    task.write(10, run_ns=900, wait_ns=5)
    task.write(11, run_ns=100, wait_ns=70, birth=2)
    with times_of(task) as times:
        task.write(11, run_ns=200, wait_ns=80, birth=2)
        times.read(lambda: 0)
        assert (times.wait_ns, times.waited_ns) == ([5, 80], 10)
        task.remove(11)
        task.write(10, run_ns=201, wait_ns=81)
        times.read(lambda: 0)
        assert (times.wait_ns, times.waited_ns) == ([81], 10)
        task.write(10, run_ns=202, wait_ns=91)
        times.read(lambda: 0)
        assert (times.wait_ns, times.waited_ns) == ([91], 20)


def test_wait_of_a_thread_that_a_listing_missed_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a listing that failed for lack of descriptors, the threads found next are not new ones."""
    task = Task(tmp_path)
    task.write(10, run_ns=900, wait_ns=5)
    task.write(11, run_ns=100, wait_ns=70)
    with times_of(task) as times:
        task.write(12, run_ns=10, wait_ns=3, birth=9)
        real = os.open

        def scarce(path: str, flags: int, **options: int) -> int:
            if path.startswith("11/"):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, flags, **options)

        monkeypatch.setattr("vitalsd.sources.linux.cpu_counters.os.open", scarce)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            times.read(lambda: 0)
        monkeypatch.undo()
        times.read(lambda: 0)
        assert times.wait_ns == [5, 70, 3]
        assert times.waited_ns == 0
        task.write(13, run_ns=10, wait_ns=4, birth=10)
        times.read(lambda: 0)
        assert times.waited_ns == 4
