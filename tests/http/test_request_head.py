"""HEAD wherever there is GET: the checks and headers of GET, no body, and nothing measured, read or built for it."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.edge import Edge, Reply, dial, get, read_reply, whole_app
from support.serving import Serving
from support.sidecars import environment, eventually, serving
from support.tools import program
from vitalsd.http.access.access_control import OPEN_PATHS
from vitalsd.recording.run_directory import RunDirectory

pytestmark = pytest.mark.live

QUICK = {"/metrics": "?window_ms=10", "/report.zip": "?window_ms=10", "/hello": "?nonce=0123456789abcdef"}
"""Query parameters with which GET answers at once."""
MISSING = frozenset(("content-length", "content-disposition", "transfer-encoding"))
"""Headers of GET that an answer to HEAD without a body to count may lack, or have instead of them."""


class Guarded:
    """A sidecar that asks for a token and has the run of one that was killed."""

    def __init__(self, ready: dict[str, Any]) -> None:
        self.url: str = ready["url"]
        token = json.loads(Path(ready["runtime_file"]).read_text())["token"]
        self.header = f"Authorization: Bearer {token}"
        eventually(lambda: self.get("/info")["recorder"]["snapshots"] >= 3)

    def get(self, path: str) -> Any:
        reply = get(self.url, path, self.header)
        assert reply.status == 200, reply
        return json.loads(reply.body)

    def path(self, route: str) -> str:
        """A path that GET of this route answers with 200."""
        run_id = self.get("/runs")[0]["id"] if "{run_id}" in route else ""
        return route.replace("{run_id}", run_id) + QUICK.get(route, "")


@pytest.fixture(scope="module")
def guarded(module_path: Path) -> Iterator[Guarded]:
    options, env = ("--auth", "token", "--record-interval", "0.05"), environment(module_path)
    with serving(module_path, *options, env=env) as (process, ready):
        Guarded(ready)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving(module_path, *options, env=env) as (_, ready):
        yield Guarded(ready)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("recording"), "--record-interval", "0.05") as running:
        eventually(lambda: running.get("/info")["recorder"]["snapshots"] >= 3)
        yield running


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A sidecar that takes no snapshot by itself."""
    with Serving(tmp_path_factory.mktemp("idle"), "--record-interval", "0") as running:
        yield running


def begun(url: str, path: str, *headers: str) -> Reply:
    """The answer to GET; of a stream the head alone."""
    if not path.startswith("/stream"):
        return get(url, path, *headers)
    with dial(url) as connection:
        connection.sendall(request("GET", url, path, *headers))
        head, _, _ = head_of(connection).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    found = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return Reply(int(status.split()[1]), found, b"")


def request(method: str, url: str, path: str, *lines: str, end: str = "Connection: close") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {url[7:]}", *lines, end, "", ""]).encode()


