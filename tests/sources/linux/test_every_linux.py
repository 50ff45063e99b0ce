"""Faults that public reports of similar projects describe, on the running kernel: docs/reliability.md has the table."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support import tools
from support.paths import SUPPORT
from support.serving import Serving
from support.sidecars import VITALSD, ask, environment, eventually, serving
from vitalsd.snapshot import Part, measure
from vitalsd.sources import list_processes
from vitalsd.sources.linux.procfs import parse_stat
from vitalsd.sources.linux.source import LinuxSource
from vitalsd.sources.platform import process_identities

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for another user, a namespace or a freezer")

SOURCE = SUPPORT / "programs" / "linux_cases.c"
STRANGER = SUPPORT / "stranger.py"
PRIVATE_MOUNTS = ("unshare", "-m", "--propagation", "private")
MS = 1_000_000
OTHER_UID = 65534

Begin = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def program(module_path: Path) -> Path:
    module_path.chmod(0o755)  # other users execute it
    built = module_path / "linux_cases"
    compiler = tools.program("cc", package="gcc")
    subprocess.run([compiler, "-O1", "-pthread", "-o", built, SOURCE], check=True)
    return built


@pytest.fixture
def begin(program: Path) -> Iterator[Begin]:
    """Starts a case, and returns when it has said that it is so far."""
    with ExitStack() as stack:

        def started(*arguments: str, before: Sequence[str] = (), **options: Any) -> "subprocess.Popen[bytes]":
            command = [*before, str(program), *arguments]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **options)
            stack.callback(ended, process)
            assert process.stdout is not None
            assert process.stdout.readline()
            return process

        yield started


def ended(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()


def go_on(process: "subprocess.Popen[bytes]") -> None:
    """Give a case its line, and wait until it is so far again."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    assert process.stdout.readline()


def no_more_than_its_process(table: dict[str, Any]) -> bool:
    """Return whether no cell of a thread is above that of the process, within 10 ms."""
    return all(
        cell is None or cell * elapsed_ms / 100 <= process * elapsed_ms / 100 + 10
        for thread in table["threads"]
        for cell, process, elapsed_ms in zip(
            thread["cpu_percent"], table["cpu_percent"], table["elapsed_ms"], strict=True
        )
    )


# CPU time of the right thread


def test_exec_by_a_second_thread_leaves_a_null_row_in_the_recording(begin: Begin, short_path: Path) -> None:
    """The row of the exec has no figure for the thread, those around it have, and the event is there."""
    target = begin("exec", "600")
    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "0.1") as server:
        eventually(lambda: len(server.get("/history")["time_ms"]) >= 2)
        go_on(target)
        rows = len(server.get("/history")["time_ms"])
        table = eventually(lambda: len((found := server.get("/history"))["time_ms"]) > rows + 2 and found)
        trailing = server.get("/metrics", mode="trailing", window_ms=60000, detail="full")
        basic = server.get("/metrics", mode="trailing", window_ms=60000)
    assert no_more_than_its_process(table)
    (main,) = (thread["cpu_percent"] for thread in table["threads"] if thread["tid"] == target.pid)
    assert main.count(None) == 1
    assert main[0] is not None
    assert main[-1] is not None
    assert "executed" in [event["kind"] for event in table["events"]]
    assert [thread["cpu_percent"] for thread in trailing["threads"]] == [None]
    assert [thread["cpu_percent"] for thread in basic["threads"]] == [0.0]
    assert basic["process"] == {key: trailing["process"][key] for key in basic["process"]}


def test_exec_by_a_second_thread_is_null_in_csv_and_runs(begin: Begin, short_path: Path) -> None:
    """The file of the run has what the record has."""
    target = begin("exec", "600")
    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "0.1") as server:
        eventually(lambda: len(server.get("/history")["time_ms"]) >= 2)
        go_on(target)
        rows = len(server.get("/history")["time_ms"])
        eventually(lambda: len(server.get("/history")["time_ms"]) > rows + 2)
        csv = server.client.get("/history", headers={"Accept": "text/csv"}).text.splitlines()
        (run,) = server.get("/runs")
        stored = server.get(f"/runs/{run['id']}/history")
    assert no_more_than_its_process(stored)
    column = next(i for i, name in enumerate(csv[0].split(",")) if name.startswith(f"{target.pid} "))
    cells = [line.split(",")[column] for line in csv[1:]]
    assert cells.count("") == 1
    assert all(float(cell) < 150 for cell in cells if cell)


