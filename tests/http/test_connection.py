"""One client connection: `vitalsd.http.server.connection`, over real sockets; and what it leans on inside uvicorn."""

import gc
import inspect
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import h11
import httpx
import psutil
import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from support.edge import Edge, dial, exchange, get, read_reply, whole_app
from support.serving import Serving
from support.sidecars import eventually, serving
from vitalsd.contract.limits import CONNECTIONS, REQUEST_S, WRITE_S
from vitalsd.http.server.connection import ServerConnection
from vitalsd.http.server.connection_limits import ConnectionLimiter
from vitalsd.http.server.log_throttle import ThrottledLogger
from vitalsd.sidecar.listeners import Listeners, adopt
from vitalsd.sidecar.tcp_listener import bind_tcp

pytestmark = pytest.mark.live

LIMITED = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({0}, {0})); import vitalsd.cli as c; c.main()"


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    directory = tmp_path_factory.mktemp("run")
    directory.chmod(0o700)
    with Edge(whole_app(), directory=directory) as running:
        yield running


def head(where: str, path: str = "/healthz", *lines: str, method: str = "GET") -> bytes:
    """A request with the right Host, to be kept open."""
    host = where.removeprefix("http://") if where.startswith("http://") else "localhost"
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


# Deadlines


def test_stream_ends_after_its_time_limit_and_frees_its_slot(short_path: Path) -> None:
    """Here of half a second: the answer ends as a whole one does, and its place is free for the next."""
    with Edge(whole_app(stream_s=0.5), directory=short_path) as running:
        for _ in range(9):
            reply = get(running.url, "/stream?interval_ms=100")
            assert reply.status == 200
            assert 1 <= reply.body.count(b"data: ") <= 7


def test_stalled_connections_are_closed_and_served_ones_are_not(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    """
    Half a head, a byte at a time, half a body: 408 after 5 s; silent ones are closed without a word. Not reading: 10 s.

    All the while a window of 8 s, a stream and a connection that asks again and again go on as if nothing were.
    """
    marks = head(edge.url, "/marks", "Transfer-Encoding: chunked", "Content-Type: application/json", method="POST")
    stalls = {
        "silent": (b"", 0),
        "half a line": (b"GET /metr", 408),
        "half a head": (head(edge.url)[:-2], 408),
        "a byte at a time": (b"GET /", 408),
        "half a body": (marks.replace(b"Transfer-Encoding: chunked", b"Content-Length: 20") + b'{"label"', 408),
        "half a chunk": (marks + b"a\r\n{", 408),
        "a body that no route reads": (head(edge.url, "/nothing", "Content-Length: 4000") + b"x", 404),
        "half a second request": (head(edge.url) + b"GET /", 200),
    }
    with ExitStack() as stack:
        narrow = stack.enter_context(Edge(sixty_kilobytes, adopted=narrow_listener))
        begun = time.monotonic()
        stalled = {name: stack.enter_context(dial(edge.url)) for name in stalls}
        for name, (content, _) in stalls.items():
            stalled[name].sendall(content)
        window, stream, kept, deaf = (stack.enter_context(dial(edge.url)) for _ in range(4))
        leaving = stack.enter_context(socket.socket())
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        leaving.connect(("127.0.0.1", int(narrow.url.rpartition(":")[2])))
        window.sendall(head(edge.url, "/metrics?window_ms=8000"))
        stream.sendall(head(edge.url, "/stream?interval_ms=100"))
        deaf.sendall(head(edge.url, "/openapi.json") * 1000)
        leaving.sendall(head(narrow.url, "/", "Connection: close"))

        said, ended = dict.fromkeys(stalled, b""), dict.fromkeys(stalled, 0.0)
        streamed = answered = 0
        while not all(ended.values()):
            assert time.monotonic() - begun < 30, ended
            for name, connection in stalled.items():
                if not ended[name]:
                    part = received(connection)
                    said[name] += part or b""
                    ended[name] = 0 if part is not None else time.monotonic() - begun
            if not ended["a byte at a time"]:
                with suppress(OSError):
                    stalled["a byte at a time"].send(b"x")
            kept.sendall(head(edge.url))
            answered += read_reply(kept).status == 200
            streamed += len(stream.recv(65536)) > 0
        # A busy machine is late; it is never early.
        assert all(REQUEST_S - 0.1 <= seconds < 3 * REQUEST_S for seconds in ended.values()), ended
        assert {name: int(content[9:12] or b"0") for name, content in said.items()} == {
            name: status for name, (_, status) in stalls.items()
        }
        assert b'"reason": "too_slow"' in said["half a head"]
        assert said["half a second request"].count(b"HTTP/1.1 ") == 2
        assert answered >= 10
        assert read_reply(window).status == 200
        while time.monotonic() - begun < 3 * WRITE_S and (is_open(deaf) or is_open(leaving)):
            streamed += len(stream.recv(65536)) > 0
        assert not is_open(deaf)
        assert not is_open(leaving)
        assert time.monotonic() - begun > WRITE_S - 0.1
        assert streamed > 20
    assert not caplog.records


def received(connection: socket.socket) -> bytes | None:
    """Return the bytes that have arrived, if any; ``None`` if the other end has closed the connection."""
    if not select.select([connection], [], [], 0)[0]:
        return b""
    try:
        return connection.recv(65536) or None
    except ConnectionResetError:
        return None


def is_open(connection: socket.socket) -> bool:
    """Return whether the server, in this process, still has its end; the client notices only if it reads."""
    name = connection.getsockname()
    return any(each.raddr == name for each in psutil.Process().net_connections("tcp"))


def narrow_listener() -> Listeners:
    """Return listeners with connections of which the kernel buffers almost nothing."""
    listener = bind_tcp("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    return adopt([listener], guarded=False, allow_remote=False)


async def sixty_kilobytes(scope: Scope, receive: Receive, send: Send) -> None:
    """Send less than fills the buffer of asyncio, before the server can see that the client does not read."""
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 60_000})


