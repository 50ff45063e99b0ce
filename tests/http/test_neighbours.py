"""
Another user of this machine over TCP: what it sees, and what it takes from the owner of the sidecar.

The other user is a process with a user id of its own, the sidecar is a real one with a black box.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.edge import Reply, dial, exchange
from support.paths import SUPPORT
from support.sidecars import eventually, serving
from support.target import Target
from vitalsd_client import BugReport, Measured, fetch

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to be another user"),
]

OTHER = 65501
VISIBLE = ["/metrics?window_ms=10", "/metrics?window_ms=10&sort=cpu&limit=1", "/healthz", "/", "/docs"]
HIDDEN = [
    *("/metrics?window_ms=10&detail=full", "/stream", "/processes", "/info", "/history"),
    *("/heartbeats", "/marks", "/runs", "/runs/{run}/history", "/report.zip", "/report.zip?run={run}", "/openapi.json"),
]
WRITES = ["/marks", "/report.zip", "/runs/{run}/reported"]
MEMBERS = {"runtime-metrics.json", "runtime-history.json", "marks.json", "previous-run.json"}
SCRAPE = "Accept: text/plain;version=0.0.4\r\n"


class Neighbour:
    """A process of another user, ended with the context; see intruder.py for its attempts."""

    def __init__(self, uid: int = OTHER) -> None:
        command = [sys.executable, str(SUPPORT / "intruder.py"), str(uid)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/"
        )

    def begin(self, **what: Any) -> None:
        """Hand over an attempt without waiting for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def __call__(self, **what: Any) -> Any:
        """Hand over an attempt; return what came of it."""
        self.begin(**what)
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def tries() -> Iterator[Neighbour]:
    with Neighbour() as tries:
        yield tries


