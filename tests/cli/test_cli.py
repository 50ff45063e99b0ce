"""The command line as a user types it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from support.serving import Serving
from support.sidecars import environment, eventually, serving
from support.target import Target
from vitalsd.cli import main
from vitalsd.cli.options import find_target
from vitalsd.contract.metrics import FullMetrics, Measured, Unavailable, parse_runtime_metrics
from vitalsd.sources.base import NoSuchProcessError, ProcessEntry
from vitalsd.sources.platform import this_platform

pytestmark = pytest.mark.live

Start = Callable[..., Target]


def vitalsd(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitalsd", *arguments], capture_output=True, text=True, timeout=30, **options
    )


def test_sample_prints_one_answer(start: Start) -> None:
    """`sample` writes one line of JSON that is the contract, and nothing to stderr."""
    target = start("--idle", "2")
    out = vitalsd("sample", "--pid", str(target.pid), "--window-ms", "50")
    assert (out.returncode, out.stderr) == (0, "")
    assert out.stdout.count("\n") == 1
    metrics = parse_runtime_metrics(out.stdout)
    assert type(metrics) is Measured
    assert sorted(thread.tid for thread in metrics.threads) == sorted(target.tids.values())
    assert metrics.sample_window_ms >= 50


def test_sample_without_a_target_measures_itself() -> None:
    """Tried without arguments it shows what an answer looks like."""
    metrics = parse_runtime_metrics(vitalsd("sample", "--window-ms", "10", "--detail", "full").stdout)
    assert isinstance(metrics, FullMetrics)
    assert metrics.process.thread_count >= 1


def test_sample_with_children_has_their_keys() -> None:
    """The keys are there with --children alone; null says that the source reads no children."""
    arguments = ("sample", "--window-ms", "10", "--detail", "full")
    answer = json.loads(vitalsd(*arguments, "--children").stdout)
    assert isinstance(parse_runtime_metrics(json.dumps(answer)), FullMetrics)
    assert {"children", "application"} <= answer.keys()
    assert not {"children", "application"} & json.loads(vitalsd(*arguments).stdout).keys()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["sample --window-ms 10", "runs", "completion bash", "serve --help"])
def test_sample_to_a_full_standard_output_exits_with_1_and_one_line(
    command: str, unbuffered: str, short_path: Path
) -> None:
    """The reason and status 1; no traceback, and nothing more as the interpreter ends."""
    with open("/dev/full", "w") as full:
        out = subprocess.run(
            [sys.executable, "-m", "vitalsd", *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            env={**environment(short_path), "PYTHONUNBUFFERED": unbuffered},
        )
    assert out.stderr == "vitalsd: cannot write to standard output: No space left on device\n"
    assert out.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_serve_with_closed_standard_streams_uses_none_of_their_numbers(tmp_path: Path) -> None:
    """Started with all three closed, as some supervisors do, no socket or file has their numbers."""
    code = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", code, "-m", "vitalsd", "serve", "--port", "0", "--uds", str(tmp_path / "s")]
    with subprocess.Popen(command, env=environment(tmp_path)) as process:
        try:
            eventually(lambda: (tmp_path / "s").exists())
            assert {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
        finally:
            process.terminate()


def test_sample_of_an_unused_pid_exits_with_1_and_the_reason() -> None:
    """The answer is the Unavailable variant on stdout, the status 1."""
    out = vitalsd("sample", "--pid", "2147483647", "--window-ms", "10")
    assert out.returncode == 1
    answer = parse_runtime_metrics(out.stdout)
    assert isinstance(answer, Unavailable)
    assert answer.reason == "no process has pid 2147483647"


def test_sample_of_a_target_that_ends_in_the_window_has_the_reason(start: Start) -> None:
    """A target that is killed meanwhile gives the reason and no numbers."""
    target = start()
    running = subprocess.Popen(
        [sys.executable, "-m", "vitalsd", "sample", "--pid", str(target.pid), "--window-ms", "3000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.8)
    target.kill()
    out, _ = running.communicate(timeout=20)
    assert running.returncode == 1
    assert json.loads(out)["available"] is False
    assert str(target.pid) in json.loads(out)["reason"]


def test_sample_interrupted_exits_with_130() -> None:
    """Ctrl-C ends a window without a traceback, with the status shells expect."""
    running = subprocess.Popen(
        [sys.executable, "-m", "vitalsd", "sample", "--window-ms", "60000"], stderr=subprocess.PIPE, text=True
    )
    process, cpu = psutil.Process(running.pid), []

    def sleeps() -> bool:  # before that it imports, and then an interrupt is Python's own
        cpu.append(process.cpu_times().user)
        return process.status() == psutil.STATUS_SLEEPING and len(cpu) > 9 and len(set(cpu[-9:])) == 1

    eventually(sleeps, 30)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert (running.returncode, "Traceback" in err) == (130, False)


def test_name_of_several_processes_selects_the_newest(start: Start) -> None:
    """If several processes have the name, the one started last is selected."""
    name = f"vitals{os.getpid()}"
    targets = []
    for _ in range(2):
        targets.append(start())
        targets[-1].ask(f"name {name.encode().hex()}")
        time.sleep(0.03)
    full = json.loads(vitalsd("sample", "--name", name, "--window-ms", "10", "--detail", "full").stdout)
    assert full["target"]["pid"] == targets[-1].pid
    assert full["target"]["name"] == name
    out = vitalsd("sample", "--name", "no-such-name", "--window-ms", "10")
    assert (out.returncode, json.loads(out.stdout)["reason"]) == (
        1,
        "no process of yours is named no-such-name; a process has the names of its main thread (on Linux its"
        " first 15 bytes), its program and its #! script; `python app.py` is named python",
    )


def test_serve_ready_line_has_the_address(short_path: Path) -> None:
    """The line on stderr is the address that answers."""
    with Serving(short_path) as serving:
        assert re.fullmatch(
            r"vitalsd: serving itself on http://127\.0\.0\.1:\d+/metrics and /\S+\.sock\n", serving.said
        )
        assert serving.get("/healthz") == {"status": "ok"}


def test_serve_loads_no_pydantic_plugin(short_path: Path) -> None:
    """One that the environment of the application has is not imported, which could take its time or fail."""
    code = "open(__file__ + '.was-here', 'w').close()\ndef new_schema_validator(*_, **__): return None, None, None\n"
    (short_path / "nosy.py").write_text(code, encoding="utf-8")
    metadata = short_path / "nosy-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nosy\nVersion: 1\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[pydantic]\nnosy = nosy\n", encoding="utf-8")
    env = environment(short_path) | {"PYTHONPATH": str(short_path)}
    imported = short_path / "nosy.py.was-here"
    subprocess.run([sys.executable, "-c", "import fastapi"], env=env, check=True, timeout=30)
    imported.unlink()
    with serving(short_path, env=env) as (_, ready):
        assert ready["url"]
    assert not imported.exists()


def test_serve_defers_unused_openapi_models() -> None:
    """FastAPI's models of OpenAPI are built at their first use, and work as usual; later models are built at once."""
    document = """
from fastapi import FastAPI
from pydantic import BaseModel
class Item(BaseModel):
    name: str
app = FastAPI()
@app.post("/items/{id}", response_model=Item)
def make(id: int, item: Item, q: str = "x"): ...
from fastapi.openapi.models import OpenAPI
built = OpenAPI.__pydantic_complete__, Item.__pydantic_complete__
print(built, BaseModel.model_config, app.openapi(), OpenAPI.model_json_schema())
"""
    plain, serving = (
        subprocess.run(
            [sys.executable, "-c", code + document], stdout=subprocess.PIPE, text=True, check=True, timeout=30
        ).stdout
        for code in ("", "from vitalsd.cli.service_command import import_service\nimport_service()")
    )
    assert plain.startswith("(True, True) {} ")
    assert serving == plain.replace("(True, True)", "(False, True)", 1)


