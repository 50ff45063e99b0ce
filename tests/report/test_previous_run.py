"""Which crashed run belongs to a report: `vitalsd.report.previous_run`, over real crashes of real programs."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from support import tools
from support.sidecars import VITALSD, ask, environment, eventually, serving
from vitalsd.discovery.runtime_file import discover
from vitalsd.recording.run_directory import MAX_LISTED, RunDirectory
from vitalsd.recording.run_reader import UNKNOWN_END, Run
from vitalsd.report.previous_run import Choice, ReportSubject, choose
from vitalsd_client import BugReport, last_crash

pytestmark = pytest.mark.live

Found = dict[str, Any]


@pytest.fixture
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directories of a user without a sidecar; the sidecars that a test leaves are ended."""
    for name, value in environment(short_path).items():
        monkeypatch.setenv(name, value)
    yield short_path
    end_sidecars(short_path)


def end_sidecars(home: Path) -> None:
    for endpoint in discover(directories=[home / "run"]):
        os.kill(endpoint.pid, signal.SIGTERM)
    eventually(lambda: not discover(directories=[home / "run"]))


def runs(home: Path) -> list[Run]:
    return RunDirectory(home / "state" / "runs").runs()


def report(home: Path, *options: str, status: int = 0) -> tuple[dict[str, bytes], Found]:
    """The members of ``vitalsd report``, and what it printed as JSON."""
    done = subprocess.run(
        [*VITALSD, "report", "--json", "--out", str(home / "out"), *options],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    said: Found = json.loads(done.stdout)
    with zipfile.ZipFile(said["file"]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}, said


def reasons(said: Found) -> dict[str, str]:
    return {each["member"]: each["reason"] for each in said["failures"]}


def labels(members: dict[str, bytes]) -> list[str]:
    return [mark["label"] for mark in json.loads(members["previous-run.json"])["marks"]]


CLIENT = """
import os, signal, sys, time
import vitalsd
if "in_process" in sys.argv:
    sidecar = vitalsd.start(port=0, record_interval_s=0.05, app=os.environ.get("APP"))
else:
    sidecar = vitalsd.spawn(port=0, options=["--record-interval", "0.05", "--linger", "0"], app=os.environ.get("APP"))
if "rename" in sys.argv:
    open("/proc/self/comm", "w").write("another name")
time.sleep(0.4)
if "crash" in sys.argv:
    assert sidecar.mark(os.environ.get("MARK", "just before"))
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGSEGV)
from vitalsd_client import BugReport
members = BugReport(os.environ.get("REPORT", "ryll"), window_ms=50).preview()
print("previous-run.json" in members, flush=True)
"""


def client(home: Path, command: Sequence[str], directory: Path, **variables: str) -> str:
    """Run a client to its end: what it printed, or nothing if it crashed."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(home) | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, -signal.SIGSEGV), done.stderr
    return done.stdout.strip()


def script(directory: Path, name: str = "main.py", text: str = CLIENT) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def crashed(home: Path, number: int = 1) -> list[Run]:
    """Wait until so many runs are on disk as crashed."""

    def found() -> list[Run]:
        return [run for run in runs(home) if run.state == "crashed"]

    eventually(lambda: len(found()) >= number, 15)
    return found()


# Nothing is running


@contextmanager
def recorded(home: Path, command: Sequence[str], *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Found]]:
    """A program and its sidecar, which has recorded a little."""
    with subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE) as target:
        try:
            serve = ("--pid", str(target.pid), "--record-interval", "0.05", "--linger", "0", *options)
            with serving(home, *serve) as (_, ready):
                eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 4)
                yield target, ready
                target.kill()
        finally:
            target.kill()


def crash(home: Path, command: Sequence[str], *options: str, mark: str = "just before") -> None:
    """Have a recorded program crash, with its sidecar gone as well."""
    before = len([run for run in runs(home) if run.state == "crashed"])
    with recorded(home, command, *options) as (target, ready):
        httpx.post(f"{ready['url']}/marks", json={"label": mark}, trust_env=False)
        target.kill()
        target.wait()
        crashed(home, before + 1)
    eventually(lambda: not discover(directories=[home / "run"]))


def test_report_with_nothing_running_contains_the_crashed_run(home: Path) -> None:
    """Status 0: previous-run.json is there, the metrics are `Unavailable`, what is missing is listed; once."""
    crash(home, ["sleep", "60"], "--app", "viewer", "--app-version", "3.1")
    members, said = report(home, "--app", "viewer", "--message", "gone")
    assert labels(members) == ["just before"]
    previous = json.loads(members["previous-run.json"])["run"]
    assert (previous["app"], previous["app_version"], previous["state"]) == ("viewer", "3.1", "crashed")
    assert "SIGKILL" in previous["ended"]
    metrics = json.loads(members["runtime-metrics.json"])
    assert list(metrics) == ["platform", "available", "reason"]
    assert set(reasons(said)) == {"runtime-metrics.json", "runtime-history.json"}
    assert json.loads(members["manifest.json"])["failures"] == said["failures"]
    assert json.loads(members["metadata.json"])["app"] == {"name": "viewer", "version": "3.1"}
    again, _ = report(home, "--app", "viewer")
    assert "previous-run.json" not in again
    (run,) = runs(home)
    third, _ = report(home, "--app", "viewer", "--run", run.id)
    assert labels(third) == ["just before"]


def test_report_lists_on_stderr_what_is_missing(home: Path) -> None:
    """Each member with its reason, and crashed runs that no report contains; with --app none of another application."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    for options, listed in (((), True), (("--app", "editor"), False)):
        done = subprocess.run(
            [*VITALSD, "report", *options], env=environment(home), capture_output=True, text=True, cwd=home
        )
        assert done.returncode == 0
        assert Path(home, done.stdout.strip()).exists()
        assert "vitalsd: runtime-metrics.json: no sidecar to ask" in done.stderr
        assert ("include one with --run ID:" in done.stderr) == listed
        assert (f"  {runs(home)[0].id}  viewer, sleep" in done.stderr) == listed
    for path in home.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            assert b"viewer" not in b"".join(map(archive.read, archive.namelist()))


def test_bug_report_of_a_client_without_a_sidecar_contains_its_crashed_run(home: Path) -> None:
    """From disk; it is noted as reported once it is saved, and not before."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    made = BugReport("viewer", window_ms=20)
    assert "previous-run.json" in made.preview()
    assert "previous-run.json" in BugReport("viewer", window_ms=20).preview()
    made.save(home / "out")
    assert [run.reported for run in runs(home)] == [True]
    assert "previous-run.json" not in BugReport("viewer", window_ms=20).preview()
    (run,) = runs(home)
    assert "previous-run.json" in BugReport("viewer", window_ms=20, run_id=run.id).preview()


def test_report_without_ids_and_nothing_running_takes_the_newest_run_of_the_only_program(home: Path) -> None:
    """Of two programs it takes none, names both and says how to include one."""
    crash(home, ["sleep", "60"], mark="first")
    crash(home, ["sleep", "60"], mark="second")
    members, _ = report(home, "--app", "viewer")
    assert labels(members) == ["second"]
    members, _ = report(home, "--app", "viewer")
    assert labels(members) == ["first"]
    crash(home, ["sleep", "60"], mark="third")
    crash(home, [sys.executable, "-c", "import time; time.sleep(60)"], mark="of another program")
    members, said = report(home, "--app", "viewer")
    assert "previous-run.json" not in members
    reason = reasons(said)["previous-run.json"]
    unreported = [run.id for run in runs(home) if not run.reported]
    assert len(unreported) == 2
    assert all(run_id in reason for run_id in unreported)
    assert "--run ID" in reason
    members, _ = report(home, "--run", unreported[0])
    assert labels(members)
    assert json.loads(members["metadata.json"])["app"] == {"name": None, "version": None}


def test_report_of_another_application_leaves_a_running_one_alone(home: Path) -> None:
    """Numbers of a sidecar with another id do not stand in the report; without an id its own is taken."""
    with recorded(home, ["sleep", "60"], "--app", "viewer", "--app-version", "3.1"):
        members, _ = report(home, "--app", "editor")
        assert json.loads(members["runtime-metrics.json"])["available"] is False
        members, _ = report(home)
        assert "threads" in json.loads(members["runtime-metrics.json"])
        assert json.loads(members["metadata.json"])["app"] == {"name": "viewer", "version": "3.1"}
        assert json.loads(members["metadata.json"])["target"] == {"state": "running", "ended": None}


def test_report_of_a_pid_without_a_sidecar_has_its_metrics(home: Path) -> None:
    """As ``vitalsd sample --pid`` reads them."""
    with subprocess.Popen(["sleep", "60"]) as target:
        members, said = report(home, "--pid", str(target.pid))
        target.kill()
    assert json.loads(members["runtime-metrics.json"])["threads"][0]["tid"] == target.pid
    assert set(reasons(said)) == {"runtime-history.json"}


# Another program's crash


def test_report_leaves_out_the_crash_of_a_program_with_the_same_15_bytes_of_name(home: Path) -> None:
    """Two executables: the kernel names both acme-desktop-cl. The run is left out, and stays unreported."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    for name in ("acme-desktop-client", "acme-desktop-classic"):
        shutil.copy(sleep, home / name)
    crash(home, ["./acme-desktop-client", "99"], mark="private to the first")
    with recorded(home, ["./acme-desktop-classic", "99"]) as (target, ready):
        members, said = report(home, "--app", "second", "--pid", str(target.pid))
        assert "previous-run.json" not in members
        (run,) = (run for run in runs(home) if run.state == "crashed")
        assert "previous-run.json" not in reasons(said), "it is surely another program"
        answer = httpx.post(f"{ready['url']}/report.zip", json={"app": "second"}, trust_env=False)
        assert b"previous-run.json" not in answer.content[:-2000]
        assert not run.reported
        assert b"private to the first" not in b"".join(members.values())
    with recorded(home, ["./acme-desktop-client", "99"]) as (target, _):
        members, _ = report(home, "--app", "first", "--pid", str(target.pid))
        assert labels(members) == ["private to the first"]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread renames itself by prctl")
def test_report_contains_the_crash_of_a_program_that_renames_itself_later(home: Path) -> None:
    """As imports do that call prctl: the run has the new name though the sidecar knew the old one first."""
    rename = "import ctypes, sys; sys.stdin.readline(); ctypes.CDLL(None).prctl(15, b'renamed', 0, 0, 0)"
    (home / "app.py").write_text(f"{rename}\nsys.stdin.readline()\n")

    def renamed(target: "subprocess.Popen[bytes]", url: str) -> None:
        assert target.stdin is not None
        target.stdin.write(b"\n")
        target.stdin.flush()
        eventually(lambda: ask(url, "/info")[1]["target"]["name"] == "renamed")

    with recorded(home, [sys.executable, "app.py"]) as (target, ready):
        renamed(target, ready["url"])
        httpx.post(f"{ready['url']}/marks", json={"label": "just before"}, trust_env=False)
        target.kill()
        (run,) = crashed(home)
    assert run.identity.name == "renamed"
    with recorded(home, [sys.executable, "app.py"]) as (target, ready):
        renamed(target, ready["url"])
        members, _ = report(home, "--pid", str(target.pid))
    assert labels(members) == ["just before"]


@pytest.mark.parametrize("how", [[], ["-X", "utf8"], ["-m"]])
@pytest.mark.parametrize("mode", ["in_process", "alongside"])
def test_bug_report_leaves_out_the_crash_of_a_script_of_the_same_name(home: Path, how: list[str], mode: str) -> None:
    """bank/main.py and game/main.py, started alike, are two programs; each finds its own crash."""
    name = "main" if how == ["-m"] else "main.py"
    bank, game = script(home / "bank").parent, script(home / "game").parent
    command = [sys.executable, *how, name]
    client(home, [*command, mode, "crash"], bank, MARK="opened account 4711")
    crashed(home)
    end_sidecars(home)
    assert client(home, [*command, mode], game) == "False"
    end_sidecars(home)
    assert client(home, [*command, mode], bank) == "True"


@pytest.mark.skipif(
    shutil.which("java") is None, reason="java is not installed; on Debian: apt-get install default-jdk"
)
def test_report_leaves_out_the_crash_of_another_class_of_one_jar(home: Path) -> None:
    """``java -cp app.jar A`` and ``java -cp app.jar B`` are two programs."""
    javac = tools.program("javac", package="default-jdk-headless")
    for name in "AB":
        text = f"class {name} {{ public static void main(String[] a) throws Exception {{ Thread.sleep(60000); }} }}"
        (home / f"{name}.java").write_text(text)
    subprocess.run([javac, "A.java", "B.java"], cwd=home, check=True)
    crash(home, ["java", "-cp", ".", "A"], mark="of A")
    with recorded(home, ["java", "-cp", ".", "B"]) as (target, _):
        assert "previous-run.json" not in report(home, "--pid", str(target.pid))[0]
    with recorded(home, ["java", "-cp", ".", "A"]) as (target, _):
        assert labels(report(home, "--pid", str(target.pid))[0]) == ["of A"]


# The same program's crash


@pytest.mark.parametrize("mode", ["in_process", "alongside"])
def test_bug_report_finds_the_crash_however_the_script_is_started(home: Path, mode: str) -> None:
    """By name, path, option, module, as a program, and with a main thread that renames itself."""
    path = script(home / "app")
    client(home, [sys.executable, "main.py", mode, "crash"], path.parent)
    crashed(home)
    commands: list[tuple[list[str], Path]] = [
        ([sys.executable, str(path)], home),
        ([sys.executable, "-m", "main"], path.parent),
        ([sys.executable, "-X", "utf8", "./main.py"], path.parent),
        (["./main.py"], path.parent),
        ([sys.executable, "main.py", "rename"], path.parent),
    ]
    if sys.platform == "darwin":
        commands.pop()
    for command, directory in commands:
        end_sidecars(home)
        assert client(home, [*command, mode], directory) == "True", command


def test_bug_report_finds_the_crash_of_a_run_with_a_renamed_main_thread(home: Path) -> None:
    """The name of the process at the crash was another one than at the next start."""
    path = script(home / "app")
    client(home, [sys.executable, "main.py", "alongside", "crash", "rename"], path.parent)
    crashed(home)
    end_sidecars(home)
    assert client(home, [sys.executable, "main.py", "alongside"], path.parent) == "True"


def test_bug_report_finds_the_crash_that_another_mode_recorded(home: Path) -> None:
    """`start`, `spawn` and `serve --pid` make one digest of one program."""
    path = script(home / "app")
    client(home, [sys.executable, "main.py", "in_process", "crash"], path.parent)
    crashed(home)
    assert client(home, [sys.executable, "-m", "main", "alongside"], path.parent) == "True"
    end_sidecars(home)
    sleeper = script(home / "app", text="import time; time.sleep(60)")
    with recorded(home, [sys.executable, str(sleeper)]) as (target, _):
        assert labels(report(home, "--pid", str(target.pid))[0]) == ["just before"]


# Application ids


def test_run_with_an_id_belongs_to_reports_with_this_id_alone(home: Path) -> None:
    """Whatever the program: another path finds it by the id, and the same program with another id does not."""
    path, moved = script(home / "app-1.0"), script(home / "app-1.1")
    client(home, [sys.executable, "main.py", "crash"], path.parent, APP="viewer")
    crashed(home)
    end_sidecars(home)
    for app, asked, directory, found in (
        ("viewer", "viewer", moved.parent, "True"),
        ("viewer", "editor", path.parent, "False"),
        ("editor", "editor", path.parent, "False"),
    ):
        assert client(home, [sys.executable, "main.py"], directory, APP=app, REPORT=asked) == found, (app, asked)
        end_sidecars(home)


def test_report_of_another_version_names_the_run_that_it_leaves_out(home: Path) -> None:
    """In another folder, without an id, it may be this program: stderr and manifest say so, --run includes it."""
    for version in ("1.0", "1.1"):
        script(home / version, text="import time; time.sleep(60)")
    crash(home, [sys.executable, "1.0/main.py"])
    with recorded(home, [sys.executable, "1.1/main.py"]) as (target, _):
        members, said = report(home, "--pid", str(target.pid))
        assert "previous-run.json" not in members
        (run,) = (run for run in runs(home) if run.state == "crashed")
        assert run.id in reasons(said)["previous-run.json"]
        assert reasons(said) == {
            each["member"]: each["reason"] for each in json.loads(members["manifest.json"])["failures"]
        }
        assert "1.0" not in json.dumps(said["failures"])
        members, _ = report(home, "--pid", str(target.pid), "--run", run.id)
        assert labels(members) == ["just before"]


# What does not count as reported


def cut_off(where: str, taken: int) -> None:
    """Ask for a report at a URL or a Unix socket, wait for it, read so many bytes of it, and close."""
    if where.startswith("/"):
        connection, host = socket.socket(socket.AF_UNIX), "localhost"
        connection.connect(where)
    else:
        host = where.removeprefix("http://")
        connection = socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])))
    with connection:
        body = '{"app": "viewer"}'
        head = f"POST /report.zip?window_ms=10 HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        select.select([connection], [], [], 30)
        connection.recv(taken)


