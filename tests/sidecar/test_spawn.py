"""The sidecar alongside its client: `vitalsd.spawn` and ``vitalsd serve --pid``."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from math import inf, nan
from pathlib import Path

import pytest

import vitalsd
from support import as_platform
from support.sidecars import ask, environment, eventually, listing, serving
from support.stopwatch import Stopwatch
from vitalsd.discovery import runtime_file as endpoint
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import read_run
from vitalsd.sources.platform import process_identities


@pytest.fixture(autouse=True)
def own_directories(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sidecar of these tests lives in a directory of its own."""
    for name in ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR"):
        monkeypatch.setenv(name, environment(short_path)[name])


@pytest.fixture
def target() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("pass", "clean"),
        ("sys.exit(3)", "clean"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
        ("os._exit(0)", "crashed"),
        ("child = os.fork()\nif child == 0: sys.exit()\nos.wait(); os.kill(os.getpid(), signal.SIGKILL)", "crashed"),
        ("os.closerange(3, 99)\nfiles = [open(f'victim{number}', 'w') for number in range(60)]", "crashed"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of macOS tells how a process ended")
def test_exit_of_a_client_with_a_hidden_status_is_clean(short_path: Path, end: str, state: str) -> None:
    """On Linux before 6.15 the client notes its exit; a crash, or the exit of a forked child, is not noted."""
    command = as_platform.program("linux", as_platform.UNTOLD)
    code = (
        "import os, signal, sys, time, vitalsd\n"
        f"vitalsd.spawn(port=0, command={list(command)!r}, options=['--record-interval', '0.05', '--linger', '0'])\n"
        f"time.sleep(0.3)\n{end}\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(short_path), cwd=short_path, timeout=30)
    runs = RunDirectory(short_path / "state" / "runs")
    eventually(lambda: [run.state for run in runs.runs()] == [state])
    eventually(lambda: listing(short_path / "run") == [])
    assert [path.read_text() for path in short_path.glob("victim*") if path.stat().st_size] == []


def alive(pid: int) -> bool:
    return process_identities().start_key(pid) is not None


def client(code: str) -> "subprocess.Popen[str]":
    """A program that spawns a sidecar; it has a process group of its own, as a shell would give it."""
    command = [sys.executable, "-X", "dev", "-c", "import os, sys, time, vitalsd\n" + textwrap.dedent(code)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


@pytest.mark.parametrize("how", ["pthread_sigmask(signal.SIG_BLOCK, numbers)", "signal(numbers[0], signal.SIG_IGN)"])
def test_stop_in_a_client_that_blocks_sigterm_ends_the_sidecar(how: str) -> None:
    """A signal that the client blocks or ignores, as with signalfd or sigwait, still ends the sidecar cleanly."""
    with client(f"""
        import signal
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        signal.{how}
        sidecar = vitalsd.spawn(port=0)
        time.sleep(0.5)
        print(sidecar.stop())
    """) as program:
        assert program.communicate(timeout=20)[0] == "0\n"
    assert [run.state for run in RunDirectory(Path(os.environ["VITALSD_STATE_DIR"]) / "runs").runs()] == ["clean"]


CLOSES = "import os, time; os.closerange(3, 1024); time.sleep(60)"


def test_stop_of_sidecars_leaves_no_descriptor() -> None:
    """Neither the pipe of the exit note nor its handler stays, and the next sidecar works."""
    with client("""
        before = os.listdir("/dev/fd")
        for _ in range(3):
            vitalsd.spawn(port=0).stop()
        print(len(os.listdir("/dev/fd")) - len(before))
    """) as program:
        assert program.communicate(timeout=30)[0] == "0\n"


def test_spawn_returns_when_the_sidecar_answers(short_path: Path) -> None:
    """The spawned sidecar measures its client, is another process, and stop ends it with status 0."""
    with vitalsd.spawn(port=0) as sidecar:
        assert sidecar.pid != os.getpid()
        for where in (sidecar.url, sidecar.socket):
            assert where is not None
            assert ask(where, "/info")[1]["target"]["pid"] == os.getpid()
        assert sidecar.runtime_file is not None
        assert endpoint.read(sidecar.runtime_file).pid == sidecar.pid
        assert sidecar.running
        assert sidecar.stop() == 0
        assert sidecar.stop() == 0
    assert not sidecar.running
    assert listing(short_path / "run") == []


def test_spawn_options_reach_the_sidecar(target: "subprocess.Popen[bytes]", short_path: Path) -> None:
    """Another target, no TCP, a socket of one's own, a token, and any option of serve."""
    path = short_path / "my.sock"
    with vitalsd.spawn(target.pid, tcp=False, uds=path, auth="token", options=["--record-interval", "0"]) as sidecar:
        assert (sidecar.url, sidecar.socket) == (None, str(path))
        info = ask(str(path), "/info")[1]
        assert (info["target"]["pid"], info["recorder"]) == (target.pid, None)
        assert sidecar.runtime_file is not None
        assert endpoint.read(sidecar.runtime_file).token


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pid": 2**22 + 1}, "no process has pid 4194305"),
        ({"options": ["--port", "99999"]}, "99999 is not in the range"),
        ({"command": ["/nonexistent"]}, "cannot run /nonexistent"),
        ({"command": ["/bin/sh", "-c", "kill -9 $$"]}, "ended by SIGKILL"),
        ({"command": ["/bin/sh", "-c", "sleep 60"], "timeout_s": 0.2}, "not ready in time"),
        ({"command": [sys.executable, "-c", CLOSES], "timeout_s": 2.0}, "closed its ready-fd"),
    ],
)
def test_spawn_of_a_sidecar_that_does_not_get_ready_raises_spawn_error(
    arguments: dict[str, object], reason: str
) -> None:
    """Spawn raises SpawnError with the reason, and leaves no process behind."""
    with pytest.raises(vitalsd.SpawnError, match=reason):
        vitalsd.spawn(port=0, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("timeout_s", [nan, inf, 1e300, -5])
def test_spawn_with_a_timeout_out_of_range_raises_value_error(timeout_s: float) -> None:
    """A timeout that is out of range is an error of the caller, and no process starts."""
    with pytest.raises(ValueError, match="timeout_s is from 0 to 3600"):
        vitalsd.spawn(command=["/nonexistent"], timeout_s=timeout_s)


@pytest.mark.parametrize("said", ["nonsense", "[]", '{"pid": 1}'])
def test_spawn_with_an_invalid_ready_line_raises_spawn_error(said: str) -> None:
    """A program that is no sidecar is not mistaken for one."""
    script = f"for last; do [ \"$flag\" = --ready-fd ] && fd=$last; flag=$last; done; echo '{said}' >&$fd; sleep 60"
    with pytest.raises(vitalsd.SpawnError, match="this is no sidecar"):
        vitalsd.spawn(command=["/bin/bash", "-c", script, "sh"])


def test_spawn_in_a_client_with_many_descriptors_works() -> None:
    """Descriptors above 1023, of which select(2) knows nothing, are none the worse."""
    process = client("""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for _ in range(1100):
            os.dup(0)
        print(vitalsd.spawn(port=0).stop())
    """)
    assert process.communicate(timeout=20) == ("0\n", "")


def test_spawn_collects_an_ended_sidecar_that_was_dropped() -> None:
    """A dropped sidecar that has ended is a zombie at most until the next spawn."""
    pid = vitalsd.spawn(port=0).pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid))
    with vitalsd.spawn(port=0), pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_spawn_loads_no_web_framework() -> None:
    """Spawn costs the client no web framework."""
    code = (
        "import sys, vitalsd\nvitalsd.spawn(port=0).stop()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastapi', 'starlette', 'uvicorn', 'pydantic')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_spawned_sidecar_after_a_client_crash_serves_the_history(short_path: Path) -> None:
    """SIGKILL to the client's whole process group: the sidecar answers 410, and still has the history."""
    process = client("sidecar = vitalsd.spawn(port=0); print(sidecar.pid, sidecar.url, flush=True); time.sleep(60)")
    assert process.stdout is not None
    pid, url = process.stdout.readline().split()
    try:
        assert ask(url, "/metrics?window_ms=10")[0] == 200
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status, body = ask(url, "/metrics?window_ms=10")
        assert (status, body["available"]) == (410, False)
        assert ask(url, "/history")[0] == 200
    finally:
        os.kill(int(pid), signal.SIGTERM)
        process.communicate()
    eventually(lambda: not alive(int(pid)))
    assert listing(short_path / "run") == []


def test_spawned_sidecar_holds_no_pipe_of_the_client() -> None:
    """A reader of the client's output gets the end of it, although the sidecar still runs."""
    process = client("sidecar = vitalsd.spawn(port=0); print(sidecar.pid)")
    out, err = process.communicate(timeout=20)
    os.kill(int(out), signal.SIGTERM)
    assert (process.returncode, err) == (0, "")
    eventually(lambda: not alive(int(out)))


@pytest.mark.parametrize("kernel", as_platform.KERNELS)
def test_spawned_sidecar_is_no_child_of_its_client(request: pytest.FixtureRequest, kernel: str) -> None:
    """The client has two children and the sidecar, which measures them and neither itself nor its threads."""
    command = as_platform.program(request.getfixturevalue("simulated_libsystem")) if kernel == "simulated" else None
    with client(f"""
        import subprocess
        children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        options = ["--children", "--record-interval", "0.1"]
        with vitalsd.spawn(port=0, command={command!r}, options=options) as sidecar:
            print(sidecar.url, *(child.pid for child in children), flush=True)
            input()
        for child in children:
            child.kill()
            child.wait()
    """) as program:
        assert program.stdout is not None
        url, *pids = program.stdout.readline().split()
        for _ in range(2):
            answer = ask(url, "/metrics?detail=full&children=true&window_ms=200")[1]
            assert [child["pid"] for child in answer["children"]] == sorted(map(int, pids))
            assert (answer["application"]["process_count"], answer["application"]["complete"]) == (3, True)
        recorded = eventually(lambda: ask(url, "/history?seconds=60")[1]["children"])
        assert {child["pid"] for child in recorded} == set(map(int, pids))
        assert program.communicate("\n", timeout=20)[1] == ""


def test_spawned_sidecar_gets_no_signal_of_the_terminal() -> None:
    """Ctrl-C and a hangup go to the client's process group, which is not the sidecar's."""
    process = client("sidecar = vitalsd.spawn(port=0); print(sidecar.pid, flush=True); input()")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    try:
        assert os.getsid(pid) == pid
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGHUP)
        process.wait()
        time.sleep(0.3)
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
        process.communicate()
        eventually(lambda: not alive(pid))  # before its directories go


@pytest.mark.parametrize("reaped", [True, False])
def test_spawned_sidecar_with_exit_with_target_ends_at_once(
    target: "subprocess.Popen[bytes]", short_path: Path, reaped: bool
) -> None:
    """The death of the target is noticed within a moment, collected by its parent or not, and ends the sidecar."""
    with serving(short_path, "--pid", str(target.pid), "--exit-with-target") as (process, _):
        watch = Stopwatch()
        target.kill()
        if reaped:
            target.wait()
        assert process.wait(5) == 0
        assert watch.elapsed_s < watch.allowed_s(1)
    assert listing(short_path / "run") == []


def test_spawned_sidecar_lingers_and_then_ends(target: "subprocess.Popen[bytes]", short_path: Path) -> None:
    """After the exit of the target it answers for the given time, and then ends by itself."""
    with serving(short_path, "--pid", str(target.pid), "--linger", "0.7") as (process, ready):
        target.kill()
        target.wait()
        assert ask(ready["url"], "/metrics?window_ms=10")[0] == 410
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert process.wait(5) == 0


def test_spawned_sidecar_keeps_a_target_that_execs(short_path: Path) -> None:
    """Exec is not death: pid and start stay, and so does the sidecar."""
    program = "import os, sys; sys.stdin.readline(); os.execvp('sleep', ['sleep', '60'])"
    with ExitStack() as stack:
        target = stack.enter_context(subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE))
        process, ready = stack.enter_context(serving(short_path, "--pid", str(target.pid), "--exit-with-target"))
        assert target.stdin is not None
        target.stdin.write(b"\n")
        target.stdin.flush()
        eventually(lambda: ask(ready["url"], "/info")[1]["target"]["name"] == "sleep")
        assert ask(ready["url"], "/metrics?window_ms=10&detail=full")[1]["target"]["name"] == "sleep"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        target.kill()
        assert process.wait(5) == 0
    [file] = short_path.rglob("*.sqlite")
    run, record = read_run(file)
    assert (run.identity.name, run.state) == ("sleep", "crashed")
    assert record.events[0].detail == "the target executed another program: sleep"


def test_two_sidecars_of_one_target_are_found_newest_first(short_path: Path) -> None:
    """Two live sidecars for one target: the newest first, and neither disturbs the other."""
    with vitalsd.spawn(port=0) as first, vitalsd.spawn(port=0) as second:
        found = endpoint.discover(os.getpid(), directories=[short_path / "run"])
        assert [each.pid for each in found] == [second.pid, first.pid]