@pytest.mark.parametrize("before", [(), ("setarch", "-R")])
def test_exec_of_the_same_program_is_detected(begin: Begin, before: Sequence[str]) -> None:
    """It is detected without address randomisation too, by another memory map."""
    target = begin("again", "300", before=before, env={"STAGE": "1"})
    with closing(LinuxSource(target.pid)) as source:
        first = source.snapshot()
        go_on(target)
        m = measure(first, source.snapshot())
        assert m.contradiction is None
    assert m.unknown == {0}
    assert m.last.image != m.first.image
    assert m.cpu_ns < 100 * MS


class Snapshots:
    """Snapshots of a process as another user takes them."""

    def __init__(self, pid: int, hidepid: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(STRANGER), str(hidepid), "snapshots", str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def take(self) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        ended(self.process)


@as_root
def test_exec_of_another_users_process_is_detected(begin: Begin) -> None:
    """The kernel hides its addresses."""
    target = begin("again", "300", env={"STAGE": "1"})
    with closing(Snapshots(target.pid)) as stranger:
        before = stranger.take()
        go_on(target)
        after = stranger.take()
    assert before["addresses"] == 0
    assert before["image"] != after["image"]


@as_root
def test_exec_of_another_users_process_charges_no_window(begin: Begin, short_path: Path) -> None:
    """Neither `/metrics` nor the record counts it, in a sidecar that may not trace the process."""
    target = begin("again", "600", env={"STAGE": "1"})
    stranger = (sys.executable, str(STRANGER), "0")
    os.chmod(short_path, 0o777)
    options = ("--pid", str(target.pid), "--record-interval", "0.1", "--no-black-box")
    with serving(short_path, *options, program=stranger) as (_, ready):
        url = ready["url"]
        eventually(lambda: len(ask(url, "/history")[1]["time_ms"]) >= 2)
        go_on(target)
        rows = len(ask(url, "/history")[1]["time_ms"])
        table = eventually(lambda: len((found := ask(url, "/history")[1])["time_ms"]) > rows + 2 and found)
        _, trailing = ask(url, "/metrics?mode=trailing&window_ms=60000")
    assert no_more_than_its_process(table)
    assert "executed" in [event["kind"] for event in table["events"]]
    assert [thread["cpu_percent"] for thread in trailing["threads"]] == [0.0]


# Kernels without run times


@as_root
@pytest.mark.parametrize("covered", [None, "0 0 0\n"])
def test_kernel_that_counts_no_run_times_is_read_by_stat(begin: Begin, tmp_path: Path, covered: str | None) -> None:
    """It is detected before the main thread has used 10 ms: every thread reads 0, and the process has run."""
    target = begin("worker")
    zeros = tmp_path / "zeros"
    zeros.write_text(covered or "")
    code = """
import json, os, subprocess, sys, time
from vitalsd.sampling.sampler import sample
from vitalsd.sources.linux.source import LinuxSource
pid, zeros = int(sys.argv[1]), sys.argv[2]
early = LinuxSource(pid, fd_budget=0)
early.snapshot()
if zeros:
    for tid in os.listdir(f"/proc/{pid}/task"):
        subprocess.run(["mount", "--bind", zeros, f"/proc/{pid}/task/{tid}/schedstat"], check=True)
late = LinuxSource(pid)
ms = [sample(source, 400) for source in (late, early)]
again = sample(early, 400)
print(json.dumps([[m.last.source, m.cpu_ns, list(m.thread_cpu_ns), len(m.unknown)] for m in (*ms, again)]))
"""
    done = subprocess.run(
        [*PRIVATE_MOUNTS, sys.executable, "-c", code, str(target.pid), str(zeros) if covered else ""],
        capture_output=True,
        text=True,
        check=True,
    )
    late, _, again = json.loads(done.stdout)
    for source, cpu_ns, (main_ns, worker_ns), unknown in (late, again):
        assert source == ("stat" if covered else "schedstat")
        assert unknown == 0
        assert main_ns <= 20 * MS
        assert worker_ns == pytest.approx(cpu_ns, abs=40 * MS)


# No boot id

MOUNTED = 'mount -t proc -o subset=pid proc /proc && exec "$@"'


@as_root
def test_serve_start_and_spawn_work_without_a_boot_id(short_path: Path) -> None:
    """Under ``ProcSubset=pid`` /proc has only processes; discovery finds the sidecars."""
    code = """
import json, os, urllib.request
import vitalsd, vitalsd_client
from vitalsd.discovery.runtime_file import discover
assert not os.path.exists("/proc/sys")
answers = []
with vitalsd.spawn(port=0) as spawned:
    found = [endpoint.boot_id for endpoint in discover()]
    answers.append(vitalsd_client.fetch(50).platform)
sidecar = vitalsd.start(port=0)
found += [endpoint.boot_id for endpoint in discover()]
answers.append(json.load(urllib.request.urlopen(sidecar.url + "/metrics?window_ms=50"))["platform"])
sidecar.stop()
print(json.dumps([found, answers]))
"""
    done = subprocess.run(
        [*PRIVATE_MOUNTS, "sh", "-c", MOUNTED, "sh", sys.executable, "-c", code],
        env=environment(short_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["unknown", "unknown"], ["linux", "linux"]]
    assert "Traceback" not in done.stderr


# Names


def test_names_given_to_sleeping_threads_are_in_the_next_answer(begin: Begin) -> None:
    """All of 200, by another thread of the program; the window ends after the renames."""
    target = begin("pool", "200")
    with closing(LinuxSource(target.pid)) as source:
        source.snapshot()
        go_on(target)
        last = source.snapshot()
    assert sorted(last.roster.names) == sorted(["linux_cases", *(f"job-{i}" for i in range(200))])


def test_names_given_to_sleeping_threads_are_recorded_within_two_seconds(begin: Begin, short_path: Path) -> None:
    """No caller asked for a window meanwhile."""
    target = begin("pool", "40")
    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "0.5") as server:
        eventually(lambda: server.get("/history", top=100)["time_ms"])
        go_on(target)
        renamed = time.monotonic()

        def named() -> bool:
            return {t["name"] for t in server.get("/history", top=100)["threads"]} >= {f"job-{i}" for i in range(40)}

        eventually(named)
        assert time.monotonic() - renamed < 2.5


def test_main_thread_that_renames_itself_renames_its_process(start: Callable[..., Any], short_path: Path) -> None:
    """The new name is in `/info` and in the run on disk."""
    target = start()
    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "0.2") as server:
        eventually(lambda: server.get("/history")["time_ms"])
        target.ask(f"name {b'renamed'.hex()}")
        eventually(lambda: server.get("/info")["target"]["name"] == "renamed")
        eventually(lambda: [run["name"] for run in server.get("/runs")] == ["renamed"])
        assert server.get("/metrics", detail="full", window_ms=50)["target"]["name"] == "renamed"


