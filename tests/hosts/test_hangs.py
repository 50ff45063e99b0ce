"""A client of Qt whose user interface waits for a lock, and one that idles: what its reports and its sidecar have."""

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.sidecars import ask, environment, eventually, listing

pytest.importorskip("PySide6", reason="PySide6 is not installed: run make test-hosts")
pytestmark = pytest.mark.live

PROGRAM = Path(__file__).parent / "programs" / "qt_hang.py"
LEAST_MS = 3000
"""Time for which the program hangs at least, ms."""


def events(client: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """What the program prints."""
    assert client.stdout is not None
    for line in client.stdout:
        yield json.loads(line)


@contextmanager
def viewer(directory: Path, mode: str) -> Iterator["subprocess.Popen[str]"]:
    """The program without a display; it and its sidecar end with the context."""
    client = subprocess.Popen(
        [sys.executable, "-P", str(PROGRAM), str(directory), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(directory), "QT_QPA_PLATFORM": "offscreen"},
    )
    try:
        yield client
    finally:
        client.kill()
        client.communicate()
        for name in listing(directory / "run"):
            if name.endswith(".json"):
                os.kill(json.loads((directory / "run" / name).read_text(encoding="utf-8"))["pid"], 15)
        eventually(lambda: listing(directory / "run") == [], 20)


def hangs(report: str | Path) -> list[dict[str, Any]]:
    """The hangs in the history of a report."""
    with zipfile.ZipFile(report) as archive:
        table = json.loads(archive.read("runtime-history.json"))
    return [event for event in table["events"] if event["kind"] == "hang"]


def test_report_of_a_qt_client_has_the_hang_of_its_user_interface(short_path: Path) -> None:
    """Made by another thread or by the CLI during the hang, and afterwards; the cause is `blocked` in each."""
    found: dict[str, list[dict[str, Any]]] = {}
    with viewer(short_path, "hang") as client:
        for event in events(client):
            if event["event"] in ("during", "after"):
                found[event["event"]] = hangs(event["path"])
            if event["event"] == "during":
                command = [sys.executable, "-m", "vitalsd", "report", "--pid", str(client.pid), "--out", "cli"]
                subprocess.run(command, env=environment(short_path), cwd=short_path, check=True, capture_output=True)
                found["cli"] = hangs(next((short_path / "cli").glob("*.zip")))
                assert client.stdin is not None
                client.stdin.write("\n")
                client.stdin.flush()
            elif event["event"] == "done":
                break
    for when in ("cli", "during", "after"):
        (hang,) = found[when]
        assert hang == hang | {"heartbeat": "ui", "cause": "blocked", "ongoing": when != "after"}, when
        assert hang["time_ms"] == found["after"][0]["time_ms"]
    assert found["after"][0]["duration_ms"] >= max(LEAST_MS, found["cli"][0]["duration_ms"])


def test_qt_client_that_idles_has_no_hang(short_path: Path) -> None:
    """Its event loop sleeps and beats for 10 s."""
    with viewer(short_path, "idle") as client:
        started = next(events(client))
        eventually(lambda: [beat["state"] for beat in ask(started["url"], "/heartbeats")[1]] == ["beating"], 30)
        time.sleep(10)
        status, history = ask(started["url"], "/history")
        assert (status, [event for event in history["events"] if event["kind"] == "hang"]) == (200, [])
