"""Limits of connections and of unsent answers: `vitalsd.http.server.connection_limits`, alone and with real sockets."""

import json
import logging
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from support.edge import Edge, Reply, dial, get, read_reply
from support.sidecars import eventually
from vitalsd.contract.limits import ANSWER_BYTES, SEND_BUDGET_BYTES, WRITE_S
from vitalsd.http.server.connection_limits import ConnectionLimiter, SendBudget

pytestmark = pytest.mark.live

MIB = 1 << 20


# The count


def test_budget_refuses_what_does_not_fit_and_counts_shared_bytes_once() -> None:
    """Fifty clients of one answer count as one, and the bytes are counted until the last has released them."""
    budget, shared, other = SendBudget(100), bytes(bytearray(60)), bytes(bytearray(50))
    assert all(budget.acquire(shared) for _ in range(50))
    assert budget.size == 60
    assert not budget.acquire(other)
    assert budget.acquire(bytes(bytearray(40)))
    assert budget.size == 100
    for _ in range(49):
        budget.release(shared)
    assert not budget.acquire(other)
    budget.release(shared)
    assert budget.acquire(other)
    assert budget.size == 90


def test_budget_admits_a_single_answer_of_any_size() -> None:
    """One that is larger than the budget is sent when nothing else is."""
    budget, huge, small = SendBudget(100), bytes(bytearray(1000)), b"x"
    assert budget.acquire(huge)
    assert not budget.acquire(small)
    budget.release(huge)
    assert budget.acquire(small)


def test_budget_gives_time_by_size() -> None:
    """The largest answer there is has a quarter of an hour at the most."""
    budget = SendBudget(SEND_BUDGET_BYTES)
    assert budget.seconds(b"") == WRITE_S
    assert WRITE_S < budget.seconds(bytes(ANSWER_BYTES)) < 900


@pytest.mark.parametrize("seed", range(20))
def test_budget_leaves_nothing_counted(seed: int) -> None:
    """For any sequence of acquire and release, the size is at most the limit, and 0 in the end."""
    dice, budget = random.Random(seed), SendBudget(100)
    shared = [bytes(bytearray(dice.randrange(1, 60))) for _ in range(5)]
    held: list[bytes] = []
    for _ in range(500):
        body = dice.choice(shared) if dice.random() < 0.5 else bytes(bytearray(dice.randrange(1, 60)))
        if budget.acquire(body):
            held.append(body)
        if held and dice.random() < 0.5:
            budget.release(held.pop(dice.randrange(len(held))))
        assert budget.size == sum(map(len, {id(body): body for body in held}.values())) <= 100
    for body in held:
        budget.release(body)
    assert (budget.size, budget._clients) == (0, {})


# Behind real sockets


def budgets(edge: Edge) -> tuple[SendBudget, SendBudget]:
    """Return the send budgets of TCP and of the Unix socket."""
    server = edge._sidecar._server
    assert server is not None
    limiters: dict[str, ConnectionLimiter] = cast("Any", server.config.http).keywords["limiters"]
    return limiters["tcp"].send_budget, limiters["unix"].send_budget


@dataclass
class Answers:
    """An application of large answers, each its own or one for all."""

    asked: int = 0
    sent: int = 0
    """Answers after which was done what is to be done after them."""

    def app(self) -> Starlette:
        shared = bytes(bytearray(8 * MIB))

        async def own(request: Request) -> Response:
            self.asked += 1
            size = int(request.query_params["mib"]) * MIB
            return Response(bytes(bytearray(size)), background=BackgroundTask(self.done))

        async def same(request: Request) -> Response:
            return Response(shared)

        async def small(request: Request) -> Response:
            self.asked += 1
            return Response(b"x")

        async def buggy(request: Request) -> Response:
            return Fails(bytes(bytearray(8 * MIB)))

        async def stream(request: Request) -> Response:
            async def events() -> Any:
                yield bytes(bytearray(8 * MIB))
                yield b"end"

            return StreamingResponse(events())

        routes = {"/own": own, "/same": same, "/small": small, "/buggy": buggy, "/stream": stream}
        return Starlette(routes=[Route(path, call, methods=["GET", "HEAD"]) for path, call in routes.items()])

    def done(self) -> None:
        self.sent += 1