def head_of(connection: socket.socket) -> bytes:
    """What comes first, up to the empty line, and whatever came with it behind that."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


def fields(reply: Reply, *, without: frozenset[str] = MISSING) -> list[tuple[str, str]]:
    """Headers by name, but for the date."""
    return sorted((name.lower(), value) for name, value in reply.headers if name.lower() not in {*without, "date"})


ROUTES = (
    *(
        "/",
        "/docs",
        "/openapi.json",
        "/healthz",
        "/heartbeats",
        "/info",
        "/metrics",
        "/stream",
        "/history",
        "/marks",
        "/processes",
    ),
    *("/runs", "/runs/{run_id}/history", "/report.zip", "/hello"),
)


def test_head_tests_cover_every_get_route(guarded: Guarded) -> None:
    """The schema has no other route with GET."""
    paths = guarded.get("/openapi.json")["paths"]
    assert {path for path, methods in paths.items() if "get" in methods} == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_head_of_a_route_has_the_status_and_headers_of_get(guarded: Guarded, route: str) -> None:
    """200 both times, with the same content type, caching and security headers, and no body after HEAD."""
    path = guarded.path(route)
    asked = get(guarded.url, path, guarded.header, method="HEAD")
    expected = begun(guarded.url, path, guarded.header)
    assert (asked.status, asked.body, expected.status) == (200, b"", 200)
    assert fields(asked) == fields(expected)
    length = asked.header("content-length")
    assert (
        length in (None, expected.header("content-length")) or route == "/info"
    )  # it has the present cost of the sidecar


@pytest.mark.parametrize("route", ROUTES)
def test_head_of_a_route_on_a_kept_connection_sends_no_byte_of_a_body(guarded: Guarded, route: str) -> None:
    """After the head comes the head of the next answer."""
    path = guarded.path(route)
    with dial(guarded.url) as connection:
        for _ in range(3):
            connection.sendall(request("HEAD", guarded.url, path, end=guarded.header))
            head = head_of(connection)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert head.endswith(b"\r\n\r\n")
        connection.sendall(request("GET", guarded.url, "/healthz", end=guarded.header))
        assert json.loads(read_reply(connection).body) == {"status": "ok"}


@pytest.mark.parametrize("route", ROUTES)
def test_head_of_a_route_without_the_token_is_refused_as_get_is(guarded: Guarded, route: str) -> None:
    """401 where GET needs the token."""
    path = guarded.path(route)
    asked, expected = get(guarded.url, path, method="HEAD"), get(guarded.url, path)
    assert (asked.status, asked.body) == (expected.status, b"")
    assert asked.status == (200 if route in OPEN_PATHS else 401)


@pytest.mark.parametrize("route", ROUTES)
def test_head_of_a_route_succeeds_with_curl_and_wget(guarded: Guarded, route: str) -> None:
    """`curl -I` and `wget --spider` exit with 0."""
    curl, wget = program("curl", package="curl"), program("wget", package="wget")
    where = guarded.url + guarded.path(route)
    for command in (
        [curl, "-sS", "--fail", "--noproxy", "*", "-I", "-H", guarded.header, where],
        [wget, "-q", "--no-proxy", "--spider", "--tries=1", "--header", guarded.header, where],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/metrics?window_ms=10", "text/plain"),
        ("/metrics?window_ms=10", "text/plain;version=1.0.0"),
        ("/metrics?window_ms=10", "application/openmetrics-text;version=1.0.0"),
        ("/metrics?window_ms=10", "text/html, */*;q=0.1"),
        ("/metrics?window_ms=10", "image/png"),
        ("/history", "text/csv"),
        ("/history", "application/json, text/csv"),
    ],
)
def test_head_with_accept_has_the_content_type_of_get(recording: Serving, path: str, accept: str) -> None:
    """The form is chosen for HEAD as for GET, and refused alike."""
    asked, expected = (get(recording.url, path, f"Accept: {accept}", method=method) for method in ("HEAD", "GET"))
    assert (asked.status, asked.body) == (expected.status, b"")
    assert fields(asked) == fields(expected)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/?x=1", 200),
        ("/docs?x=1", 422),
        ("/openapi.json?x=1", 422),
        ("/healthz?x=1", 422),
        ("/info?x=1", 422),
        ("/metrics?window_ms=5", 422),
        ("/metrics?windw_ms=50", 422),
        ("/stream?interval_ms=1", 422),
        ("/history?seconds=0", 422),
        ("/history?pid=1", 409),
        ("/marks?x=1", 422),
        ("/processes?x=1", 422),
        ("/runs?x=1", 422),
        ("/runs/x/history", 404),
        ("/runs/..%2fx/history", 404),
        ("/runs/x/history?seconds=0", 422),
        ("/report.zip?window_ms=5", 422),
        ("/report.zip?run=x", 404),
        ("/hello?nonce=0123456789abcdef", 404),
        ("/nothing", 404),
        ("/runs/x/reported", 405),
        ("/?" + "a" * 2050, 414),
    ],
)
def test_head_of_a_bad_request_is_refused_as_get_is(recording: Serving, path: str, status: int) -> None:
    """Wrong parameters, unknown runs and routes have the status and headers of GET."""
    asked, expected = (get(recording.url, path, method=method) for method in ("HEAD", "GET"))
    assert (asked.status, expected.status, asked.body) == (status, status, b"")
    if status != 200:
        assert fields(asked, without=frozenset()) == fields(expected, without=frozenset())


def test_head_of_hello_without_a_nonce_is_refused(guarded: Guarded) -> None:
    """422, as for GET; a refusal of another method lists HEAD."""
    assert get(guarded.url, "/hello", method="HEAD").status == 422
    assert get(guarded.url, "/hello", method="POST").header("allow") == "GET, HEAD"


def test_head_of_the_history_without_a_record_is_refused(idle: Serving) -> None:
    """409, as for GET."""
    assert get(idle.url, "/history", method="HEAD").status == get(idle.url, "/history").status == 409


def test_head_of_a_window_takes_no_snapshot(idle: Serving) -> None:
    """Windows of a minute are answered at once, and no snapshot is taken for any route."""
    before = idle.get("/info")["self"]["snapshots"]
    for path in (
        "/metrics?window_ms=60000",
        "/metrics?window_ms=60000&detail=full&mode=trailing",
        "/stream?interval_ms=60000",
        "/report.zip?window_ms=60000",
        "/info",
        "/processes",
        "/healthz",
    ):
        assert get(idle.url, path, method="HEAD").status == 200, path
    assert get(idle.url, "/metrics", "Accept: text/plain", method="HEAD").status == 200
    assert idle.get("/info")["self"]["snapshots"] == before


def test_head_with_a_pid_takes_no_target_slot(idle: Serving) -> None:
    """Of 100 processes, most of which do not exist, none takes one of the 32 slots."""
    for pid in range(1, 101):
        assert get(idle.url, f"/metrics?pid={pid}", method="HEAD").status == 200
        assert get(idle.url, f"/stream?pid={pid}", method="HEAD").status == 200
    assert idle.client.get("/metrics", params={"pid": os.getpid(), "window_ms": 10}).status_code == 200


def test_head_of_the_stream_takes_no_stream_slot(idle: Serving) -> None:
    """After 20 of them all 8 places are free; with all 8 taken HEAD is refused as GET is."""
    for _ in range(20):
        assert get(idle.url, "/stream", method="HEAD").status == 200
    with ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(dial(idle.url))
            connection.sendall(f"GET /stream HTTP/1.1\r\nHost: {idle.url[7:]}\r\n\r\n".encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        reply = get(idle.url, "/stream", method="HEAD")
        assert (reply.status, reply.header("retry-after")) == (429, "1")


def test_head_of_a_report_leaves_the_crash_unreported(guarded: Guarded) -> None:
    """The run that was killed counts as not reported after it."""
    assert get(guarded.url, "/report.zip", guarded.header, method="HEAD").status == 200
    crashed = guarded.get("/runs")[0]
    assert (crashed["state"], crashed["reported"]) == ("crashed", False)


def test_head_of_a_run_does_not_read_its_file(tmp_path: Path) -> None:
    """A file that GET cannot read is there for HEAD, which knows its name alone."""
    with Serving(tmp_path, "--record-interval", "0") as running:
        runs = RunDirectory(tmp_path / "runs")
        runs.path.mkdir(mode=0o700, exist_ok=True)
        (runs.path / "1-2-boot-3.sqlite").write_bytes(b"no database")
        assert get(running.url, "/runs/1-2-boot-3/history").status == 503
        assert get(running.url, "/runs/1-2-boot-3/history", method="HEAD").status == 200
        assert get(running.url, "/runs/other/history", method="HEAD").status == 404


def test_head_of_a_replay_is_refused_as_get_is(tmp_path: Path, recording: Serving) -> None:
    """A report can be downloaded again and a history cannot; the runs are those of the file."""
    report = tmp_path / "report.zip"
    report.write_bytes(recording.client.get("/report.zip", params={"window_ms": 20}).content)
    history = tmp_path / "runtime-history.json"
    history.write_bytes(recording.client.get("/history").content)
    for file, status in ((report, 200), (history, 409)):
        with Serving(tmp_path, str(file), command="replay") as replay:
            run_id = replay.get("/info")["replay"]["run"]["id"]
            for path, expected in (("/report.zip", status), (f"/runs/{run_id}/history", 200), ("/runs/x/history", 404)):
                assert get(replay.url, path).status == expected, path
                assert get(replay.url, path, method="HEAD").status == expected, path


def test_method_refusal_lists_head_with_get(recording: Serving) -> None:
    """A route without GET does not list HEAD either."""
    for path in recording.get("/openapi.json")["paths"]:
        if path != "/hello":
            allowed = get(recording.url, path.replace("{run_id}", "x"), method="BREW").header("allow") or ""
            assert ("GET" in allowed.split(", ")) == ("HEAD" in allowed.split(", ")), path


def test_schema_states_that_head_is_answered(recording: Serving) -> None:
    """One sentence for all routes, which the reference shows as well."""
    schema = recording.get("/openapi.json")
    assert "answers HEAD" in schema["info"]["description"]
    assert "answers HEAD" in recording.client.get("/docs").text
    assert not [path for path, methods in schema["paths"].items() if "head" in methods]


@pytest.mark.parametrize("end", [b"zz\r\n", b"1\r\nx\r\nzz\r\n"], ids=["at once", "after a chunk"])
def test_head_with_a_cut_body_is_refused_without_a_body(end: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """400 without a body: a byte after the head of such an answer is an error of the server, and would be logged."""

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body", False):
            pass

    with Edge(patient) as running, dial(running.url) as connection:
        lines = ["HEAD / HTTP/1.1", f"Host: {running.url[7:]}", "Transfer-Encoding: chunked", "", ""]
        connection.sendall("\r\n".join(lines).encode() + end)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.endswith(b"\r\n\r\n")
    assert not caplog.records


def test_refusal_after_an_answer_to_head_has_a_body() -> None:
    """Bytes that are no HTTP request do not count as another HEAD."""
    with Edge(whole_app()) as running, dial(running.url) as connection:
        connection.sendall(f"HEAD /healthz HTTP/1.1\r\nHost: {running.url[7:]}\r\n\r\n".encode())
        assert read_reply(connection, "HEAD").status == 200
        connection.sendall(b"GET\r\n\r\n")
        reply = read_reply(connection)
        assert (reply.status, json.loads(reply.body)["reason"]) == (400, "bad_request")
