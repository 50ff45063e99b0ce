"""Limits of connections and of unsent answers: `vitalsd.http.server.connection_limits`, alone and with real sockets."""

import asyncio
import json
import logging
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
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
from vitalsd.http.server.connection_limits import OUTBOX_BYTES, SETTLED_S, TAKEN_S, Delivery, Outbox, Room

pytestmark = pytest.mark.live

MIB = 1 << 20


# The rule


@dataclass
class Wire:
    """What a client has yet to take of what it was given; and whether it was cut off."""

    unsent: int = 0
    cut: bool = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.cut = True


@dataclass
class Post:
    """An outbox of 100 bytes, and clients that take what they are said to."""

    outbox: Outbox = field(default_factory=lambda: Outbox(100))
    wires: dict[str, Wire] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)

    def enter(self, name: str, size: int | bytes, at: float) -> bool:
        self.wires[name] = wire = Wire()
        body = size if isinstance(size, bytes) else bytes(bytearray(size))
        self.deliveries[name] = Delivery(cast("asyncio.Transport", wire), body, at)
        return self.outbox.enter(self.deliveries[name])

    def hand(self, name: str, count: int, at: float, *, unsent: int = 0) -> None:
        self.deliveries[name].hand(count, at)
        self.wires[name].unsent = unsent

    @property
    def cut(self) -> set[str]:
        return {name for name, wire in self.wires.items() if wire.cut}


def test_who_reads_slowest_makes_way() -> None:
    """What a client was given and did not take does not count as read, and who has stopped reading goes first."""
    post = Post()
    assert post.enter("slow", 30, 0)
    assert post.enter("slower", 30, 0)
    assert post.enter("stopped", 40, 0)
    post.hand("stopped", 35, 1)
    for number in range(20):
        post.hand("slow", 1, number / 2)
        post.hand("slower", 1, number / 2, unsent=15)
    assert post.enter("new", 40, 10)
    assert post.cut == {"stopped"}
    assert post.outbox.size == 100
    assert post.enter("newer", 30, 10.4)
    assert post.cut == {"stopped", "slower"}
    assert post.enter("newest", 30, 10.4)
    assert post.cut == {"stopped", "slower", "slow"}


def test_nobody_makes_way_who_reads_or_has_only_just_come() -> None:
    """The newcomer is refused, and nobody is cut off in vain."""
    post = Post()
    assert post.enter("reads", 40, 0)
    assert post.enter("stalls", 20, 0)
    assert post.enter("young", 40, 5 - SETTLED_S / 2)
    post.hand("reads", 30, 4.9)
    assert not post.enter("large", 60, 5)
    assert post.cut == set()
    assert post.outbox.size == 100
    assert post.enter("fits", 20, 5)
    assert post.cut == {"stalls"}
    post.outbox.leave(post.deliveries["large"])
    assert post.outbox.size == 100


def test_what_is_shared_counts_once() -> None:
    """As long as one of its readers reads, it frees nothing to cut off the others; then all of them go."""
    post = Post()
    body = bytes(bytearray(60))
    assert all(post.enter(f"reader {number}", body, 0) for number in range(50))
    assert post.outbox.size == 60
    post.hand("reader 7", 59, 4.9)
    assert not post.enter("new", 50, 5)
    assert post.cut == set()
    assert post.enter("another", body, TAKEN_S)
    assert not post.enter("new", 50, TAKEN_S)
    assert post.enter("new", 50, TAKEN_S + SETTLED_S)
    assert post.cut == {name for name in post.wires if name != "new"}
    assert post.outbox.size == 50