@pytest.fixture
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of an owner without a sidecar."""
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("VITALSD_STATE_DIR", str(short_path / "state"))
    return short_path


@pytest.fixture
def sidecar(home: Path) -> Iterator[dict[str, Any]]:
    """The ready line of a sidecar over a process, with ``run``: the id of a run that crashed before, with a mark."""
    options = ("--app", "viewer", "--record-interval", "0.1")
    with Target() as first, serving(home, "--pid", str(first.pid), *options) as (process, ready):
        assert send(ready["socket"], "POST", "/marks", {"label": "opened divorce-papers.docx"}).status == 201
        eventually(lambda: json.loads(send(ready["socket"], "GET", "/history").body)["time_ms"])
        process.kill()
        process.wait()
    with Target() as second, serving(home, "--pid", str(second.pid), *options) as (_, ready):
        [run] = [each for each in runs(ready) if each["state"] == "crashed"]
        eventually(lambda: json.loads(send(ready["socket"], "GET", "/history").body)["time_ms"])
        yield {**ready, "run": run["id"]}


def send(where: str, method: str, path: str, body: Any = None) -> Reply:
    """One request of the owner."""
    content = b"" if body is None else json.dumps(body).encode()
    host = where.removeprefix("http://") if where.startswith("http://") else "localhost"
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    if method == "POST":
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return exchange(where, head.encode() + b"\r\n" + content, method)


def runs(ready: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(send(ready["socket"], "GET", "/runs").body)
    return found


def request(ready: dict[str, Any], path: str, method: str = "GET", head: str = "", body: str = "") -> str:
    """The text of a request over TCP."""
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    path = path.replace("{run}", ready.get("run", ""))
    return f"{method} {path} HTTP/1.1\r\nHost: {ready['url'][7:]}\r\n{head}\r\n{body}"


def status_and_body(answer: str) -> tuple[int, str]:
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


def test_another_user_over_tcp_sees_what_ps_and_top_show_and_changes_nothing(
    sidecar: dict[str, Any], tries: Neighbour
) -> None:
    """Names and CPU of threads are public on this machine; marks, runs, descriptors and reports are not."""

    def asked(path: str, method: str = "GET", head: str = "", body: str = "") -> tuple[int, str]:
        content = request(sidecar, path, method, f"{head}Connection: close\r\n", body)
        return status_and_body(tries(dial=sidecar["url"], send=content))

    for path in VISIBLE:
        assert asked(path)[0] == asked(path, "HEAD")[0] == 200
    status, text = asked("/metrics", head=SCRAPE)
    assert status == 200
    assert "process_cpu_seconds_total" in text
    assert "process_open_fds" not in text
    assert (
        "process_open_fds" in exchange(sidecar["url"], request(sidecar, "/metrics", head=SCRAPE).encode()).body.decode()
    )
    for path in HIDDEN:
        status, body = asked(path)
        assert (path, status, json.loads(body)["reason"]) == (path, 403, "another_user")
        assert asked(path, "HEAD")[0] == 403
    for path in WRITES:
        status, body = asked(path, "POST", body='{"label":"forged"}')
        assert (path, status, json.loads(body)["reason"]) == (path, 403, "another_user")
    assert str(OTHER) in body
    assert json.loads(send(sidecar["socket"], "GET", "/marks").body) == []
    [crashed] = [each for each in runs(sidecar) if each["state"] == "crashed"]
    assert not crashed["reported"]


def test_another_user_posts_no_beat_and_no_gauge(sidecar: dict[str, Any], tries: Neighbour) -> None:
    """Over TCP it is refused, and the page of shared memory opens for the owner alone."""
    for path, body in (("/heartbeats/ui", "{}"), ("/gauges", '{"fps":58}')):
        content = request(sidecar, path, "POST", "Connection: close\r\n", body)
        status, answer = status_and_body(tries(dial=sidecar["url"], send=content))
        assert (status, json.loads(answer)["reason"]) == (403, "another_user")
        assert send(sidecar["url"], "POST", path, json.loads(body)).status == 204
    eventually(lambda: len(json.loads(send(sidecar["socket"], "GET", "/heartbeats").body)) == 1, 15)
    page = json.loads(Path(sidecar["runtime_file"]).read_text(encoding="utf-8"))["signals"]["path"]
    assert tries(read=page) == "PermissionError"


def test_trailing_window_of_another_user_is_the_coming_window(sidecar: dict[str, Any], tries: Neighbour) -> None:
    """Only the owner gets recorded data; a client of another user gets the coming window."""
    content = request(sidecar, "/metrics?window_ms=400&mode=trailing", head="Connection: close\r\n")
    begun = time.monotonic()
    status, body = status_and_body(tries(dial=sidecar["url"], send=content))
    assert status == 200
    assert json.loads(body)["sample_window_ms"] >= 400
    assert time.monotonic() - begun >= 0.4


def test_root_over_tcp_has_every_route_of_the_owner(home: Path) -> None:
    """The sidecar of an ordinary user, asked by root and by its own user."""
    stranger = str(SUPPORT / "stranger.py")
    home.chmod(0o711)
    for name in ("run", "state"):
        (home / name).mkdir(mode=0o700)
        os.chown(home / name, 65534, 65534)
    with (
        serving(home, "--record-interval", "0.1", program=(sys.executable, stranger, "0")) as (_, ready),
        Neighbour(65534) as owner,
        Neighbour() as other,
    ):
        content = request(ready, "/info", head="Connection: close\r\n")
        assert send(ready["url"], "GET", "/info").status == 200
        assert owner(dial=ready["url"], send=content).startswith("HTTP/1.1 200 ")
        assert other(dial=ready["url"], send=content).startswith("HTTP/1.1 403 ")


def test_another_user_with_the_token_gets_the_proof_and_every_route(home: Path, tries: Neighbour) -> None:
    """A client asks for the proof before it sends the token."""
    with Target() as target, serving(home, "--pid", str(target.pid), "--auth", "token") as (_, ready):
        token = json.loads(Path(ready["runtime_file"]).read_text())["token"]
        for path, head, status in (
            ("/hello?nonce=0123456789abcdef", "", 200),
            ("/marks", "", 401),
            ("/marks", f"Authorization: Bearer {token}\r\n", 200),
        ):
            text = tries(dial=ready["url"], send=request(ready, path, head=f"{head}Connection: close\r\n"))
            assert status_and_body(text)[0] == status


def test_another_user_sees_the_names_of_threads_that_top_shows(home: Path, tries: Neighbour) -> None:
    """Before 3.14 Python tells the kernel no names; a sidecar in the same process knows them all the same."""
    name = "opening /home/vic/divorce-papers.docx"
    code = f"""
        import sys, threading, vitalsd
        threading.Thread(target=sys.stdin.read, name={name!r}).start()
        with vitalsd.start(port=0) as sidecar:
            print(sidecar.url, flush=True)
            threading.enumerate()[1].join()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        threads = json.loads(send(url, "GET", "/metrics?window_ms=10").body)["threads"]
        [tid] = [str(each["tid"]) for each in threads if each["name"] == name]
        shown = Path(f"/proc/{process.pid}/task/{tid}/comm").read_text().strip()
        for path, head in (("/metrics?window_ms=10", ""), ("/metrics", SCRAPE)):
            text = tries(dial=url, send=request({"url": url}, path, head=f"{head}Connection: close\r\n"))
            assert status_and_body(text)[0] == 200
            assert name not in text
            assert tid in text
            assert shown in text
        process.stdin.close()


