"""Another user of this machine, by a real second uid: none of the ways in is one."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.edge import get
from support.paths import SUPPORT
from support.sidecars import serving
from vitalsd.contract.metrics import Measured, Unavailable
from vitalsd.discovery import runtime_file as endpoints
from vitalsd.discovery.runtime_file import Endpoint
from vitalsd.sources.platform import process_identities
from vitalsd_client import fetch

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to be another user"),
]

Attempt = Callable[..., Any]
INFO = "GET /info HTTP/1.1\r\nHost: {}\r\n{}Connection: close\r\n\r\n"


@pytest.fixture
def intruder() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "intruder.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    with process:
        yield process
        process.kill()


@pytest.fixture
def tries(intruder: subprocess.Popen[str]) -> Attempt:
    def tries(**what: Any) -> Any:
        assert intruder.stdin is not None
        intruder.stdin.write(json.dumps(what) + "\n")
        intruder.stdin.flush()
        return heard(intruder)

    return tries


def heard(intruder: subprocess.Popen[str]) -> Any:
    assert intruder.stdout is not None
    return json.loads(intruder.stdout.readline())


@pytest.fixture
def sidecar(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, dict[str, Any]]]:
    """One that wants a token, and was started with a umask of 0 in a directory that all may look into."""
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("VITALSD_STATE_DIR", str(short_path / "state"))
    short_path.chmod(0o755)
    old = os.umask(0)
    try:
        started = serving(short_path, "--auth", "token", "--record-interval", "0.1")
        _, ready = started.__enter__()
    finally:
        os.umask(old)
    yield short_path, ready
    started.__exit__(None, None, None)


def test_another_user_over_tcp_without_the_token_gets_401(sidecar: tuple[Path, dict[str, Any]], tries: Attempt) -> None:
    """The port is there for everybody; what it says is 401, with a token that was guessed too."""
    url = sidecar[1]["url"]
    for authorization in ("", "Authorization: Bearer \r\n", f"Authorization: Bearer {'A' * 43}\r\n"):
        answer = tries(dial=url, send=INFO.format(url[7:], authorization))
        assert answer.startswith("HTTP/1.1 401 ")
        assert '"pid"' not in answer


def test_another_user_cannot_open_the_unix_socket(sidecar: tuple[Path, dict[str, Any]], tries: Attempt) -> None:
    """Both its directory and its own mode refuse other users."""
    path, ready = sidecar
    assert tries(dial=ready["socket"], send="") == "PermissionError"
    (path / "run").chmod(0o755)
    assert tries(dial=ready["socket"], send="") == "PermissionError"


def test_another_user_over_an_opened_unix_socket_gets_403(sidecar: tuple[Path, dict[str, Any]], tries: Attempt) -> None:
    """After a chmod 666 the kernel still names the user of a connection: another user is refused, the owner is not."""
    path, ready = sidecar
    (path / "run").chmod(0o755)
    os.chmod(ready["socket"], 0o666)
    for _ in range(5):
        answer = tries(dial=ready["socket"], send=INFO.format("localhost", ""))
        assert answer in ("ConnectionResetError", "BrokenPipeError") or answer.startswith("HTTP/1.1 403 ")
        assert '"pid"' not in answer
    # A client that sends nothing gets the reason.
    assert "another_user" in tries(dial=ready["socket"], send="")
    assert get(ready["socket"], "/info").status == 200


def test_another_user_cannot_read_the_token(sidecar: tuple[Path, dict[str, Any]], tries: Attempt) -> None:
    """Neither the directory nor the runtime file is readable by other users, under any umask."""
    path, ready = sidecar
    assert tries(list=str(path / "run")) == "PermissionError"
    assert tries(read=ready["runtime_file"]) == "PermissionError"
    (path / "run").chmod(0o755)
    assert tries(list=str(path / "run")) != "PermissionError"
    assert tries(read=ready["runtime_file"]) == "PermissionError"
    assert tries(read=f"/proc/{ready['pid']}/environ") == "PermissionError"


def test_another_user_cannot_read_the_black_box(sidecar: tuple[Path, dict[str, Any]], tries: Attempt) -> None:
    """The record on disk is readable by its user only, as is all else below the state directory."""
    path, _ = sidecar
    deadline = time.monotonic() + 10
    while not any((path / "state").rglob("*-wal")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = [each for each in (path / "state").rglob("*") if each.is_file()]
    assert tries(list=str(path / "state")) == "PermissionError"
    for each in [path / "run", path / "state", *(path / "run").rglob("*"), *(path / "state").rglob("*")]:
        assert not stat.S_IMODE(each.stat().st_mode) & 0o077, each
    for directory in (path / "state", *(each for each in (path / "state").rglob("*") if each.is_dir())):
        directory.chmod(0o755)
    for file in found:
        assert tries(read=str(file)) == "PermissionError"


def test_another_user_on_the_port_gets_no_token(
    sidecar: tuple[Path, dict[str, Any]], intruder: subprocess.Popen[str], tries: Attempt
) -> None:
    """
    The sidecar is killed and another user takes its port: our client does not even connect there.

    And if it could not tell, because the process that the runtime file names is alive: it asks for a proof, gets
    none, and keeps the token to itself.
    """
    path, ready = sidecar
    published = endpoints.read(Path(ready["runtime_file"]))
    assert published.token is not None
    assert published.port is not None
    assert isinstance(fetch(10), Measured)
    os.kill(ready["pid"], 9)
    while get_or_none(ready["url"]):
        time.sleep(0.01)
    assert tries(squat=published.port) == "listening"
    assert isinstance(fetch(10), Unavailable)
    me = os.getpid()
    forged: Endpoint = replace(published, pid=me, start=process_identities().start_key(me) or 0, socket=None)
    endpoints.publish(forged, path / "run")
    found = fetch(10)
    assert isinstance(found, Unavailable)
    assert "the token was not sent" in found.reason
    received = heard(intruder)
    assert "GET /hello?nonce=" in received
    assert published.token not in received
    assert "authorization" not in received.lower()


def get_or_none(url: str) -> bool:
    try:
        return get(url).status == 200
    except OSError:
        return False