def test_a_single_answer_always_fits() -> None:
    """However large it is: it is one."""
    post = Post()
    assert post.enter("huge", 1000, 0)
    assert not post.enter("small", 1, 0.5)
    post.outbox.leave(post.deliveries["huge"])
    assert post.enter("small", 1, 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_left_of_the_accounts(seed: int) -> None:
    """Whatever comes and goes, cut off or not: never more than the limit, and nothing in the end."""
    dice, post = random.Random(seed), Post()
    shared = [bytes(bytearray(dice.randrange(1, 60))) for _ in range(5)]
    for number in range(500):
        size = dice.choice(shared) if dice.random() < 0.5 else dice.randrange(1, 60)
        if post.enter(str(number), size, number / 7):
            assert not post.wires[str(number)].cut
        post.hand(str(dice.randrange(number + 1)), dice.randrange(60), number / 7)
        if dice.random() < 0.5:
            post.outbox.leave(post.deliveries[str(dice.randrange(number + 1))])
        there = {id(d.body): d.body for readers in post.outbox._readers.values() for d in readers}
        assert post.outbox.size == sum(map(len, there.values())) <= 100
    for delivery in post.deliveries.values():
        post.outbox.leave(delivery)
    assert (post.outbox.size, post.outbox._readers) == (0, {})


# Behind real sockets


def outboxes(edge: Edge) -> tuple[Outbox, Outbox]:
    """Of TCP and of the Unix socket."""
    server = edge._sidecar._server
    assert server is not None
    rooms: dict[str, Room] = cast("Any", server.config.http).keywords["rooms"]
    return rooms["tcp"].outbox, rooms["unix"].outbox


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
    """A request whose answer nobody has begun to read."""
    connection = dial(where)
    host = where.removeprefix("http://") if where.startswith("http://") else "localhost"
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return connection


def test_who_reads_has_his_answer_whoever_does_not(edge: Edge, answers: Answers) -> None:
    """While 30 clients take none of 8 MiB each, others get theirs; what waits stays within the bound."""
    tcp, _ = outboxes(edge)

    def asked(count: int) -> bool:
        return answers.asked >= count

    def answered() -> Reply | None:
        reply = get(edge.url, "/own?mib=8")
        return reply if reply.status == 200 else None

    with ExitStack() as stack:
        for number in range(30):
            stack.enter_context(ask(edge.url, "/own?mib=8"))
            eventually(partial(asked, number + 1))
            assert tcp.size <= OUTBOX_BYTES
            if number % 10 == 9:
                assert len(eventually(answered).body) == 8 * MIB
                answers.asked = number + 1
        assert get(edge.url, "/small").status == 200


def test_the_refusal_is_whole_and_says_when_to_come_again(edge: Edge, answers: Answers) -> None:
    """503 in place of an answer that was begun by the application already; what follows it is not done."""
    tcp, _ = outboxes(edge)

    def refused() -> Any:
        with ExitStack() as stack:
            for _ in range(OUTBOX_BYTES // (8 * MIB)):
                stack.enter_context(ask(edge.url, "/own?mib=8"))
            eventually(lambda: tcp.size == OUTBOX_BYTES)
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


def test_all_who_share_an_answer_have_it(edge: Edge) -> None:
    """Twenty clients of one body of 8 MiB count as one, also those who are slow."""
    tcp, _ = outboxes(edge)
    with ExitStack() as stack:
        clients = [stack.enter_context(ask(edge.url, "/same")) for _ in range(20)]
        eventually(lambda: any(len(readers) == 20 for readers in list(tcp._readers.values())))
        assert tcp.size == 8 * MIB
        assert {len(read_reply(client).body) for client in clients} == {8 * MIB}
    eventually(lambda: tcp.size == 0)


def test_strangers_over_tcp_take_nothing_from_the_unix_socket(edge: Edge) -> None:
    """Each kind of listener has an outbox of its own."""
    tcp, unix = outboxes(edge)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(ask(edge.url, "/own?mib=8"))
        eventually(lambda: tcp.size == OUTBOX_BYTES)
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
def test_nothing_is_held_however_a_client_left(edge: Edge, way: str) -> None:
    """Whole, cut, broken off, at once or in the middle: the bytes are off the account."""
    tcp, _ = outboxes(edge)
    method, path, leave = WAYS[way]
    for seen in (False, True):
        with ask(edge.url, path, method=method) as connection, suppress(OSError, IncompleteRead):
            if seen and (method, path) == ("GET", "/own?mib=8"):
                eventually(lambda: tcp.size == 8 * MIB)
            leave(connection)
        eventually(lambda: (tcp.size, tcp._readers) == (0, {}))


def test_nothing_is_done_after_an_answer_that_did_not_get_there(edge: Edge, answers: Answers) -> None:
    """Neither when the client left in the middle nor when it was cut; and no line is logged of it."""
    tcp, _ = outboxes(edge)
    for leave in (reset, socket.socket.close):
        leaving = ask(edge.url, "/own?mib=8")
        eventually(lambda: tcp.size > 0)
        leave(leaving)
        eventually(lambda: tcp.size == 0)
    assert len(get(edge.url, "/own?mib=8").body) == 8 * MIB
    eventually(lambda: answers.sent == 1)


def test_the_end_comes_also_while_answers_are_not_read(
    answers: Answers, caplog: pytest.LogCaptureFixture, short_path: Path
) -> None:
    """At the end what is not read is cut, soon, and without a word."""
    with ExitStack() as stack:
        with Edge(answers.app(), directory=short_path) as running:
            tcp, _ = outboxes(running)
            for _ in range(3):
                stack.enter_context(ask(running.url, "/own?mib=8"))
            eventually(lambda: tcp.size == 24 * MIB)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5
        assert (tcp.size, tcp._readers) == (0, {})
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_who_pipelines_has_one_answer_made_at_a_time(edge: Edge, answers: Answers) -> None:
    """Until the one before has been taken, the application is not asked for the next."""
    with dial(edge.url) as connection:
        request = f"GET /own?mib=8 HTTP/1.1\r\nHost: {edge.url[7:]}\r\n\r\n".encode()
        connection.sendall(request * 3)
        tcp, _ = outboxes(edge)
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