def test_serve_without_standard_streams_serves(tmp_path: Path) -> None:
    """Started with stdin, stdout and stderr closed, as some supervisors do, it serves all the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = 'exec "$0" -m vitalsd serve --port "$1" <&- >&- 2>&-'
    environment = {**os.environ, "VITALSD_STATE_DIR": str(tmp_path)}
    server = subprocess.Popen(["sh", "-c", command, sys.executable, str(port)], env=environment)
    try:
        for _ in range(200):
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            except ConnectionRefusedError:
                assert server.poll() is None, "it ended"
                time.sleep(0.05)
                continue
            with connection:
                head = f"GET /metrics?window_ms=10 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            break
        else:
            pytest.fail("it never listened")
        server.terminate()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()


def test_serve_with_a_busy_port_exits_with_2_and_one_line() -> None:
    """A port that was asked for and is in use is wrong usage, said in one sentence; nothing is taken over."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        out = vitalsd("serve", "--port", str(port))
    assert out.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in out.stderr.splitlines()[-1]
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--port", "65536"], "65536"),
        (["serve", "--port", "http"], "http"),
        (["serve", "--host", "0.0.0.0"], "can be reached from other machines"),
        (["serve", "--host", "example.org"], "example.org"),
        (["serve", "--pid", "0"], "--pid"),
        (["serve", "--pid", "1", "--name", "x"], "exclude each other"),
        (["sample", "--pid", "1", "--name", "x"], "--pid and --name exclude each other"),
        (["top", "--url", "http://127.0.0.1:1", "--name", "x"], "--url and --name exclude each other"),
        (["top", "--url", "http://127.0.0.1:1", "--proc-root", "/x"], "--url and --proc-root exclude each other"),
        (["serve", "--exit-with-target"], "--exit-with-target does nothing without --pid"),
        (["serve", "--name", "x", "--linger", "5"], "--linger does nothing without --pid"),
        (["serve", "--pid", "1", "--linger", "5", "--exit-with-target"], "--exit-with-target and --linger exclude"),
        (["serve", "--record-interval", "0", "--retention", "5"], "--retention does nothing with --record-interval 0"),
        (["serve", "--record-interval", "0", "--black-box"], "--black-box does nothing with --record-interval 0"),
        (["serve", "--no-tcp", "--port", "0"], "--port does nothing with --no-tcp"),
        (["serve", "--no-thread-metrics", "--max-thread-metrics", "5"], "--max-thread-metrics does nothing with"),
        (["serve", "--otlp-interval", "5"], "--otlp-interval does nothing without --otlp"),
        (["serve", "--name", ""], "it is empty"),
        (["agent", "print", "--name", ""], "it is empty"),
        (["serve", "--record-interval", "nan"], "nan is not a finite number"),
        (["serve", "--linger", "inf"], "inf is not a finite number"),
        (["top", "--interval", "nan"], "nan is not a finite number"),
        (["sample", "--window-ms", "9"], "9"),
        (["sample", "--window-ms", "60001"], "60001"),
        (["sample", "--detail", "fuller"], "fuller"),
        (["sample", "--children"], "--children does nothing without --detail full"),
        (["sample", "--limit", "-1"], "--limit"),
        (["sample", "surplus"], "surplus"),
        (["smaple"], "smaple"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_error(arguments: list[str], said: str) -> None:
    """Wrong usage has status 2 and a last line that names what is wrong."""
    out = CliRunner().invoke(main, arguments)
    assert (out.exit_code, out.stdout) == (2, "")
    assert said in out.stderr.splitlines()[-1]


def test_serve_of_an_unused_pid_exits_with_1() -> None:
    """A target that does not exist ends `serve` at once with the reason."""
    out = vitalsd("serve", "--port", "0", "--pid", "2147483647")
    assert (out.returncode, out.stderr) == (1, "vitalsd: no process has pid 2147483647\n")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no procfs")
def test_serve_name_without_procfs_exits_at_once(tmp_path: Path) -> None:
    """In a directory that is no procfs no process can start, so the command does not wait."""
    out = vitalsd("serve", "--port", "0", "--name", "x", "--proc-root", str(tmp_path))
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr == f"vitalsd: {tmp_path} is not a procfs; mount it or name another with --proc-root\n"


def test_serve_of_a_zombie_exits_with_1(start: Start) -> None:
    """It can be opened, and has no numbers."""
    target = start()
    os.kill(target.pid, signal.SIGKILL)
    assert eventually(lambda: psutil.Process(target.pid).status() == psutil.STATUS_ZOMBIE)
    out = vitalsd("serve", "--port", "0", "--pid", str(target.pid))
    assert out.returncode == 1
    assert out.stderr == f"vitalsd: target {target.pid} has exited; its parent has not yet collected it (zombie)\n"


def test_help_has_commands_examples_and_exit_statuses() -> None:
    """--help names the commands, an example of each, and the exit statuses."""
    out = vitalsd("--help")
    assert out.returncode == 0
    for words in ("vitalsd sample --pid", "vitalsd serve --pid", "curl", "Exit status"):
        assert words in out.stdout
    for command in ("sample", "serve"):
        assert "--pid N" in vitalsd(command, "--help").stdout
    assert re.fullmatch(r"vitalsd \d+\.\d+\.\d+\n", vitalsd("--version").stdout)


@pytest.mark.parametrize("command", ["sample --window-ms 10", "runs", "endpoints", "--help", "--version"])
def test_sample_to_a_closed_standard_output_exits_with_1_and_the_reason(tmp_path: Path, command: str) -> None:
    """The answer is lost, as on a full disk; after a status 0 a script would continue without it."""
    out = subprocess.run(
        ["sh", "-c", f'exec "$0" -m vitalsd {command} >&-', sys.executable],
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        env=environment(tmp_path),
    )
    assert out.stderr == "vitalsd: cannot write to standard output: Bad file descriptor\n"
    assert out.returncode == 1


def test_sample_into_a_closed_pipe_ends_without_a_traceback() -> None:
    """Into a closed pipe, `sample` ends without a traceback."""
    out = subprocess.run(
        ["sh", "-c", '"$0" -m vitalsd sample --window-ms 10 | true', sys.executable],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Traceback" not in out.stderr


def test_name_on_macos_ignores_case() -> None:
    """A framework build of Python runs as `Python`; on Linux the case of letters counts."""
    entry = ProcessEntry(
        pid=1,
        name="Python",
        names=frozenset({"Python"}),
        started_unix_ns=0,
        cpu_ns=0,
        rss_bytes=0,
        thread_count=1,
        uids=frozenset({os.geteuid()}),
        parent=0,
    )
    macos = this_platform()._replace(name="macos", list_processes=lambda: [entry])
    assert find_target(None, "python", macos) == 1
    with pytest.raises(NoSuchProcessError):
        find_target(None, "python", macos._replace(name="linux"))