@pytest.mark.parametrize("reset", [False, True])
def test_another_user_that_closes_at_once_sets_no_mark(sidecar: dict[str, Any], tries: Neighbour, reset: bool) -> None:
    """The kernel reports root for a socket that no process holds any more, and nothing for one that was reset."""
    for path, body, times in (("/marks", '{"label":"forged"}', 300), ("/runs/{run}/reported", "{}", 50)):
        tries(leave=sidecar["url"], send=request(sidecar, path, "POST", body=body), reset=reset, times=times)
    tries(dial=sidecar["url"], send=request(sidecar, "/healthz", head="Connection: close\r\n"))
    assert json.loads(send(sidecar["socket"], "GET", "/marks").body) == []
    assert not any(each["reported"] for each in runs(sidecar))


def test_another_user_with_the_token_has_every_route(home: Path, tries: Neighbour) -> None:
    """The token is the owner's permission."""
    with serving(home, "--auth", "token", "--record-interval", "0.1") as (_, ready):
        token = json.loads(Path(ready["runtime_file"]).read_text())["token"]
        head = f"Authorization: Bearer {token}\r\nConnection: close\r\n"
        for path in ("/info", "/metrics?window_ms=10&detail=full", "/marks", "/runs"):
            assert tries(dial=ready["url"], send=request(ready, path, head=head)).startswith("HTTP/1.1 200 ")
            assert tries(dial=ready["url"], send=request(ready, path, head="Connection: close\r\n")).startswith(
                "HTTP/1.1 401 "
            )


@pytest.mark.parametrize("hidepid", [1, 2])
def test_another_user_sees_no_process_that_proc_hides(home: Path, tries: Neighbour, hidepid: int) -> None:
    """The answer does not depend on whether there is a process with the pid."""
    stranger = str(SUPPORT / "stranger.py")
    home.chmod(0o711)
    for name in ("run", "state"):
        (home / name).mkdir(mode=0o700)
        os.chown(home / name, 65534, 65534)
    with serving(home, program=(sys.executable, stranger, str(hidepid))) as (process, ready):
        for pid in ("", f"&pid={process.pid}", "&pid=1"):
            for head in ("", SCRAPE):
                content = request(ready, f"/metrics?window_ms=10{pid}", head=f"{head}Connection: close\r\n")
                status, body = status_and_body(tries(dial=ready["url"], send=content))
                assert (status, json.loads(body)["reason"]) == (403, "another_user")
                assert str(process.pid) not in body
        assert tries(dial=ready["url"], send=request(ready, "/healthz", head="Connection: close\r\n")).startswith(
            "HTTP/1.1 200 "
        )


def test_replay_shows_another_user_no_data(home: Path, tries: Neighbour) -> None:
    """A report from elsewhere is for the user that opened it."""
    with Target() as target, serving(home, "--pid", str(target.pid), "--record-interval", "0.1") as (_, ready):
        eventually(lambda: json.loads(send(ready["socket"], "GET", "/history").body)["time_ms"])
        report = home / "report.zip"
        report.write_bytes(send(ready["socket"], "POST", "/report.zip?window_ms=10", {}).body)
    with Replayed(report) as url:
        for path in ("/metrics?window_ms=10", "/info", "/history", "/report.zip", "/runs"):
            content = request({"url": url}, path, head="Connection: close\r\n")
            assert tries(dial=url, send=content).startswith("HTTP/1.1 403 ")