class Fails(Response):
    """Announces its length and breaks off in the middle."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})
        raise ZeroDivisionError("a bug")


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def edge(answers: Answers, short_path: Path) -> Iterator[Edge]:
    with Edge(answers.app(), directory=short_path) as running:
        yield running


def ask(where: str, path: str, *, method: str = "GET") -> socket.socket:
    """Send a request, and return the connection before the answer is read."""
    connection = dial(where)
    host = where.removeprefix("http://") if where.startswith("http://") else "localhost"
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return connection


def test_clients_that_take_nothing_are_cut_and_others_are_served(edge: Edge, answers: Answers) -> None:
    """While 30 clients take none of 8 MiB each, small answers are sent, and large ones once the first are cut."""
    tcp, unix = budgets(edge)

    def asked(count: int) -> bool:
        return answers.asked >= count

    def answered() -> Reply | None:
        assert tcp.size <= SEND_BUDGET_BYTES
        reply = get(edge.url, "/own?mib=8")
        return reply if reply.status == 200 else None

    with ExitStack() as stack:
        for number in range(30):
            stack.enter_context(ask(edge.url, "/own?mib=8"))
            eventually(partial(asked, number + 1))
            assert tcp.size <= SEND_BUDGET_BYTES
        assert get(edge.url, "/own?mib=8").status == 503
        assert get(edge.url, "/small").status == 200
        assert len(get(edge.socket, "/own?mib=8").body) == 8 * MIB
        begun = time.monotonic()
        assert len(eventually(answered, 2 * WRITE_S).body) == 8 * MIB
        assert time.monotonic() - begun <= WRITE_S + 2
    eventually(lambda: (tcp.size, unix.size) == (0, 0))


def test_client_that_takes_a_large_answer_too_slowly_is_cut(edge: Edge, answers: Answers) -> None:
    """It takes more than 64 KiB in 10 s, and less than the rate at which it would have all of it in time."""
    tcp, _ = budgets(edge)
    tcp.bytes_per_s = 100 * MIB
    with ask(edge.url, "/own?mib=32") as slow:
        eventually(lambda: tcp.size == 32 * MIB)
        begun, took = time.monotonic(), 0
        with suppress(ConnectionResetError):
            while data := slow.recv(64 * 1024):
                took += len(data)
                time.sleep(0.1)
    assert WRITE_S - 1 < time.monotonic() - begun < 2 * WRITE_S
    assert took < 32 * MIB
    eventually(lambda: tcp.size == 0)
    assert answers.sent == 0


def test_refused_large_answer_is_a_complete_503_with_retry_after(edge: Edge, answers: Answers) -> None:
    """503 in place of an answer that was begun by the application already; what follows it is not done."""
    tcp, _ = budgets(edge)

    def refused() -> Any:
        with ExitStack() as stack:
            for _ in range(SEND_BUDGET_BYTES // (8 * MIB)):
                stack.enter_context(ask(edge.url, "/own?mib=8"))
            eventually(lambda: tcp.size == SEND_BUDGET_BYTES)
            reply = get(edge.url, "/own?mib=8")
        eventually(lambda: tcp.size == 0)
        return reply if reply.status == 503 else None

    reply = eventually(refused, 30)
    assert json.loads(reply.body)["reason"] == "unread"
    assert reply.header("retry-after") == "1"
    assert reply.header("content-type") == "application/problem+json"
    assert reply.header("x-content-type-options") == "nosniff"
    assert answers.sent == 0
    assert get(edge.url, "/own?mib=8").status == 200
    eventually(lambda: answers.sent == 1)


def test_shared_answer_reaches_all_its_readers(edge: Edge) -> None:
    """Twenty clients of one body of 8 MiB count as one, also slow ones."""
    tcp, _ = budgets(edge)
    with ExitStack() as stack:
        clients = [stack.enter_context(ask(edge.url, "/same")) for _ in range(20)]
        eventually(lambda: 20 in tcp._clients.values())
        assert tcp.size == 8 * MIB
        assert {len(read_reply(client).body) for client in clients} == {8 * MIB}
    eventually(lambda: tcp.size == 0)


def test_send_budget_of_tcp_takes_nothing_from_the_unix_socket(edge: Edge) -> None:
    """Each kind of listener has a budget of its own."""
    tcp, unix = budgets(edge)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(ask(edge.url, "/own?mib=8"))
        eventually(lambda: tcp.size == SEND_BUDGET_BYTES)
        with ask(edge.socket, "/own?mib=8") as client:
            eventually(lambda: unix.size == 8 * MIB)
            assert len(read_reply(client).body) == 8 * MIB
    eventually(lambda: unix.size == tcp.size == 0)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def leave_with(*content: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(b"".join(content))


MORE = b"GET /own?mib=8 HTTP/1.1\r\nHost: x\r\n\r\n"
WAYS: dict[str, tuple[str, str, Callable[[socket.socket], object]]] = {
    "read": ("GET", "/own?mib=8", read_reply),
    "HEAD": ("HEAD", "/own?mib=8", lambda connection: read_reply(connection, "HEAD")),
    "closed": ("GET", "/own?mib=8", socket.socket.close),
    "reset": ("GET", "/own?mib=8", reset),
    "a bug in the middle": ("GET", "/buggy", read_reply),
    "garbage in the middle": ("GET", "/own?mib=8", leave_with(b"\0\r\n\r\n")),
    "pipelined": ("GET", "/own?mib=8", leave_with(MORE * 10)),
    "shared": ("GET", "/same", reset),
    "a stream": ("GET", "/stream", read_reply),
}


@pytest.mark.parametrize("way", WAYS)
def test_send_budget_is_released_however_the_client_disconnects(edge: Edge, way: str) -> None:
    """Whole, cut, broken off, at once or in the middle: the bytes are off the account."""
    tcp, _ = budgets(edge)
    method, path, leave = WAYS[way]
    for seen in (False, True):
        with ask(edge.url, path, method=method) as connection, suppress(OSError, IncompleteRead):
            if seen and (method, path) == ("GET", "/own?mib=8"):
                eventually(lambda: tcp.size == 8 * MIB)
            leave(connection)
        eventually(lambda: (tcp.size, tcp._clients) == (0, {}))


def test_background_task_of_an_undelivered_answer_does_not_run(edge: Edge, answers: Answers) -> None:
    """It does not run if the client left or was disconnected, and no line is logged."""
    tcp, _ = budgets(edge)
    for leave in (reset, socket.socket.close):
        leaving = ask(edge.url, "/own?mib=8")
        eventually(lambda: tcp.size > 0)
        leave(leaving)
        eventually(lambda: tcp.size == 0)
    assert len(get(edge.url, "/own?mib=8").body) == 8 * MIB
    eventually(lambda: answers.sent == 1)


def test_shutdown_with_unread_answers_disconnects_their_readers(
    answers: Answers, caplog: pytest.LogCaptureFixture, short_path: Path
) -> None:
    """The shutdown soon disconnects clients that do not read, without a log line."""
    with ExitStack() as stack:
        with Edge(answers.app(), directory=short_path) as running:
            tcp, _ = budgets(running)
            for _ in range(3):
                stack.enter_context(ask(running.url, "/own?mib=8"))
            eventually(lambda: tcp.size == 24 * MIB)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5
        assert (tcp.size, tcp._clients) == (0, {})
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_pipelined_requests_are_handled_one_at_a_time(edge: Edge, answers: Answers) -> None:
    """Until the one before has been taken, the application is not asked for the next."""
    with dial(edge.url) as connection:
        request = f"GET /own?mib=8 HTTP/1.1\r\nHost: {edge.url[7:]}\r\n\r\n".encode()
        connection.sendall(request * 3)
        tcp, _ = budgets(edge)
        eventually(lambda: tcp.size == 8 * MIB)
        assert answers.asked == 1
        for number in range(3):
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                answer += connection.recv(1)
            left = 8 * MIB
            while left:
                left -= len(connection.recv(min(left, MIB)))
            assert answers.asked <= number + 2
    eventually(lambda: tcp.size == 0)