def test_pipelined_requests_are_answered_in_order(edge: Edge) -> None:
    """Requests that wait behind a window are not late: their client does not cause the delay."""
    with dial(edge.url) as connection:
        connection.sendall(head(edge.url, "/metrics?window_ms=200") + head(edge.url) + head(edge.url, "/nothing"))
        assert [read_reply_exactly(connection) for _ in range(3)] == [200, 200, 404]


def read_reply_exactly(connection: socket.socket) -> int:
    """The status of one answer, not a byte further."""
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    length = next(int(line[15:]) for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while length:
        length -= len(connection.recv(length))
    return int(answer[9:12])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_request_body_in_pieces_arrives_whole(edge: Edge, size: int) -> None:
    """Chunked or of a known length, in however many pieces, a body arrives."""
    body = json.dumps({"label": "x" * 100}).encode()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    answer = httpx.post(
        f"{edge.url}/marks", content=iter(pieces), headers={"Content-Type": "application/json"}, trust_env=False
    )
    assert answer.status_code == 409  # nothing is recorded here, so it was read


# Limits


def test_connection_limit_is_a_quarter_of_the_descriptors_up_to_1024() -> None:
    """There is room for so many connections as fit, and for a thousand at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert ConnectionLimiter.fitting().limit == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ConnectionLimiter.fitting().limit <= CONNECTIONS


def test_five_hundred_stalled_sockets_delay_no_other_client(short_path: Path) -> None:
    """Beside 500 stalled clients of 64 connections, others are served in far less than 6 s, on both sockets."""
    arguments = ("--record-interval", "0", "--uds", str(short_path / "a.sock"))
    with ExitStack() as stack:
        server = stack.enter_context(
            Serving(short_path, *arguments, python=(sys.executable, "-c", LIMITED.format(256)))
        )
        for i in range(500):
            stalled = stack.enter_context(dial(server.url))
            if i % 2:
                stalled.sendall(b"GET /metr")
        for where in (server.url, str(short_path / "a.sock")):
            for path in ("/healthz", "/metrics?window_ms=100"):
                begun = time.monotonic()
                assert get(where, path).status == 200
                waited = time.monotonic() - begun
                print(f"{where[:4]} {path}: {waited * 1000:.0f} ms")
                assert waited < 6
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 150
        assert server.stop() == 0


def test_connections_at_the_limit_all_served_get_503_over_tcp_only(short_path: Path) -> None:
    """If each connection over TCP waits for a window, the next one gets 503; the Unix socket is not affected."""
    arguments = ("--record-interval", "0", "--uds", str(short_path / "a.sock"))
    with ExitStack() as stack:
        server = stack.enter_context(Serving(short_path, *arguments, python=(sys.executable, "-c", LIMITED.format(64))))
        served = [stack.enter_context(dial(server.url)) for _ in range(16)]
        for connection in served:
            connection.sendall(head(server.url, "/metrics?window_ms=2000"))
        refused = eventually(lambda: next((r for r in [get(server.url)] if r.status != 200), None))
        assert refused.status == 503
        assert json.loads(refused.body)["reason"] == "full"
        assert refused.header("retry-after") == "1"
        assert refused.header("x-content-type-options") == "nosniff"
        assert get(str(short_path / "a.sock")).status == 200
        assert [read_reply(connection).status for connection in served] == [200] * 16
        assert eventually(lambda: get(server.url).status == 200)


def test_connections_with_a_complete_request_are_never_evicted(tmp_path: Path) -> None:
    """With more clients than connections, each gets its answer or 503, and none is disconnected."""
    with ExitStack() as stack:
        server = stack.enter_context(Serving(tmp_path, python=(sys.executable, "-c", LIMITED.format(64))))
        server.process.send_signal(signal.SIGSTOP)
        callers = [stack.enter_context(dial(server.url)) for _ in range(60)]
        for caller in callers:
            caller.sendall(head(server.url, "/metrics?window_ms=500"))
        server.process.send_signal(signal.SIGCONT)
        statuses = Counter(read_reply(caller).status for caller in callers)
        assert set(statuses) <= {200, 503}, statuses
        assert statuses[200] >= 16


def test_connection_slot_is_released_however_the_connection_ends(edge: Edge) -> None:
    """Closed, reset, refused, timed out: nothing of a connection is kept."""
    rooms = [each for each in live(ConnectionLimiter) if each.limit == ConnectionLimiter.fitting().limit]
    assert rooms
    for _ in range(20):
        dial(edge.url).close()
        reset = dial(edge.url)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        reset.sendall(b"GET / HT")
        reset.close()
        get(edge.url, host="evil.test")
        exchange(edge.url, b"\0\r\n\r\n")
        get(edge.socket)
    eventually(lambda: all(len(room) == 0 for room in rooms))


def live(kind: type[ConnectionLimiter]) -> list[ConnectionLimiter]:
    import gc

    return [each for each in gc.get_objects() if isinstance(each, kind)]


# The user at the other end of the Unix socket; tests/system/test_strangers.py has other users


def test_unix_socket_accepts_its_own_user(edge: Edge) -> None:
    """The check lets its own user pass."""
    assert get(edge.socket, "/info").status == 200


# The log


def test_garbage_resets_and_refusals_are_not_logged(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    """Garbage, upgrades, resets and refusals write no line: a client could send any number of them."""
    caplog.set_level(logging.INFO)
    for _ in range(50):
        exchange(edge.url, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        get(edge.url, "/healthz", "Upgrade: websocket", "Connection: upgrade")
        get(edge.url, "/healthz", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings")
        exchange(edge.url, head(edge.url, "/marks", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n")
        with dial(edge.url) as leaving:
            leaving.sendall(head(edge.url, "/marks", "Content-Length: 20", method="POST") + b"{")
    eventually(lambda: get(edge.url).status == 200)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_log_of_repeated_internal_errors_is_throttled_to_one_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """A traceback for the first one; the requests all get their 500."""

    async def buggy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raise ZeroDivisionError("a bug")
        await lifespan(receive, send)

    with Edge(buggy) as running:
        assert {get(running.url).status for _ in range(30)} == {500}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert caplog.records[0].name == "vitalsd.http"
    assert "ZeroDivisionError: a bug" in caplog.text


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def test_log_of_repeated_lines_is_throttled_to_one_a_second_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    """A flood becomes a line a second that tells how many there were; another kind is not held back by it."""
    now = [0.0]
    log = ThrottledLogger(logging.getLogger("vitalsd.test"), clock=lambda: now[0])
    for step in range(2500):
        now[0] = step / 1000
        log.error("it %s", "rains")
        log.warning("whatever")
        if step == 1500:
            log.error("it snows")
    assert [record.getMessage() for record in caplog.records] == [
        "it rains",
        "it rains (999 more since it was last said)",
        "it snows",
        "it rains (999 more since it was last said)",
    ]
    for kind in range(1000):
        log.error(f"kind {kind}")
    assert len(log._kinds) <= 64


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit(2) is of Linux")
def test_accept_without_descriptors_waits_and_logs_once_a_second(short_path: Path) -> None:
    """Without a free descriptor new connections wait, the log stays short, and they are served afterwards."""
    with serving(short_path, "--record-interval", "0") as (process, ready):
        assert get(ready["url"]).status == 200
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit_descriptors(process.pid, 3, hard)
        with ExitStack() as stack:
            waiting = [stack.enter_context(dial(ready["url"])) for _ in range(200)]
            for connection in waiting:
                connection.sendall(head(ready["url"], "/healthz", "Connection: close"))
            assert not select.select(waiting, [], [], 2.5)[0]
            limit_descriptors(process.pid, soft, hard)
            begun = time.monotonic()
            assert {read_reply(connection).status for connection in waiting} == {200}
            assert time.monotonic() - begun < 10
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
    assert 1 <= sum("out of file descriptors" in line for line in said) < 10
    assert len(said) < 15


def limit_descriptors(pid: int, soft: int, hard: int) -> None:
    if sys.platform == "linux":
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


# What is leaned on inside uvicorn: each breaks here first, and says what it is for


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("connection_made", ["transport"]),
        ("data_received", ["data"]),
        ("pause_writing", []),
        ("resume_writing", []),
        ("connection_lost", ["exc"]),
        ("on_response_complete", []),
        ("send_400_response", ["msg"]),
        ("shutdown", []),
        ("_unsupported_upgrade_warning", []),
    ],
)
def test_overridden_uvicorn_methods_exist(method: str, parameters: list[str]) -> None:
    """An override of a method that uvicorn has renamed would never be called."""
    assert list(inspect.signature(getattr(H11Protocol, method)).parameters) == ["self", *parameters]
    assert method in vars(ServerConnection)


def test_used_attributes_of_uvicorn_and_h11_exist() -> None:
    """Attributes of a connection and of a request under way, and the h11 states they go by."""
    source = inspect.getsource(H11Protocol) + inspect.getsource(RequestResponseCycle)
    for used in (
        "self.conn = h11.Connection(",
        "self.access_log = ",
        "self.logger = ",
        "self.app = config.loaded_app",
        "app = self.app\n",
        "self.cycle = RequestResponseCycle(",
        "if self.flow.write_paused and not self.disconnected:\n            await self.flow.drain()",
        "logger=self.logger",
        "access_log=self.access_log",
        "on_response=self.on_response_complete",
        "self.disconnected = False",
        "self.response_complete = False",
        "self.message_event = message_event",
    ):
        assert used in source, used
    conn = h11.Connection(h11.SERVER)
    assert (conn.their_state, conn.our_state, conn.trailing_data) == (h11.IDLE, h11.IDLE, (b"", False))


def test_uvicorn_calls_the_400_handler_during_the_h11_error(edge: Edge) -> None:
    """So the answer can state what is wrong, and distinguish 431 from 400."""
    replies = {
        content: exchange(edge.url, content)
        for content in (
            b"GET\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"x" * 20_000,
        )
    }
    assert [reply.status for reply in replies.values()] == [400, 400, 400, 431]
    details = [json.loads(reply.body)["detail"] for reply in replies.values()]
    assert "illegal request line" in details[0]
    assert "bad Content-Length" in details[1]
    assert "Transfer-Encoding" in details[2]


def test_request_cut_in_its_body_is_a_disconnect_for_the_application(caplog: pytest.LogCaptureFixture) -> None:
    """It hears of a disconnect and what it then sends goes nowhere, without a traceback."""
    heard: list[str] = []

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        more = True
        while more:
            message = await receive()
            heard.append(message["type"])
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    with Edge(patient) as running:
        reply = exchange(running.url, head(running.url, "/", "Transfer-Encoding: chunked") + b"1\r\nx\r\nzz\r\n")
        assert reply.status == 400
        eventually(lambda: heard[-1:] == ["http.disconnect"])
    assert not caplog.records


def test_garbage_after_an_answer_began_closes_the_connection_silently(caplog: pytest.LogCaptureFixture) -> None:
    """No second answer is tried where none can be sent; that of uvicorn would raise in the event loop."""

    async def eager(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await receive()
        await receive()

    with Edge(eager) as running, dial(running.url) as connection:
        connection.sendall(head(running.url, "/", "Transfer-Encoding: chunked"))
        received = connection.recv(65536)
        connection.sendall(b"zz\r\n")
        while part := connection.recv(65536):
            received += part
        assert received.count(b"HTTP/1.1") == 1
    assert not caplog.records


def test_shutdown_while_a_400_is_being_written_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    """A connection with a 400 that is still being written does not make the shutdown fail."""
    with ExitStack() as stack, Edge(whole_app()) as running:
        for _ in range(20):
            broken = stack.enter_context(dial(running.url))
            broken.sendall(b"\0\r\n\r\n")
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_connections_accepted_during_shutdown_are_closed() -> None:
    """Asyncio takes some turns of its loop to make one of what it accepted; the host program keeps none of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for _ in range(30):
            with ExitStack() as stack, Edge(whole_app()) as running:
                for _ in range(100):
                    stack.enter_context(dial(running.url)).sendall(b"\0\r\n\r\n")
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_access_log_of_uvicorn_is_never_written(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    """It is not written even if the host program has configured it for its own server."""
    caplog.set_level(logging.INFO, "uvicorn.access")
    assert get(edge.url).status == 200
    assert not [record for record in caplog.records if record.name == "uvicorn.access"]


# A crowd


def test_window_of_a_thousand_callers_shares_few_snapshots(tmp_path: Path) -> None:
    """All of them are answered 200, and share the snapshots of a few."""
    with ExitStack() as stack:
        server = stack.enter_context(Serving(tmp_path, "--record-interval", "0"))
        before = server.get("/info")["self"]["snapshots"]
        callers = [stack.enter_context(dial(server.url, 60)) for _ in range(1000)]
        for caller in callers:
            caller.sendall(head(server.url, "/metrics?window_ms=1000"))
        assert {read_reply(caller).status for caller in callers} == {200}
        snapshots = server.get("/info")["self"]["snapshots"] - before
        print(f"1000 windows: {snapshots} snapshots")
        assert snapshots <= 80


def test_windows_beyond_64_distinct_ones_are_429_with_retry_after(tmp_path: Path) -> None:
    """64 different windows are measured at once; the client of a further one gets a `Retry-After`."""
    with ExitStack() as stack:
        server = stack.enter_context(Serving(tmp_path, "--record-interval", "0"))
        callers = [stack.enter_context(dial(server.url, 60)) for _ in range(150)]
        for i, caller in enumerate(callers):
            caller.sendall(head(server.url, f"/metrics?window_ms={1500 + i}"))
        replies = [read_reply(caller) for caller in callers]
        assert {reply.status for reply in replies} == {200, 429}
        assert sum(reply.status == 200 for reply in replies) >= 64
        assert {reply.header("retry-after") for reply in replies if reply.status == 429} == {"1"}
        assert server.get("/info")["self"]["snapshots"] <= 500