class Replayed:
    """``vitalsd replay FILE``; the URL of its server."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-P", "-m", "vitalsd", "replay", "--port", "0", str(file)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        return "http://" + line.partition("http://")[2].split("/")[0].split()[0]

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stderr is not None
        self._process.stderr.close()


# What it takes from the owner


def test_windows_and_targets_of_disconnected_clients_are_released_at_once(home: Path) -> None:
    """64 windows of a minute, and as many other processes as there may be, left by the owner over TCP."""
    with Target() as target, serving(home, "--record-interval", "0") as (_, ready), Neighbour(0) as root:
        for i in range(64):
            root(leave=ready["url"], send=request(ready, f"/metrics?window_ms={60_000 - i}"), reset=False, times=1)
            content = request(ready, f"/metrics?window_ms={60_000 - i}&pid={target.pid}")
            root(leave=ready["url"], send=content, reset=i % 2 == 0, times=1)
        for query in ("window_ms=50", f"window_ms=51&pid={target.pid}"):
            assert send(ready["url"], "GET", f"/metrics?{query}").status == 200


def test_streams_of_clients_that_disconnect_at_once_take_no_slot(home: Path, tries: Neighbour) -> None:
    """Whenever the client leaves, before the first event or after it."""
    with serving(home, "--record-interval", "0.1") as (_, ready):
        content = request(ready, "/stream?interval_ms=10")
        with Neighbour(0) as root:
            for reset in (False, True):
                root(leave=ready["url"], send=content, reset=reset, times=200)

        def free() -> bool:
            streams = [dial(ready["url"]) for _ in range(8)]
            for each in streams:
                each.sendall(content.encode())
            heads = [each.recv(20) for each in streams]
            for each in streams:
                each.close()
            return all(head.startswith(b"HTTP/1.1 200 ") for head in heads)

        eventually(free)


def tables_of(ready: dict[str, Any]) -> list[str]:
    """Requests for large tables, no two of them alike."""
    return [request(ready, f"/history?seconds={300 + i}&top=20000") for i in range(40)]


def flood_of(ready: dict[str, Any]) -> list[str]:
    """Requests of every kind, as many as an attacker keeps connections."""
    paths = [f"/metrics?window_ms={60_000 - i}" for i in range(64)]
    paths += [
        f"/metrics?window_ms=5000&pid={pid}"
        for pid in sorted(map(int, filter(str.isdecimal, os.listdir("/proc"))))[:40]
    ]
    paths += ["/stream"] * 10 + ["/runs"] * 40 + ["/report.zip?window_ms=10"] * 10 + ["/processes"] * 5
    plain = [request(ready, path) for path in paths] + [request(ready, "/metrics", head=SCRAPE)] * 10
    return plain + tables_of(ready)


@pytest.mark.parametrize(("uid", "kind"), [(OTHER, flood_of), (0, tables_of)])
def test_reports_over_the_unix_socket_are_complete_under_a_flood_over_tcp(
    sidecar: dict[str, Any], uid: int, kind: Callable[[dict[str, Any]], list[str]]
) -> None:
    """
    Eight of eight, with history, marks and the run that crashed, and no measurement is refused.

    Requests of root count as those of a user that the kernel does not report, as on macOS.
    """
    assert send(sidecar["socket"], "POST", "/marks", {"label": "F12"}).status == 201
    with Neighbour(uid) as tries, Neighbour(uid) as more:
        for each in (tries, more):
            each.begin(flood=sidecar["url"], requests=kind(sidecar), seconds=40)
        time.sleep(1)
        complete = 0
        for _ in range(8):
            bundle = BugReport("viewer", socket=sidecar["socket"]).bundle()
            assert list(bundle.failures) == []
            assert set(bundle.members) >= MEMBERS
            assert json.loads(bundle.members["runtime-metrics.json"])["threads"]
            complete += 1
        assert complete == 8
        assert isinstance(fetch(50, "wait", socket=sidecar["socket"]), Measured)
