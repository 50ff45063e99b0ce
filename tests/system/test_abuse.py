"""
Whatever is sent, the service stands: requests made from its schema, requests made wrong, and bytes.

Each runs here in a small, fixed form; ``make torture`` runs the same with tens of thousands.
"""

import http.client
import json
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from support.edge import dial
from support.serving import Serving

if TYPE_CHECKING:
    from schemathesis import Case, GenerationMode
    from schemathesis.schemas import APIOperation

pytestmark = pytest.mark.live

SIZES = [pytest.param(1, id="quick"), pytest.param(40, id="torture", marks=pytest.mark.torture)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    """A server that in the end has not logged a line, holds no more descriptors than before, and still answers."""
    with Serving(tmp_path, "--record-interval", "0.1") as serving:
        serving.get("/metrics", window_ms=10)
        serving.client.close()
        process = psutil.Process(serving.process.pid)
        before = files(process)
        yield serving
        with session_of(serving) as client:
            assert client.get(f"{serving.url}/metrics?window_ms=10", timeout=10).status_code == 200
        assert files(process) <= before
        assert serving.stop() == 0
        assert serving.process.stderr is not None
        assert serving.process.stderr.read() == ""


def files(process: psutil.Process) -> set[str]:
    """Return the open files; other processes that were requested stay open for 10 s."""
    return {each.path for each in process.open_files() if not each.path.startswith("/proc/")}


def session_of(serving: Serving) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    return session


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_schema_generated_requests_are_answered_as_documented(served: Serving, kind: str, size: int) -> None:
    """
    A request that the schema allows gets the answer of the schema, and another one the refusal of the schema.

    Checked by schemathesis: status, media type and body of every answer are documented, and none is a 5xx.
    """
    import schemathesis  # takes a second, which each worker would pay to collect the tests
    from schemathesis.core.result import Ok

    mode = schemathesis.GenerationMode(kind)
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    statuses: Counter[int] = Counter()
    with session_of(served) as session:
        for found in schema.get_all_operations():
            assert isinstance(found, Ok), found
            operation = found.ok()
            if operation.path == "/hello":
                continue  # is there with a token alone
            if kind == "negative":
                with suppress(Unsatisfiable):  # where there is no parameter none can be wrong
                    statuses += asked(operation, mode, size, session)
            elif operation.path != "/stream":  # which has no end
                statuses += asked(operation, mode, size, session)
    print(kind, dict(statuses))
    assert statuses.total() > 40 * size


def asked(
    operation: "APIOperation[Any, Any, Any, Any]", mode: "GenerationMode", size: int, session: requests.Session
) -> Counter[int]:
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    statuses: Counter[int] = Counter()

    @settings(
        max_examples=8 * size,
        derandomize=size == 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: "Case[Any]") -> None:
        shorten(operation.path, case.query)
        with suppress(UnicodeError):  # requests cannot send such a header or path
            answer = case.call(session=session, timeout=30)
            excluded: list[Any] = []
            if answer.status_code in (413, 414, 431):
                excluded.append(negative_data_rejection)  # knows no such refusal
            if operation.path == "/marks":
                excluded.append(positive_data_acceptance)  # no schema can say that a label is printable
            if case.query.get("children") == "true":
                excluded.append(positive_data_acceptance)  # nor that a parameter needs detail=full
            case.validate_response(answer, excluded_checks=excluded)
            statuses[answer.status_code] += 1

    check()
    return statuses


def shorten(path: str, query: Any) -> None:
    """Shorten the window in a query, because the test does not need its length."""
    name = {"/metrics": "window_ms", "/report.zip": "window_ms", "/stream": "interval_ms"}.get(path)
    if name is not None and isinstance(query, dict):
        with suppress(ValueError, TypeError):
            if int(query.get(name, 1000)) > 20:
                query[name] = 20


# Requests that are wrong


NAMES = ["window_ms", "mode", "detail", "sort", "limit", "pid", "seconds", "top", "step_ms", "interval_ms", "nonce"]
PATHS = ["/metrics", "/stream", "/history", "/marks", "/processes", "/runs", "/info", "/healthz", "/report.zip"]
NUMBERS = [
    "-1",
    "0x10",
    "1e3",
    "NaN",
    "inf",
    "1_0",
    "+5",
    "5.0",
    "%20%35",
    "5%0a",
    "",
    "9" * 50,
    "%D9%A3",
    "null",
    "[]",
]
HEADERS = [
    *("Host: evil.test", "Host: 0.0.0.0", "Host: localhost", "Host: [::]", "Origin: null", "Origin: http://evil.test"),
    *("Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Sec-Fetch-Site: none", "Sec-Fetch-Site: x"),
]
BODIES = [b"", b"{", b"[]", b"null", b'{"label":1}', b'{"label":""}', b'{"label":"x","more":1}', b"x" * 5000]
METHODS = ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW", "get", "M-SEARCH", "PROPFIND"]


def wrong_request(dice: random.Random, host: str) -> tuple[str, str, list[str], bytes]:
    """Method, target, header lines and body; one thing about it, at least, is wrong."""
    path, right = dice.choice(PATHS), f"Host: {host}"
    junk = "".join(f"%{dice.randrange(256):02x}" for _ in range(dice.randrange(1, 40)))
    match dice.randrange(9):
        case 0:
            return "GET", f"/metrics?{dice.choice(NAMES[:6])}={dice.choice([*NUMBERS, junk])}&window_ms=0", [right], b""
        case 1:
            return "GET", f"{path}?{junk}={junk}", [right], b""
        case 2:
            return "GET", f"{path}?{dice.choice(NAMES)}=1&x{junk}", [right], b""
        case 3:
            return "GET", dice.choice(["//", "/..", "/.", "/%2f", "/metrics/", "/" + junk, "/x" + junk]), [right], b""
        case 4:
            return dice.choice(METHODS), path, [right], b""
        case 5:
            line = dice.choice(HEADERS)
            return "GET", path, [line] if line.startswith("Host") else [right, line], b""
        case 6:
            body = dice.choice(
                [b"", b"{", b"[]", b"null", b'{"label":1}', b'{"label":""}', dice.randbytes(50), b"x" * 5000]
            )
            kind = dice.choice(["application/json", "text/plain", "application/x-www-form-urlencoded", junk, "*/*"])
            return "POST", "/marks", [right, f"Content-Type: {kind}"], body
        case 7:
            return "GET", f"{path}?{'x' * dice.randrange(2050, 4000)}", [right], b""
        case _:
            return "GET", path, [right, *(f"X-{i}: {junk}" for i in range(70))], b""


@pytest.mark.parametrize("size", SIZES)
def test_wrong_requests_are_4xx_problems(served: Serving, size: int) -> None:
    """Every one is refused with a problem of less than 1 KiB, and none of them is our fault: never a 5xx."""
    dice = random.Random(8)
    statuses: Counter[int] = Counter()
    host = served.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    for _ in range(500 * size):
        method, target, lines, body = wrong_request(dice, host)
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for line in lines:
            name, _, value = line.partition(": ")
            connection.putheader(name, value)
        if body or method == "POST":
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        statuses[answer.status] += 1
        assert 400 <= answer.status < 500, (method, target, lines, body, answer.status)
        assert len(content) < 1024
        if method != "HEAD":
            assert answer.headers["content-type"] == "application/problem+json"
            assert json.loads(content)["status"] == answer.status
    connection.close()
    print(dict(statuses))
    assert {401, 500, 503}.isdisjoint(statuses)
    assert {403, 404, 405, 413, 414, 421, 422, 431} <= set(statuses)


# Bytes


def whole_requests(host: str) -> list[bytes]:
    head = f"Host: {host}\r\nAccept: */*\r\nUser-Agent: x\r\n".encode()
    body = b'{"label":"F12"}'
    return [
        b"GET /metrics?window_ms=10&detail=full HTTP/1.1\r\n" + head + b"\r\n",
        b"GET /healthz HTTP/1.1\r\n" + head + b"Connection: keep-alive\r\n\r\nGET /info HTTP/1.0\r\n" + head + b"\r\n",
        b"POST /marks HTTP/1.1\r\n" + head + b"Content-Type: application/json\r\nContent-Length: 15\r\n\r\n" + body,
        b"POST /marks HTTP/1.1\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + body + b"\r\n0\r\n\r\n",
        b"GET /stream?interval_ms=10 HTTP/1.1\r\n" + head + b"Upgrade: h2c\r\nExpect: 100-continue\r\n\r\n",
        b"GET /history?seconds=1 HTTP/1.1\r\n" + head + b"Accept: text/csv\r\n\r\n",
    ]


PIECES = [
    *(b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t", b":", b"\xff", b"\x80", b"%", b"%00", b"\r\n\r\n", b"0\r\n\r\n"),
    *(b"Host: a\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Transfer-Encoding: gzip, chunked\r\n", b"HTTP/2.0", b"HTTP/1.1", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET "),
    *(
        b"http://evil.test",
        b"\r\n folded",
        b"A" * 3000,
        b"X: 1\r\n" * 100,
        b"ffffffffffffffffffff\r\n",
        b"\x16\x03\x01",
    ),
]


def mutated(dice: random.Random, content: bytes) -> bytes:
    """`content` with one to four changes at random places."""
    changed = bytearray(content)
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(len(changed) + 1)
        end = min(len(changed), at + dice.randrange(1, 30))
        match dice.randrange(6):
            case 0:
                changed[at:at] = dice.choice(PIECES)
            case 1:
                del changed[at:end]
            case 2:
                changed[at:end] = dice.randbytes(end - at)
            case 3:
                changed[at:at] = changed[at:end]
            case 4 if at < len(changed):
                changed[at] ^= 1 << dice.randrange(8)
            case _:
                del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_that_are_no_request_are_refused_or_closed(served: Serving, size: int) -> None:
    """Mutations of requests, in one piece or in several: an answer that is none of our fault, or a closed door."""
    dice = random.Random(88)
    statuses: Counter[str] = Counter()
    originals = whole_requests(served.url.removeprefix("http://"))
    for _ in range(10 * size):
        contents = [mutated(dice, dice.choice(originals)) for _ in range(20)]
        for content, received in zip(contents, exchanged(served.url, contents, dice), strict=True):
            status = received[9:12].decode("latin-1")
            statuses[status] += 1
            assert status[:1] in ("", "1", "2", "4"), (content, received[:300])
            head, _, body = received.partition(b"\r\n\r\n")
            if status[:1] == "4" and body.count(b"HTTP/1.1 ") == 0:
                assert len(body) < 1024, (content, received)
                assert b"application/problem+json" in head
    print(dict(statuses))
    assert statuses["400"] > 20 * size


def exchanged(url: str, contents: list[bytes], dice: random.Random) -> list[bytes]:
    """Send each on a connection of its own, and return the answers; close a connection that stays silent."""
    received = [b""] * len(contents)
    with ExitStack() as stack:
        connections = [stack.enter_context(dial(url)) for _ in contents]
        for connection, content in zip(connections, contents, strict=True):
            at = dice.randrange(len(content) + 1) if dice.randrange(4) == 0 else len(content)
            with suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(content[:at])
                connection.sendall(content[at:])
        numbers = {connection: i for i, connection in enumerate(connections)}
        deadline = time.monotonic() + 0.5  # a stream never falls silent
        while (readable := select.select(numbers, [], [], 0.15)[0]) and time.monotonic() < deadline:
            for connection in readable:
                if not read_some(connection, received, numbers[connection]):
                    del numbers[connection]
        for connection in numbers:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            while read_some(connection, received, numbers[connection]):
                pass
    return received


def read_some(connection: socket.socket, received: list[bytes], number: int) -> bool:
    """Return whether there may be more to read."""
    try:
        part = connection.recv(65536)
    except ConnectionResetError:
        return False
    received[number] += part
    return bool(part)