def test_script_is_found_by_its_full_name(tmp_path: Path) -> None:
    """Its interpreter and the 15 bytes that the kernel keeps are names of it too; an option may stand between."""
    script = tmp_path / "my-long-backup-script.sh"
    for head in ("#!/bin/sh", "#!/bin/sh -e"):
        script.write_text(f"{head}\nread line\n")
        script.chmod(0o755)
        with subprocess.Popen([script], stdin=subprocess.PIPE) as process:
            names = eventually(partial(names_of, process.pid, script.name))
            assert names == {"my-long-backup-", "my-long-backup-script.sh", "sh"}
            process.communicate(b"\n")


def names_of(pid: int, name: str) -> frozenset[str] | None:
    """Names of a process in the list, once `name` is one of them."""
    return next((each.names for each in list_processes() if each.pid == pid and name in each.names), None)


def test_name_of_a_process_tree_selects_its_root_with_a_note(tmp_path: Path) -> None:
    """The children are newer; a process between them has another name."""
    program = tmp_path / f"tree{os.getpid()}"
    shutil.copy(os.path.realpath("/bin/sh"), program)
    inner = f"{program} -c 'echo; read line <&3' & wait"
    outer = f'exec 3<&0; /bin/sh -c "{inner}" & read line <&3'
    root = subprocess.Popen([program, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert root.stdout is not None
        assert root.stdout.readline()
        done = subprocess.run(
            [*VITALSD, "sample", "--name", program.name, "--window-ms", "20", "--detail", "full"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["target"]["pid"] == root.pid
        assert done.stderr == (
            f"vitalsd: 2 processes are called {program.name}; process {root.pid} is taken: the others descend from it\n"
        )
    finally:
        root.communicate()


# A main thread that has exited


def test_process_with_an_exited_main_thread_is_read_through_another(begin: Begin) -> None:
    """Descriptors, peak, swap and RSS, in the answer and in the list of processes."""
    target = begin("leave")
    eventually(lambda: parse_stat(Path(f"/proc/{target.pid}/stat").read_bytes()).state == "Z")
    (living,) = (tid for tid in os.listdir(f"/proc/{target.pid}/task") if int(tid) != target.pid)
    with closing(LinuxSource(target.pid)) as source:
        taken = source.snapshot(parts=Part.DETAIL)
    assert taken.figures is not None
    assert taken.figures.open_fds == len(os.listdir(f"/proc/{target.pid}/task/{living}/fd")) >= 10
    status = Path(f"/proc/{target.pid}/task/{living}/status").read_text()
    assert f"VmHWM:\t{(taken.figures.peak_rss_bytes or 0) // 1024:8} kB" in status
    assert taken.figures.swap_bytes is not None
    assert taken.warnings == ()
    assert taken.rss_bytes > 0

    def entry_and_snapshot_agree() -> bool:  # the resident set moves for a moment after the exit of the main thread
        entry = next(each for each in list_processes() if each.pid == target.pid)
        with closing(LinuxSource(target.pid)) as source:
            return "linux_cases" in entry.names and entry.rss_bytes == source.snapshot().rss_bytes

    eventually(entry_and_snapshot_agree)


# Stopped and frozen


@contextmanager
def traced(begin: Begin, pid: int) -> Iterator[None]:
    tracer = begin("attach", str(pid))
    yield
    assert tracer.stdin is not None
    tracer.stdin.close()
    tracer.wait(10)


@contextmanager
def stopped(begin: Begin, pid: int) -> Iterator[None]:
    os.kill(pid, 19)
    yield
    os.kill(pid, 18)


@contextmanager
def frozen(pid: int, mount: str, file: str, on: str, off: str) -> Iterator[None]:
    group = Path(mount) / f"vitalsd-{pid}"
    try:
        group.mkdir()
        if not (group / file).exists():
            group.rmdir()
            pytest.skip(f"{mount} has no freezer")
    except OSError as error:
        pytest.skip(f"no control group can be made in {mount}: {error.strerror}")
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / file).write_text(on)
        yield
    finally:
        (group / file).write_text(off)
        (Path(mount) / "cgroup.procs").write_text(str(pid))
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def frozen_1(begin: Begin, pid: int) -> Any:
    return frozen(pid, "/sys/fs/cgroup/freezer", "freezer.state", "FROZEN", "THAWED")


def frozen_2(begin: Begin, pid: int) -> Any:
    unified = "/sys/fs/cgroup/unified"
    return frozen(pid, unified if os.path.isdir(unified) else "/sys/fs/cgroup", "cgroup.freeze", "1", "0")


HALTS = [
    (stopped, "the target is stopped by a signal (SIGSTOP, job control)"),
    (traced, "the target is stopped by a debugger"),
    (frozen_1, "the target is frozen (cgroup freezer)"),
    (frozen_2, "the target is frozen (cgroup freezer)"),
]


@as_root
@pytest.mark.parametrize(("halt", "words"), HALTS)
def test_halted_target_is_an_event_and_a_warning(
    begin: Begin, short_path: Path, halt: Callable[[Begin, int], Any], words: str
) -> None:
    """A signal, a debugger or either version of the freezer halts it; that it runs again is an event too."""
    target = begin("worker")

    def events() -> list[tuple[str, str]]:
        noted = [(event["kind"], event["detail"]) for event in server.get("/history")["events"]]
        return [each for each in noted if each[0] != "missed"]  # a busy machine

    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "0.2") as server:
        eventually(lambda: server.get("/history")["time_ms"])
        with halt(begin, target.pid):
            eventually(lambda: events() == [("stopped", words)])
            full = server.get("/metrics", detail="full", window_ms=100)
            assert full["warnings"] == [words]
            assert full["process"]["cpu_percent"] == 0
        eventually(lambda: events() == [("stopped", words), ("continued", "the target runs again")])


@as_root
def test_frozen_group_of_another_users_process_is_detected(begin: Begin) -> None:
    """The kernel function in which it waits, which only its own user can read, is not needed."""
    target = begin("idle")
    with frozen_2(begin, target.pid), closing(Snapshots(target.pid)) as stranger:
        assert stranger.take()["state"] == "frozen"


# What /proc hides


@as_root
@pytest.mark.parametrize("hidepid", [1, 2, 4])
def test_own_process_hidden_by_proc_has_that_reason(begin: Begin, hidepid: int) -> None:
    """It is not dumpable, so it is neither missing nor another user's."""
    target = begin("hidden", user=OTHER_UID, group=OTHER_UID, extra_groups=[])
    with closing(Snapshots(target.pid, hidepid)) as stranger:
        answer = stranger.take()
    assert answer["error"] == "AccessDeniedError"
    assert answer["reason"].startswith(f"process {target.pid} is yours and /proc hides it")
    assert "PR_SET_DUMPABLE" in answer["reason"]


# Another container's view


@as_root
@pytest.mark.parametrize("view", ["boot id", "no boot id", "time namespace"])
def test_running_sidecar_is_not_dead_in_another_view(begin: Begin, short_path: Path, view: str) -> None:
    """A client there finds it, and deletes nothing; nor does one outside lose it."""
    target = begin("idle")
    boot_id = short_path / "boot_id"
    boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
    command = [*VITALSD, "endpoints", "--json"]
    other_boot = f'mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$@"'
    inside = {
        "boot id": [*PRIVATE_MOUNTS, "sh", "-c", other_boot, "sh"],
        "no boot id": [*PRIVATE_MOUNTS, "sh", "-c", MOUNTED, "sh"],
        "time namespace": ["unshare", "-T", "--boottime", "1000000"],
    }[view]
    with serving(short_path, "--pid", str(target.pid)) as (process, _):
        for before in (inside, []):
            done = subprocess.run(
                [*before, *command], env=environment(short_path), capture_output=True, text=True, check=True
            )
            assert [each["pid"] for each in json.loads(done.stdout)] == [process.pid], before
            assert (short_path / "run" / f"sidecar-{process.pid}.json").exists()


@as_root
def test_start_time_is_the_same_in_another_time_namespace() -> None:
    """It identifies a process and its runs; the age is right in both namespaces."""
    code = (
        "import sys; from vitalsd.sources.linux.source import LinuxSource;"
        " from vitalsd.sources.platform import process_identities;"
        "s = LinuxSource(int(sys.argv[1]));"
        " print(s.identity().start_key, process_identities().start_key(int(sys.argv[1])),"
        " s.snapshot().uptime_ns // 10**9)"
    )
    command = [sys.executable, "-c", code, str(os.getpid())]
    found = []
    for before in ((), ("unshare", "-T", "--boottime", "1000000")):
        done = subprocess.run([*before, *command], capture_output=True, text=True, check=True)
        found.append(list(map(int, done.stdout.split())))
    (key, birth, age), (other_key, other_birth, other_age) = found
    assert key == birth == other_key == other_birth == process_identities().start_key(os.getpid())
    assert 0 <= other_age - age <= 5


# Long files, clocks


@as_root
def test_memory_of_a_process_of_many_groups_is_read(begin: Begin) -> None:
    """The list of groups comes before the sizes, and makes ``status`` longer than a page."""
    target = begin("idle", extra_groups=range(100_000, 101_000))
    assert len(Path(f"/proc/{target.pid}/status").read_bytes()) > 4096
    with closing(LinuxSource(target.pid)) as source:
        figures = source.snapshot(parts=Part.DETAIL).figures
    assert figures is not None
    assert figures.peak_rss_bytes
    assert figures.swap_bytes == 0


def test_names_of_a_process_with_a_long_command_line(tmp_path: Path) -> None:
    """The path of a program alone may fill a page."""
    folder = tmp_path
    while len(str(folder)) < 3800:
        folder /= "d" * 200
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        shutil.copy(os.path.realpath("/bin/sleep"), "long-named-sleeper-of-a-deep-folder")
        path = f"{folder}/long-named-sleeper-of-a-deep-folder"
        with subprocess.Popen([f"{'./' * 300}{path}", "60"], executable="./long-named-sleeper-of-a-deep-folder") as one:
            entry = eventually(
                lambda: next((e for e in list_processes() if e.pid == one.pid and "long-" in e.name), None)
            )
            assert "long-named-sleeper-of-a-deep-folder" in entry.names
            one.kill()
    finally:
        os.chdir("/")
