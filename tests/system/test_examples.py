"""Every example in ``clients/examples``, run as its first lines say."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.sidecars import VITALSD, ask, environment, eventually, listing
from support.supervisors import FakeSupervisor

EXAMPLES = ROOT / "clients" / "examples"


@pytest.fixture
def env(short_path: Path) -> dict[str, str]:
    """Directories of their own, and the vitalsd of this checkout."""
    return environment(short_path) | {"VITALSD": " ".join(VITALSD)}


def test_examples_have_a_test_each() -> None:
    """No example is without a test."""
    assert [name for name in listing(EXAMPLES) if name != "__pycache__"] == [
        "agent.sh",
        "receiver.py",
        "spawning_app.py",
        "threaded_app.py",
        "watch.sh",
    ]


def test_threaded_app_prints_commands_that_answer(short_path: Path, env: dict[str, str]) -> None:
    """Every command it prints answers, and names its busy threads by the names that Python knows."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "threaded_app.py")], env=env, stdout=subprocess.PIPE, text=True
    ) as app:
        try:
            assert app.stdout is not None
            said = "".join(iter(app.stdout.readline, "Ctrl-C ends it.\n"))
            commands = re.findall(r"^  (curl .*)$", said, re.MULTILINE)
            assert len(commands) == 7
            for command in commands:
                streamed = "--max-time 1.5 " if "/stream" in command else "--fail "
                done = subprocess.run(
                    ["sh", "-c", command.replace("curl ", f"curl {streamed}", 1)], capture_output=True
                )
                assert done.returncode == (28 if "/stream" in command else 0), command
                assert done.stdout
            url = re.search(r"http://127.0.0.1:[0-9]+", said)
            assert url is not None
            body = ask(url[0], "/metrics?window_ms=500&sort=cpu&limit=3")[1]
            assert {thread["name"] for thread in body["threads"]} >= {"render", "network"}
            assert body["threads"][0]["name"] == "render"
        finally:
            app.send_signal(signal.SIGINT)
        assert app.wait(10) == 0
    assert listing(short_path / "run") == []


def test_spawning_app_leaves_a_sidecar_with_its_history(env: dict[str, str]) -> None:
    """The application is dead, and its sidecar tells what it did last."""
    app = subprocess.run([sys.executable, str(EXAMPLES / "spawning_app.py")], env=env, capture_output=True, text=True)
    assert app.returncode == -signal.SIGKILL
    found = re.search(r"sidecar ([0-9]+) watches process ([0-9]+): curl -s '(http://[^/]*)", app.stdout)
    assert found is not None
    sidecar, target, url = int(found[1]), int(found[2]), found[3]
    try:
        status, body = ask(url, "/metrics?window_ms=10")
        assert (status, body["available"]) == (410, False)
        assert str(target) in body["reason"]
        assert ask(url, "/history?seconds=60")[0] == 200
    finally:
        os.kill(sidecar, signal.SIGTERM)
    eventually(lambda: listing(Path(env["VITALSD_RUNTIME_DIR"])) == [])


def test_watch_script_prints_metrics_and_keeps_the_status(short_path: Path, env: dict[str, str]) -> None:
    """It prints one answer about its program, ends with that program's status, and leaves nothing."""
    command = ["sh", str(EXAMPLES / "watch.sh"), "sh", "-c", "sleep 2; exit 7"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["platform"] in ("linux", "macos")
    assert listing(short_path / "run") == []


def test_watch_script_without_a_sidecar_runs_the_program(env: dict[str, str]) -> None:
    """The script reports a sidecar that does not start, and runs the program."""
    command = ["sh", str(EXAMPLES / "watch.sh"), "echo", "ran"]
    done = subprocess.run(command, env=env | {"VITALSD": "false"}, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "ran\n")
    assert "no sidecar" in done.stderr


@pytest.mark.parametrize("kind", ["launchd", "systemd"])
def test_agent_script_installs_asks_and_uninstalls(kind: str, short_path: Path, env: dict[str, str]) -> None:
    """It installs, asks, and takes everything back."""
    (short_path / "bin").mkdir()
    fake = FakeSupervisor(short_path / "bin")
    env |= {"HOME": str(short_path), "PATH": fake.path}
    command = ["sh", str(EXAMPLES / "agent.sh"), "myapp", "--supervisor", kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "installed " in done.stdout
    assert done.stdout.endswith("removed\n")
    assert not fake.loaded
