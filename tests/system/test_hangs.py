"""Hangs planted in a client with a sidecar: what /heartbeats and /history show, and what must not be a hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.beating import LIMIT_S, BeatingClient
from support.serving import Serving
from support.sidecars import environment, eventually
from vitalsd.recording.replay_file import read_replay_file

pytestmark = pytest.mark.live


@pytest.mark.parametrize("begin", ["spawn", "start"])
def test_hang_is_shown_while_it_lasts_and_afterwards(short_path: Path, begin: str) -> None:
    """/heartbeats names the cause during the hang; /history has one event, whose length is that of the silence."""
    with BeatingClient(short_path, begin) as client:
        client.beating()
        assert client.hangs() == []
        begun = time.time()
        client.tell("block 4000")
        silent = client.silent()
        assert silent == silent | {"limit_ms": 1000 * LIMIT_S, "cause": "blocked"}
        assert silent["tid"] == client.pid
        (going,) = eventually(client.hangs, 10)
        assert going == going | {"heartbeat": "ui", "ongoing": True}
        assert client.read() == "block 4000"
        lasted_ms = 1000 * (time.time() - begun)
        (hang,) = client.over()
        assert hang == hang | {"time_ms": going["time_ms"], "cause": "blocked", "detail": silent["detail"]}
        assert 4000 <= hang["duration_ms"] <= lasted_ms + 1000
        client.beating()
        assert client.hangs() == [hang]


def test_hang_after_a_second_spawn_is_that_of_the_same_handle(short_path: Path) -> None:
    """A handle made before belongs to the process: the next sidecar watches it too."""
    with BeatingClient(short_path) as client:
        first = client.sidecar
        client.another()
        assert client.sidecar != first
        client.beating()
        client.tell("block 3000")
        assert client.silent()["cause"] == "blocked"
        assert client.read() == "block 3000"
        assert [hang["heartbeat"] for hang in client.over()] == ["ui"]


def test_pause_of_a_heartbeat_is_no_hang(short_path: Path) -> None:
    """Between pause and resume no beat is expected."""
    with BeatingClient(short_path) as client:
        client.beating()
        client.tell("pause 4000")
        eventually(lambda: client.heartbeats()["ui"]["state"] == "paused", 10)
        assert client.read() == "pause 4000"
        client.beating()
        assert client.hangs() == []


def test_forked_child_does_not_disturb_the_heartbeat_of_its_parent(short_path: Path) -> None:
    """A child beats and pauses in memory of its own; a hang of the parent is found while the child lives."""
    with BeatingClient(short_path) as client:
        client.beating()
        assert client.ask("fork 15000")
        client.beating()
        assert client.hangs() == []
        client.tell("block 3000")
        assert client.silent()["cause"] == "blocked"
        assert client.read() == "block 3000"
        assert len(client.over()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has no pid of a sidecar that stops alone")
def test_stopped_sidecar_finds_no_hang(short_path: Path) -> None:
    """Silence counts only while the sidecar looks: for 3 s it does not, and the client beats."""
    with BeatingClient(short_path) as client:
        client.beating()
        os.kill(client.sidecar, signal.SIGSTOP)
        time.sleep(3)
        os.kill(client.sidecar, signal.SIGCONT)
        client.beating()
        assert client.hangs() == []


@pytest.mark.skipif(sys.platform != "linux", reason="a look at a thread is of Linux")
def test_hang_of_a_stopped_client_has_the_cause_stopped(short_path: Path) -> None:
    """SIGSTOP of the client."""
    with BeatingClient(short_path) as client:
        client.beating()
        os.kill(client.pid, signal.SIGSTOP)
        assert client.silent()["cause"] == "stopped"
        os.kill(client.pid, signal.SIGCONT)
        (hang,) = client.over()
        assert hang["cause"] == "stopped"


def test_run_of_a_client_killed_during_a_hang_has_the_hang(short_path: Path) -> None:
    """`vitalsd runs` has the run, and a replay of it the hang, with its length so far."""
    with BeatingClient(short_path) as client:
        client.beating()
        client.tell("block 60000")
        client.silent()
        time.sleep(2)
        client.process.kill()
        client.process.wait()
        client.over()
        command = [sys.executable, "-m", "vitalsd", "runs", "--json"]

        def crashed() -> dict[str, Any] | None:
            done = subprocess.run(command, env=environment(short_path), capture_output=True, text=True, check=True)
            return next((run for run in json.loads(done.stdout) if run["state"] == "crashed"), None)

        run = eventually(crashed, 30)
        file = short_path / "state" / "runs" / f"{run['id']}.sqlite"
        eventually(lambda: not read_replay_file(file).opened.record.events[-1].ongoing, 10)
    with Serving(short_path, str(file), command="replay") as replay:
        (hang,) = [event for event in replay.get("/history", seconds=3600)["events"] if event["kind"] == "hang"]
        assert replay.get("/heartbeats") == []
    assert (hang["heartbeat"], hang["cause"]) == ("ui", "blocked")
    assert hang["duration_ms"] > 2000
    assert not hang["ongoing"]
