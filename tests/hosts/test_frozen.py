"""Clients frozen by PyInstaller, as one folder and as one file: started, killed, and their sidecars asked."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from support.sidecars import environment, eventually
from vitalsd.sources.platform import process_identities

pytest.importorskip("PyInstaller", reason="PyInstaller is not installed: run make test-hosts")
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(540),  # the first test of a layout builds it
    pytest.mark.skipif(
        sys.platform == "linux" and shutil.which("objdump") is None, reason="PyInstaller needs binutils"
    ),
]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
VENV_VITALSD = [sys.executable, "-P", "-m", "vitalsd"]
FLAG = "--vitalsd-sidecar"
START_S = 60.0

Build = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel has been installed, as a user has it and not as this checkout is."""
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(directory), str(ROOT)], check=True, timeout=120)
    return directory


@pytest.fixture(scope="session")
def build(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Freezes a program of tests/hosts/programs, each layout once, without a word about vitalsd."""
    done: dict[tuple[str, str], Path] = {}

    def build(program: str, layout: str) -> Path:
        if (program, layout) not in done:
            place = tmp_path_factory.mktemp(f"{program}-{layout}")
            command = [sys.executable, "-m", "PyInstaller", f"--{layout}", "--noconfirm", "--log-level", "WARN"]
            paths = ["--distpath", "dist", "--workpath", "build", "--specpath", "."]
            subprocess.run(
                [*command, *paths, str(HERE / "programs" / f"{program}.py")],
                cwd=place,
                env=os.environ | {"PYTHONPATH": str(wheel)},
                check=True,
                timeout=500,
            )
            executable = place / "dist" / program
            done[program, layout] = executable / program if layout == "onedir" else executable
        return done[program, layout]

    return build


@pytest.fixture(params=["onedir", "onefile"])
def application(request: pytest.FixtureRequest, build: Build) -> Path:
    """The frozen client in both layouts."""
    return build("frozen_client", request.param)


@pytest.fixture
def one_folder(build: Build) -> Path:
    """The frozen client as one folder."""
    return build("frozen_client", "onedir")


@pytest.fixture
def one_file(build: Build) -> Path:
    """The frozen client as one file."""
    return build("frozen_client", "onefile")


class Home(NamedTuple):
    """Directories of a user without a sidecar, and where each copy of the client has left a line."""

    path: Path

    def environ(self, mode: str, **more: str) -> dict[str, str]:
        """Return the environment of a client."""
        log = {"CLIENT_MODE": mode, "CLIENT_LOG": str(self.path / "log"), "TMPDIR": str(self.path / "tmp")}
        return environment(self.path) | log | more

    def copies(self) -> tuple[list[int], list[int]]:
        """Return the pids that started as the application, and those that started as vitalsd."""
        lines = [json.loads(line) for line in (self.path / "log").read_text(encoding="utf-8").splitlines()]
        return [pid for pid, words in lines if FLAG not in words], [pid for pid, words in lines if FLAG in words]


@pytest.fixture
def home(short_path: Path) -> Iterator[Home]:
    """A `Home`; what was started in it is ended."""
    (short_path / "tmp").mkdir()
    home = Home(short_path)
    yield home
    if (short_path / "log").exists():
        copies, sidecars = home.copies()
        for pid in copies + sidecars:
            end(pid, signal.SIGTERM)
        eventually(lambda: not any(map(alive, copies + sidecars)), 10.0)


def alive(pid: int) -> bool:
    """Return whether the process runs; one that no parent has collected does not."""
    return process_identities().start_key(pid) is not None


def end(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def client(executable: Path, environ: dict[str, str]) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """The client, and the line that it prints once it has its sidecar."""
    with subprocess.Popen(
        [str(executable)], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    ) as process:
        assert process.stdout is not None
        said: dict[str, Any] = {}
        try:
            said = json.loads(process.stdout.readline() or "{}")
            yield process, said
        finally:
            if "pid" in said:
                end(said["pid"], signal.SIGKILL)
                end(said["sidecar"], signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)  # the launcher of a one-file client ends after it, and removes its files
            process.kill()


def run(executable: Path, environ: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the client to its end."""
    return subprocess.run([str(executable), *arguments], env=environ, capture_output=True, text=True, timeout=120)


def test_wheel_contains_the_pyinstaller_hooks_and_entry_point(wheel: Path) -> None:
    """PyInstaller finds the hooks by the entry point of the installed distribution."""
    (entry_points,) = wheel.glob("vitalsd-*.dist-info/entry_points.txt")
    assert "[pyinstaller40]\nhook-dirs = vitalsd.pyinstaller_hooks:get_hook_dirs" in entry_points.read_text()
    hooks = {path.name for path in (wheel / "vitalsd" / "pyinstaller_hooks" / "hooks").glob("*.py")}
    assert hooks == {"hook-vitalsd.py", "hook-vitalsd_client.py"}


def test_spawn_without_freeze_support_raises_at_once_and_starts_nothing(application: Path, home: Home) -> None:
    """The error names the remedy; one copy of the application runs, and continues."""
    done = run(application, home.environ("unsupported"))
    assert done.returncode == 3, done.stderr
    error = json.loads(done.stdout)["error"]
    assert "call vitalsd.freeze_support() first in its main module, or pass command=" in error
    copies, sidecars = home.copies()
    assert len(copies) == 1
    assert sidecars == []


def test_spawn_in_an_unmarked_frozen_application_starts_one_copy_which_refuses(application: Path, home: Home) -> None:
    """The second copy starts no third one, and the first is given the reason without waiting for the time-out."""
    begun = time.monotonic()
    done = run(application, home.environ("unmarked"))
    assert done.returncode == 3, done.stderr
    error = json.loads(done.stdout)["error"]
    assert f"to run {application} as a sidecar starts the application again" in error
    assert "call vitalsd.freeze_support() first in its main module" in error
    assert time.monotonic() - begun < START_S
    copies, sidecars = home.copies()
    assert len(copies) == 2
    assert sidecars == []
    eventually(lambda: not any(map(alive, copies)), 10.0)


def test_every_route_answers_after_the_client_was_killed(application: Path, home: Home) -> None:
    """The page, the schema, the documentation and reports need files of the bundle, which have to be there still."""
    with client(application, home.environ("supported")) as (process, said):
        assert "url" in said, said
        with httpx.Client(base_url=said["url"], trust_env=False, timeout=30) as http:
            assert http.get("/metrics?window_ms=50").status_code == 200
            os.kill(said["pid"], signal.SIGKILL)
            process.wait(30)  # if it is one file, this is its launcher, which removes the folder before it ends
            if "_MEI" in said["unpacked"]:
                assert not os.path.exists(said["unpacked"])
            answers = dict(every_route(http))
        assert alive(said["sidecar"])
    assert {status for status in answers.values() if status >= 500} == set(), answers
    served = ["GET /", "GET /docs", "GET /openapi.json", "GET /healthz", "GET /info", "GET /history", "GET /runs"]
    served += ["GET /report.zip", "POST /report.zip", "GET /processes", "GET /marks"]
    assert {route: answers[route] for route in served} == dict.fromkeys(served, 200)
    assert len(home.copies()[0]) == 1


def every_route(http: httpx.Client) -> Iterator[tuple[str, int]]:
    """The status of each method of each path of the schema, and of the files that the page names."""
    paths: dict[str, dict[str, Any]] = http.get("/openapi.json").json()["paths"]
    (run, *_) = http.get("/runs").json()
    for path, methods in paths.items():
        filled = path.replace("{run_id}", run["id"]).replace("{name}", "ui")
        assert "{" not in filled
        for method in methods:
            query = {"nonce": "0" * 32} if path == "/hello" else {}
            body = {"content": json.dumps({"label": "x"} if path == "/marks" else {})} if method == "post" else {}
            headers = {"Content-Type": "application/json"} if method == "post" else {}
            with http.stream(method, filled, params=query, headers=headers, **body) as answer:  # type: ignore[arg-type]
                yield f"{method.upper()} {path}", answer.status_code
                if path != "/stream":
                    answer.read()


def test_stop_ends_the_sidecar_and_its_launcher(application: Path, home: Home) -> None:
    """Its status is 0, no process is left, and of a one-file application no unpacked folder."""
    with client(application, home.environ("supported")) as (process, said):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"
        assert process.wait(30) == 0
    assert not alive(said["sidecar"])
    assert list((home.path / "tmp").glob("_MEI*")) == []


def test_stop_after_the_sidecar_was_killed_leaves_nothing(one_file: Path, home: Home) -> None:
    """The launcher is not ended while it removes the files that it had unpacked."""
    with client(one_file, home.environ("supported")) as (process, said):
        assert process.stdin is not None
        os.kill(said["sidecar"], signal.SIGKILL)
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.wait(30) == 0
    assert list((home.path / "tmp").glob("_MEI*")) == []


def test_doctor_of_a_frozen_application_passes(application: Path, home: Home) -> None:
    """It runs the application as the process that burns and as the sidecar, and leaves nothing behind."""
    done = run(application, home.environ("supported"), FLAG, "doctor", "--json")
    report = json.loads(done.stdout)
    assert [each for each in report["findings"] if each["verdict"] == "fail"] == [], done.stderr
    assert done.returncode == 0
    copies, started = home.copies()
    assert copies == []
    eventually(lambda: not any(map(alive, started)), 10.0)
    assert list((home.path / "tmp").glob("_MEI*")) == []


@pytest.mark.parametrize("supervisor", ["systemd", "launchd"])
def test_agent_of_a_frozen_application_runs_the_application(application: Path, home: Home, supervisor: str) -> None:
    """The files name its executable, and the templates are in the bundle."""
    environ = home.environ("supported")
    done = run(application, environ, FLAG, "agent", "print", "--supervisor", supervisor)
    assert done.returncode == 0, done.stderr
    if supervisor == "systemd":
        assert f'ExecStart="{application}" "{FLAG}" "serve"\n' in done.stdout
        one_file = application.is_file() and not (application.parent / "_internal").exists()
        assert ('Environment="TMPDIR=' in done.stdout) == one_file
        assert ("NotifyAccess=all\n" in done.stdout) == one_file
    else:
        words = re.findall(r"<string>(.*)</string>", done.stdout.partition("ProgramArguments")[2])
        assert words[:3] == [str(application), FLAG, "serve"]


def test_agent_of_a_bundled_command_line_runs_it(one_folder: Path, home: Home) -> None:
    """An application that is nothing but the command line needs no `freeze_support`."""
    done = run(one_folder, home.environ("command line"), "agent", "print", "--supervisor", "systemd")
    assert f'ExecStart="{one_folder}" "serve"\n' in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is of Linux")
def test_activation_of_a_one_file_application_takes_the_sockets(one_file: Path, home: Home) -> None:
    """Systemd passes them to the launcher; the child of the launcher serves them and notifies systemd."""
    import socket

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        notified.bind(str(home.path / "notify"))
        notified.settimeout(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        script = 'exec 3<&"$1"; LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$2" "$3" serve'
        service = {"LISTEN_FDS": "1", "NOTIFY_SOCKET": str(home.path / "notify"), "WATCHDOG_USEC": "3000000"}
        with subprocess.Popen(
            ["bash", "-c", script, "bash", str(listener.fileno()), str(one_file), FLAG],
            env=home.environ("supported", **service),
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        ) as launcher:
            try:
                assert notified.recv(100) == b"READY=1"
                assert notified.recv(100) == b"WATCHDOG=1"
                assert httpx.get(f"{url}/healthz", trust_env=False, timeout=30).status_code == 200
            finally:
                os.killpg(launcher.pid, signal.SIGTERM)  # as systemd does: to the launcher and to its child
            assert launcher.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/maps is of Linux")
def test_sidecar_of_another_program_loads_no_library_of_the_application(application: Path, home: Home) -> None:
    """It maps no libcrypto, libsqlite3 or libpython of the bundle, whatever LD_LIBRARY_PATH was set to."""
    environ = home.environ("unsupported", CLIENT_COMMAND=json.dumps(VENV_VITALSD))
    with client(application, environ) as (_, said):
        assert "url" in said, said
        assert httpx.get(f"{said['url']}/report.zip?window_ms=50", trust_env=False, timeout=30).status_code == 200
        maps = Path(f"/proc/{said['sidecar']}/maps").read_text(encoding="utf-8")
        own = Path(f"/proc/{said['pid']}/maps").read_text(encoding="utf-8")
        assert said["unpacked"] in own
        assert said["unpacked"] not in maps
        assert "LD_LIBRARY_PATH=" + said["unpacked"] not in Path(f"/proc/{said['sidecar']}/environ").read_text()


def test_report_of_a_restarted_qt_client_contains_the_crash_and_its_marks(build: Build, home: Home) -> None:
    """A frozen window is aborted and started again; of the application there are those two copies and no other."""
    pytest.importorskip("PySide6", reason="PySide6 is not installed: run make test-hosts")
    executable = build("qt_client", "onedir")
    environ = home.environ("supported", QT_QPA_PLATFORM="offscreen")
    with client(executable, environ) as (process, first):
        assert first.get("marked") is True
        assert process.poll() is None
        os.kill(first["pid"], signal.SIGABRT)
        assert process.wait(30) == -signal.SIGABRT
        (home.path / "reports").mkdir()
        with client(executable, environ | {"CLIENT_REPORTS": str(home.path / "reports")}) as (_, second):
            assert "report" in second
            with zipfile.ZipFile(second["report"]) as report:
                previous = json.loads(report.read("previous-run.json"))
    assert previous["run"]["state"] == "crashed"
    assert previous["run"]["app"] == "viewer"
    assert [mark["label"] for mark in previous["marks"]] == ["export started"]
    copies, sidecars = home.copies()
    assert copies == [first["pid"], second["pid"]]
    assert sidecars == [first["sidecar"], second["sidecar"]]