def test_crash_is_reported_by_a_post_taken_to_its_last_byte_alone(home: Path) -> None:
    """GET, --preview, `last_crash`, an answer cut off and one that is left unread do not count; a POST does."""
    crash(home, ["sleep", "60"], "--app", "viewer")

    def reported() -> list[bool]:
        return [run.reported for run in runs(home) if run.state == "crashed"]

    with recorded(home, ["sleep", "60"], "--app", "viewer") as (_, ready):
        assert b"previous-run.json" in httpx.get(f"{ready['url']}/report.zip", trust_env=False).content
        preview = subprocess.run(
            [*VITALSD, "report", "--preview", "--app", "viewer"],
            env=environment(home),
            capture_output=True,
            text=True,
            cwd=home,
        )
        assert (preview.returncode, "--- previous-run.json: " in preview.stdout) == (0, True)
        assert not list(home.glob("*.zip"))
        found = last_crash("viewer")
        assert found is not None
        assert found.marks == ["just before"]
        for where in (ready["url"], ready["socket"]):
            for taken in (0, 1, 500):
                cut_off(where, taken)
        time.sleep(0.5)  # nothing is to happen: no condition can be waited for
        assert reported() == [False]
        answer = httpx.post(f"{ready['url']}/report.zip", json={"app": "viewer"}, trust_env=False)
        assert b"previous-run.json" in answer.content
        eventually(lambda: reported() == [True])


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_crash_is_not_reported_if_the_client_dies_with_the_answer_unread(home: Path, kind: str) -> None:
    """The kernel has taken every byte for it, and it has read none of them."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    with recorded(home, ["sleep", "60"], "--app", "viewer") as (_, ready):
        code = textwrap.dedent("""
            import os, select, signal, socket, sys, time
            where = sys.argv[1]
            if where.startswith("/"):
                s = socket.socket(socket.AF_UNIX)
                s.connect(where)
                host = "localhost"
            else:
                s = socket.create_connection(("127.0.0.1", int(where)))
                host = f"127.0.0.1:{where}"
            body = '{"app": "viewer"}'
            head = f"POST /report.zip?window_ms=10 HTTP/1.1\\r\\nHost: {host}\\r\\nContent-Type: application/json\\r\\n"
            s.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
            select.select([s], [], [])
            if len(sys.argv) > 2:
                while s.recv(65536):
                    pass
            else:
                time.sleep(0.3)  # until the kernel has taken all of the answer
            os.kill(os.getpid(), signal.SIGKILL)
        """)
        where = ready["socket"] if kind == "unix" else ready["url"].rpartition(":")[2]
        done = subprocess.run([sys.executable, "-c", code, where])
        assert done.returncode == -signal.SIGKILL
        time.sleep(0.5)  # nothing is to happen: no condition can be waited for
        assert [run.reported for run in runs(home) if run.state == "crashed"] == [False]
        subprocess.run([sys.executable, "-c", code, where, "reads"])
        eventually(lambda: [run.reported for run in runs(home) if run.state == "crashed"] == [True])


def test_report_made_while_the_sidecar_lingers_counts_the_crash_that_it_contains(home: Path) -> None:
    """The history is that of the crash, so neither the next report nor the next start has it again."""
    with subprocess.Popen(["sleep", "60"]) as target:
        options = ("--pid", str(target.pid), "--record-interval", "0.05", "--app", "viewer")
        with serving(home, *options) as (_, ready):
            eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 4)
            target.kill()
            target.wait()
            crashed(home)
            members, _ = report(home, "--app", "viewer")
            assert json.loads(members["metadata.json"])["target"]["state"] == "crashed"
            assert [run.reported for run in runs(home)] == [True]
            assert last_crash("viewer") is None


def test_report_of_a_running_run_does_not_take_its_later_crash(home: Path) -> None:
    """A run that is asked for while it runs is in the report; it counts once it has crashed."""
    with recorded(home, ["sleep", "60"], "--app", "viewer") as (target, ready):
        (run,) = runs(home)
        members, _ = report(home, "--app", "viewer", "--run", run.id)
        assert "previous-run.json" in members
        answer = httpx.post(f"{ready['url']}/runs/{run.id}/reported", json={}, trust_env=False)
        assert answer.json() == {"id": run.id, "reported": False}
        target.kill()
        target.wait()
        (run,) = crashed(home)
        assert not run.reported
    members, _ = report(home, "--app", "viewer")
    assert "previous-run.json" in members


def test_report_with_an_id_leaves_out_sidecars_without_one(home: Path) -> None:
    """The data of another application may not be reported; stderr says how to report on that process."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    with recorded(home, ["sleep", "61"]) as (target, ready):
        httpx.post(f"{ready['url']}/marks", json={"label": "private"}, trust_env=False)
        done = subprocess.run(
            [*VITALSD, "report", "--app", "viewer", "--out", str(home / "out")],
            env=environment(home),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert f"the processes {target.pid} have no application id" in done.stderr
        with zipfile.ZipFile(done.stdout.strip()) as archive:
            assert "previous-run.json" in archive.namelist()
            assert all(b"private" not in archive.read(name) for name in archive.namelist())


def test_last_crash_of_a_client_that_adopts_an_id_is_in_its_report(home: Path) -> None:
    """The crash before the update has no id; after the report it is not found again."""
    text = (
        "import os, sys, time, vitalsd\nvitalsd.spawn(port=0, options=['--linger', '0'])\ntime.sleep(0.3)\nos.abort()\n"
    )
    program = script(home, text=text)
    subprocess.run([sys.executable, str(program)], env=environment(home), cwd=home, timeout=30)
    crashed(home)
    program.write_text(
        "import sys, vitalsd\nfrom vitalsd_client import BugReport, last_crash\n"
        "found = last_crash(app='viewer')\n"
        "with vitalsd.spawn(port=0, app='viewer'):\n"
        "    report = BugReport('viewer', window_ms=50)\n"
        "    report.save('out')\n"
        "print(found is not None, 'previous-run.json' in report.preview(), last_crash(app='viewer'))\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], env=environment(home), cwd=home, capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "True True None\n", done.stderr


@pytest.mark.parametrize("damage", ["another", "damaged", "none"])
def test_report_of_a_run_that_cannot_be_read_is_refused(home: Path, damage: str) -> None:
    """A run that was asked for with --run: nothing is written, and the reason is one line."""
    if damage != "none":
        crash(home, ["sleep", "60"], "--app", "viewer")
    (home / "state" / "runs").mkdir(parents=True, exist_ok=True)
    name = next((run.id for run in runs(home)), "1-2-boot-3")
    if damage == "damaged":
        (home / "state" / "runs" / f"{name}.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    done = subprocess.run(
        [*VITALSD, "report", "--run", name if damage != "another" else "1-2-boot-3", "--out", str(home / "out")],
        env=environment(home),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert not (home / "out").exists()


def test_crash_is_known_as_soon_as_the_process_is_gone(home: Path) -> None:
    """To a wrapper that reports at once, and to a client that starts again at once; not at the next snapshot."""
    with subprocess.Popen(["sleep", "60"]) as target:
        options = ("--pid", str(target.pid), "--record-interval", "600", "--app", "viewer")
        with serving(home, *options) as (_, ready):
            eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 0)
            target.kill()
            target.wait()
            found = last_crash("viewer")
            assert found is not None
            assert found.ended == "killed by SIGKILL"
            members, _ = report(home, "--app", "viewer")
            assert json.loads(members["metadata.json"])["target"]["state"] == "crashed"


@pytest.mark.parametrize("mode", ["in_process", "alongside"])
@pytest.mark.parametrize(("end", "state"), [("1 / 0", "crashed"), ("sys.exit()", "clean"), ("pass", "clean")])
def test_run_that_ends_by_an_uncaught_exception_is_a_crash(home: Path, mode: str, end: str, state: str) -> None:
    """As the kernel sees it by the exit status, and within the process by what the interpreter reports."""
    make = "start(port=0, " if mode == "in_process" else "spawn(port=0, options=['--linger', '0'], "
    code = f"import sys, time, vitalsd\nvitalsd.{make}app='viewer')\ntime.sleep(0.3)\n{end}\n"
    subprocess.run([sys.executable, "-c", code], env=environment(home), capture_output=True, timeout=30)
    eventually(lambda: [run.state for run in runs(home)] == [state], 10)
    if state == "crashed" and mode == "in_process":
        assert runs(home)[0].ended == "an exception that was not caught ended the program"


# At the start of a client


def test_last_crash_says_how_the_run_ended_and_what_was_recorded(home: Path) -> None:
    """With and without a sidecar; it changes nothing; dismissed, the run is in no report and not found again."""
    assert last_crash("viewer") is None
    crash(home, ["sleep", "60"], "--app", "viewer", "--app-version", "3.1")
    for _ in range(2):
        found = last_crash("viewer")
        assert found is not None
        assert found.ended == "killed by SIGKILL"
        assert found.application == ("viewer", "3.1")
        assert (found.name, found.marks) == ("sleep", ["just before"])
        assert found.last_seen is not None
        assert found.started_at <= found.last_seen
        assert len(found.history["time_ms"]) == found.snapshots - 1
    assert last_crash("editor") is None
    with recorded(home, ["sleep", "60"], "--app", "viewer"):
        found = last_crash("viewer")
        assert found is not None
        assert found.dismiss()
        assert last_crash("viewer") is None
        assert "previous-run.json" not in report(home, "--app", "viewer")[0]
    with pytest.raises(ValueError, match="application id"):
        last_crash("no/such id")


def test_dismissing_a_crash_dismisses_older_ones_and_no_newer(home: Path) -> None:
    """A user that declines is not asked again about an older crash; one that came meanwhile is asked about."""
    crash(home, ["sleep", "60"], "--app", "viewer", mark="first")
    crash(home, ["sleep", "60"], "--app", "editor", mark="of another one")
    crash(home, ["sleep", "60"], "--app", "viewer", mark="second")
    found = last_crash("viewer")
    assert found is not None
    crash(home, ["sleep", "60"], "--app", "viewer", mark="third")
    assert found.dismiss()
    newest = last_crash("viewer")
    assert newest is not None
    assert newest.marks == ["third"]
    assert newest.dismiss()
    assert last_crash("viewer") is None
    assert last_crash("editor") is not None


def test_last_crash_of_a_process_that_still_runs_is_none(home: Path) -> None:
    """Its sidecar was killed and it was not: it has not crashed, for `last_crash` and for a report."""
    with recorded(home, ["sleep", "60"], "--app", "viewer"):
        (endpoint,) = discover(directories=[home / "run"])
        os.kill(endpoint.pid, signal.SIGKILL)
        eventually(lambda: not discover(directories=[home / "run"]))
        assert last_crash("viewer") is None
        assert "previous-run.json" not in report(home, "--app", "viewer")[0]
    found = last_crash("viewer")
    assert found is not None, "and now it has"


# Wrong input


def test_report_with_a_run_id_that_is_none_is_refused(home: Path) -> None:
    """Status 2 and one sentence; an id never becomes a path."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    (home / "state" / "secret.sqlite").write_text("x")
    for run_id in ("nope", "../secret", "/etc/passwd", "a\nb", "x" * 200):
        done = subprocess.run(
            [*VITALSD, "report", "--app", "viewer", "--run", run_id],
            env=environment(home),
            capture_output=True,
            text=True,
            cwd=home,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert "`vitalsd runs` lists" in done.stderr
    assert list(home.glob("*.zip")) == []
    for app in ("", "-x", "a/b", "x" * 65):
        assert subprocess.run([*VITALSD, "report", "--app", app], capture_output=True).returncode == 2
        assert subprocess.run([*VITALSD, "serve", "--app", app], capture_output=True).returncode == 2


def test_report_with_a_run_directory_that_cannot_be_trusted_is_written(home: Path) -> None:
    """Of another user, a link, open to others, or not a directory at all: without the run, and no traceback."""
    (home / "state").mkdir(mode=0o700)
    (home / "state" / "runs").write_text("in the way")
    assert "previous-run.json" not in report(home, "--app", "viewer")[0]
    (home / "state" / "runs").unlink()
    crash(home, ["sleep", "60"], "--app", "viewer")
    directory = home / "state" / "runs"
    directory.chmod(0o770)
    assert last_crash("viewer") is None
    assert "previous-run.json" not in report(home, "--app", "viewer")[0]
    directory.chmod(0o700)
    directory.rename(home / "elsewhere")
    directory.symlink_to(home / "elsewhere")
    assert last_crash("viewer") is None
    directory.unlink()
    (home / "elsewhere").rename(directory)
    if os.geteuid() == 0:
        os.chown(home / "state" / "runs", 65534, 65534)
        assert "previous-run.json" not in report(home, "--app", "viewer")[0]
        assert last_crash("viewer") is None


def test_runs_that_cannot_be_read_are_listed_with_the_reason(home: Path) -> None:
    """On stderr by ``vitalsd runs``; the others are listed and reported all the same."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    (home / "state" / "runs" / "broken.sqlite").write_bytes(b"garbage")
    done = subprocess.run([*VITALSD, "runs"], env=environment(home), capture_output=True, text=True)
    assert "broken.sqlite" in done.stderr
    assert "viewer" in done.stdout
    assert labels(report(home, "--app", "viewer")[0]) == ["just before"]


def test_report_among_thousands_of_runs_has_the_newest(home: Path) -> None:
    """No more than `MAX_LISTED` are read; the list says how many are not."""
    crash(home, ["sleep", "60"], "--app", "viewer")
    (run,) = runs(home)
    content = run.path.read_bytes()
    old = time.time() - 86_400
    for number in range(3000):
        path = run.path.with_name(f"{number}-1-boot-1.sqlite")
        path.write_bytes(content)
        os.utime(path, (old, old))
    members, _ = report(home, "--app", "viewer")
    assert labels(members) == ["just before"]
    assert json.loads(members["previous-run.json"])["run"]["id"] == run.id
    done = subprocess.run([*VITALSD, "runs"], env=environment(home), capture_output=True, text=True)
    assert f"{3001 - MAX_LISTED} older runs in" in done.stderr


# The choice by itself


P, Q, P2 = f"{'1' * 16}{'a' * 16}", f"{'2' * 16}{'b' * 16}", f"{'3' * 16}{'a' * 16}"
"""Digests of three programs, of which the first and the last may be two versions of one."""


def listing(run_id: str, **other: Any) -> Found:
    plain = {"state": "crashed", "reported": False, "app": None, "name": "app", "program": P, "recorded_to": run_id}
    return {"id": run_id, **plain, **other}


def chosen(listings: Sequence[Found], subject: ReportSubject, alive: Callable[[Any], bool] = lambda _: False) -> Choice:
    return choose(listings, subject, alive)


def test_choose_takes_the_newest_run_with_the_id() -> None:
    """Neither a reported one, nor one that ended well, nor one of the process itself, nor one that lives."""
    runs = [
        listing("1", app="viewer"),
        listing("2", app="viewer"),
        listing("3", app="viewer", reported=True),
        listing("4", app="viewer", state="clean"),
        listing("5", app="editor"),
        listing("7-8-9-1", app="viewer"),
        listing("9", app="viewer", pid=9),
    ]
    subject = ReportSubject("viewer", "7-8-9", "app", P)
    assert chosen(runs, subject, lambda run: "pid" in run).run == runs[1]
    assert chosen(runs, ReportSubject(None, "7-8-9", "app", P, "editor")).run == runs[4]
    assert chosen(runs, ReportSubject("other", "7-8-9", "app", P)).run is None
    assert chosen(runs, ReportSubject(None, "7-8-9", "app", P)).run is None, (
        "a run with an id is of reports with it alone"
    )


def test_choose_prefers_the_id_to_the_program() -> None:
    """And falls back to the program of runs without an id, unless another application has run the same program."""
    runs = [listing("1", app="viewer", program=Q), listing("2"), listing("3", program=Q, name="b")]
    assert chosen(runs, ReportSubject("viewer", "0", "app", P)).run == runs[0]
    assert chosen(runs[1:], ReportSubject("viewer", "0", "app", P)).run == runs[1]
    assert chosen(runs[1:], ReportSubject("viewer", "0", "app", Q)).run == runs[2]
    adopted = chosen(runs[1:], ReportSubject("viewer", "0", "app", P, "viewer"))
    assert adopted.run == runs[1], "the client has begun to pass an id; it is the same program"
    shared = chosen(
        [*runs[1:], listing("4", app="editor", state="clean")], ReportSubject("viewer", "0", "app", P, "viewer")
    )
    assert (shared.run, list(shared.left_out)) == (None, [runs[1]])
    assert "another application has run the same program" in str(shared.reason)


def test_choose_for_a_sidecar_that_waits_takes_no_run_of_another_name() -> None:
    """Nor one without an id if the sidecar has one."""
    runs = [listing("1", name="bank")]
    assert chosen(runs, ReportSubject(name="game")).run is None
    assert chosen(runs, ReportSubject(name="bank")).run == runs[0]
    left = chosen(runs, ReportSubject(target_app="viewer"))
    assert (left.run, list(left.left_out)) == (None, runs)


def test_choose_leaves_out_a_run_that_another_recording_shows_clean() -> None:
    """One of two sidecars was killed; the other saw a normal end. A crash that was seen remains one."""
    lost = listing("7-8-9-1", app="viewer", ended=UNKNOWN_END)
    well = listing("7-8-9-2", app="viewer", state="clean", ended="exit status 0", recorded_to="7-9")
    assert chosen([lost, well], ReportSubject("viewer")).run is None
    assert chosen([lost], ReportSubject("viewer")).run == lost
    seen = listing("7-8-9-3", app="viewer", ended="killed by SIGSEGV")
    went_on = listing("7-8-9-1", app="viewer", state="clean", ended="the process went on without it")
    assert chosen([seen, went_on], ReportSubject("viewer")).run == seen


def test_choose_in_doubt_leaves_out_and_names_the_run() -> None:
    """An unknown program of the same name may be this one, and so may another version; another program is not."""
    runs = [listing("1", program=""), listing("2", program=Q), listing("3", program=P2, name="b")]
    left = chosen(runs, ReportSubject("viewer", "0", "app", P))
    assert left.run is None
    assert [run["id"] for run in left.left_out] == ["3", "1"]
    assert "vitalsd report --run ID" in str(left.reason)
    unknown = chosen(runs, ReportSubject("viewer", "0", "app", ""))
    assert [run["id"] for run in unknown.left_out] == ["2", "1"]
    other = chosen(runs[1:2], ReportSubject("viewer", "0", "app", P))
    assert (other.run, list(other.left_out), other.reason) == (None, [], None)


def test_choose_with_nothing_running_needs_one_program() -> None:
    """Of runs without an id; an unknown program may be any."""
    one = [listing("1"), listing("2"), listing("3", app="editor", program=Q)]
    assert chosen(one, ReportSubject("viewer")).run == one[1]
    assert chosen(one, ReportSubject()).run == one[1]
    for other in (listing("4", program=Q), listing("4", program="")):
        left = chosen([*one, other], ReportSubject("viewer"))
        assert left.run is None
        assert [run["id"] for run in left.left_out] == ["4", "2", "1"]
    assert chosen([listing("1", program="")], ReportSubject("viewer")).run is None
    many = chosen([listing(str(number), program=f"{number:032}") for number in range(10, 30)], ReportSubject("viewer"))
    assert "15 more" in str(many.reason)
