"""Access control over real sockets: `vitalsd.http.access.access_control`."""

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from support.edge import Counted, Edge, Reply, dial, exchange, get, whole_app
from vitalsd.http.access.access_control import AccessControl
from vitalsd.sidecar.listen_errors import ListenError

TOKEN = "a-token-of-32-characters-or-more-it-is"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    path.chmod(0o700)
    return path


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(whole_app())


@pytest.fixture(scope="module")
def edge(counted: Counted, directory: Path) -> Iterator[Edge]:
    with Edge(counted, directory=directory) as running:
        yield running


def reason(reply: Reply) -> str:
    """Why it was refused; every refusal has one shape and less than 1 KiB."""
    assert reply.header("content-type") == "application/problem+json", reply
    assert len(reply.body) < 1024
    body = json.loads(reply.body)
    assert body["status"] == reply.status
    return str(body["reason"])


# Host

RIGHT = ["127.0.0.1:{P}", "localhost:{P}", "LOCALHOST:{P}", "LocalHost:{P}", " localhost:{P}", "localhost:{P} "]
WRONG = [
    "127.0.0.1",
    "localhost",
    "127.0.0.1:",
    "localhost:",
    "127.0.0.1:1",
    "localhost:{Q}",
    "127.0.0.1:0{P}",
    "127.0.0.1:{P}0",
    "127.0.0.1:+{P}",
    "127.0.0.1: {P}",
    "127.0.0.1:{P}:{P}",
    "127.0.0.1:{P}/",
    "127.0.0.1:{P}#",
    "127.0.0.1:{P}?",
    "127.0.0.1:{P},localhost:{P}",
    "127.0.0.1:{P} localhost:{P}",
    "http://127.0.0.1:{P}",
    "//127.0.0.1:{P}",
    "localhost@evil.test:{P}",
    "evil.test@localhost:{P}",
    "evil.test",
    "evil.test:{P}",
    "localhost.:{P}",
    "localhost.evil.test:{P}",
    "127.0.0.1.evil.test:{P}",
    "127.0.0.1.nip.io:{P}",
    "sub.localhost:{P}",
    "localhost.localdomain:{P}",
    "xn--lcalhost-54a:{P}",
    "0.0.0.0:{P}",
    "0:{P}",
    "[::]:{P}",
    "[::1]:{P}",
    "::1:{P}",
    "[::ffff:127.0.0.1]:{P}",
    "127.1:{P}",
    "127.0.1:{P}",
    "127.0.0.2:{P}",
    "127.000.000.001:{P}",
    "0177.0.0.1:{P}",
    "0x7f000001:{P}",
    "0x7f.0.0.1:{P}",
    "2130706433:{P}",
    "017700000001:{P}",
    "192.168.0.1:{P}",
    "169.254.169.254",
    "*",
    "*:{P}",
    "null",
    "vitalsd",
    "metrics",
    "a" * 300 + ":{P}",
    "\xff\xfe:{P}",
    "loc\xe0lhost:{P}",
    "localhost:\xb2",
    "%6cocalhost:{P}",
]
UNIX_RIGHT = ["localhost", "vitalsd", "metrics", "unix", "LOCALHOST"]
UNIX_WRONG = ["127.0.0.1", "localhost:80", "localhost:9779", "evil.test", "[::1]", "localhost.", "0.0.0.0", "_", "*"]


@pytest.mark.parametrize("form", RIGHT, ids=ascii)
def test_host_of_the_listener_address_or_localhost_is_accepted(edge: Edge, form: str) -> None:
    """The address and port that the connection was made to, or localhost with that port, in any case."""
    assert get(edge.url, host=form.replace("{P}", port(edge))).status == 200


@pytest.mark.parametrize("form", WRONG, ids=lambda form: ascii(form[:24]))
def test_host_of_another_server_is_421(edge: Edge, counted: Counted, form: str) -> None:
    """Any other is another server, 421, and nothing behind the gate runs."""
    before = len(counted.reached)
    host = form.replace("{P}", port(edge)).replace("{Q}", str(int(port(edge)) % 65535 + 1))
    reply = get(edge.url, "/metrics", host=host)
    assert (reply.status, reason(reply)) == (421, "misdirected")
    assert len(counted.reached) == before


def test_refusal_of_a_forwarder_on_another_port_says_to_use_the_same_port_number(edge: Edge) -> None:
    """The address that the client may ask for is in the same sentence."""
    number = port(edge)
    reply = get(edge.url, host=f"localhost:{int(number) % 65535 + 1}")
    detail = json.loads(reply.body)["detail"]
    assert detail.endswith(f"use 127.0.0.1:{number}, and forward it by the same port number")


@pytest.mark.parametrize("form", UNIX_RIGHT)
def test_host_that_programs_send_over_the_unix_socket_is_accepted(edge: Edge, form: str) -> None:
    """There the name is of no consequence to the way taken, so those that programs write are known by heart."""
    assert get(edge.socket, host=form).status == 200


@pytest.mark.parametrize("form", UNIX_WRONG)
def test_host_with_a_forwarded_port_over_the_unix_socket_is_421(edge: Edge, form: str) -> None:
    """A browser that connects to the socket through a forwarder sends the port of that, which is refused."""
    assert get(edge.socket, host=form).status == 421


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"Host:\r\n",
        b"Host: \r\n",
        b"Host: {}\r\nHost: {}\r\n",
        b"Host: {}\r\nhost: evil.test\r\n",
        b"Host : {}\r\n",
    ],
)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_host_missing_empty_or_sent_twice_is_400(edge: Edge, counted: Counted, lines: bytes, version: bytes) -> None:
    """None, an empty one or two of them is a bad request, in HTTP/1.0 too."""
    before = len(counted.reached)
    head = b"GET /healthz HTTP/" + version + b"\r\n" + lines.replace(b"{}", f"localhost:{port(edge)}".encode())
    reply = exchange(edge.url, head + b"\r\n")
    assert reply.status == 400
    assert reason(reply) in ("no_host", "bad_request")
    assert len(counted.reached) == before


def test_ipv6_literal_on_an_ipv6_listener_is_accepted() -> None:
    """On ::1 its literal is right, in brackets, and 127.0.0.1 is not."""
    try:
        running = Edge(whole_app(), host="::1")
    except ListenError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with running:
        assert get(running.url).status == 200
        for host, status in (("localhost:{P}", 200), ("[::1]", 421), ("127.0.0.1:{P}", 421), ("::1:{P}", 421)):
            assert get(running.url, host=host.replace("{P}", port(running))).status == status


def port(edge: Edge) -> str:
    return edge.url.rpartition(":")[2]


def asked(
    gate: AccessControl, server: tuple[str, int | None], *headers: tuple[bytes, bytes], path: str = "/info"
) -> int:
    """The status that a request over TCP gets which arrived at `server`."""
    statuses = []

    async def receive() -> Any:
        raise AssertionError("this test reads no body")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": list(headers),
        "server": server,
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(gate(scope, receive, send))
    return int(statuses[0])


async def teapot(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("server", "host", "status"),
    [
        (("127.0.0.1", 80), "127.0.0.1", 418),
        (("127.0.0.1", 80), "localhost:80", 418),
        (("127.0.0.1", 81), "127.0.0.1", 421),
        (("127.8.8.8", 9779), "127.8.8.8:9779", 418),
        (("127.8.8.8", 9779), "127.0.0.1:9779", 421),
        (("::ffff:127.0.0.1", 9779), "127.0.0.1:9779", 418),
        (("::ffff:127.0.0.1", 9779), "evil.test:9779", 421),
        (("192.168.7.5", 9779), "192.168.7.5:9779", 418),
        (("192.168.7.5", 9779), "10.0.0.1:8080", 418),
        (("192.168.7.5", 9779), "localhost:8080", 418),
        (("fe80::1%eth0", 9779), "[fe80::1]:9779", 418),
        (("192.168.7.5", 9779), f"{socket.gethostname()}:9779", 418),
        (("192.168.7.5", 9779), "evil.test:9779", 421),
        (("192.168.7.5", 9779), "192.168.7.5.evil.test:9779", 421),
        (("192.168.7.5", 9779), "0.0.0.0:9779", 421),
        (("192.168.7.5", 9779), "[::]:9779", 421),
        (("192.168.7.5", 9779), "[localhost]:9779", 421),
        (("192.168.7.5", 9779), "a b", 421),
    ],
)
def test_host_on_a_remote_listener_may_be_any_name_of_this_machine(
    server: tuple[str, int], host: str, status: int
) -> None:
    """On loopback that address and port alone; where other machines get to, any address or name of this one."""
    assert asked(AccessControl(teapot), server, (b"host", host.encode())) == status


@pytest.mark.parametrize(
    ("target", "status", "why"),
    [
        ("http://{H}/healthz", 200, None),
        ("HTTP://{H}/healthz?", 200, None),
        ("http://{H}", 200, None),
        ("http://{H}/nowhere", 404, "no_such_route"),
        ("http://evil.test/healthz", 400, "bad_request"),
        ("http://127.0.0.1/healthz", 400, "bad_request"),
        ("http:///healthz", 400, "bad_request"),
        ("http://user@{H}/healthz", 400, "bad_request"),
        ("https://{H}/healthz", 404, "no_such_route"),
    ],
)
def test_absolute_target_is_served_if_it_names_the_server_of_the_host_header(
    edge: Edge, target: str, status: int, why: str | None
) -> None:
    """Clients that take the sidecar for a proxy send one."""
    reply = get(edge.url, target.replace("{H}", edge.url.removeprefix("http://")))
    assert reply.status == status
    assert why is None or reason(reply) == why


# Browsers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((), 200),
        (("Sec-Fetch-Site: same-origin",), 200),
        (("Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate"), 403),
        (("Sec-Purpose: prefetch",), 403),
        (("Purpose: prefetch",), 403),
        (("Sec-Purpose: prefetch;prerender", "Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate"), 403),
        (("Sec-Purpose: prefetch", "Sec-Fetch-Site: same-origin"), 403),
        (("Sec-Fetch-Site: none",), 403),
        (("Sec-Fetch-Site: none", "Sec-Fetch-Mode: cors"), 403),
        (("Sec-Fetch-Site: none", "Sec-Fetch-Mode: no-cors"), 403),
        (("Sec-Fetch-Site: cross-site",), 403),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"), 403),
        (("Sec-Fetch-Site: same-site",), 403),
        (("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate"), 403),
        (("Sec-Fetch-Site:",), 403),
        (("Sec-Fetch-Site: Same-Origin",), 403),
        (("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"), 403),
        (("Sec-Fetch-Site: same-origin, cross-site",), 403),
        (("Origin: http://{H}",), 200),
        (("Origin: http://{H}", "Sec-Fetch-Site: same-origin"), 200),
        (("Origin: null",), 403),
        (("Origin:",), 403),
        (("Origin: https://{H}",), 403),
        (("Origin: http://{H}/",), 403),
        (("Origin: http://{H}.evil.test",), 403),
        (("Origin: http://evil.test",), 403),
        (("Origin: http://localhost:1",), 403),
        (("Origin: http://localhost:{P}",), 403),
        (("Origin: http://127.0.0.1",), 403),
        (("Origin: file://",), 403),
        (("Origin: chrome-extension://abcdefgh",), 403),
        (("Origin: http://{H}", "Origin: http://evil.test"), 403),
        (("Origin: http://{H}", "Sec-Fetch-Site: cross-site"), 403),
    ],
    ids=lambda value: ascii(value),
)
def test_browser_request_for_data_is_accepted_from_the_own_page_only(
    edge: Edge, counted: Counted, headers: tuple[str, ...], status: int
) -> None:
    """A page of any other origin, a typed address and a prefetch do not get as far as a handler."""
    before = len(counted.reached)
    host = edge.url.removeprefix("http://")
    lines = [line.replace("{H}", host).replace("{P}", port(edge)) for line in headers]
    reply = get(edge.url, "/healthz", *lines)
    assert reply.status == status
    if status == 403:
        assert reason(reply) == "cross_site"
        assert len(counted.reached) == before


@pytest.mark.parametrize(
    ("path", "dest", "mode", "guarded", "status"),
    [
        ("/", b"document", b"navigate", True, 418),
        ("/", b"document", b"navigate", False, 403),
        ("/", b"iframe", b"navigate", True, 403),
        ("/", b"empty", b"cors", True, 403),
        ("/", b"image", b"no-cors", True, 403),
        ("/docs", b"document", b"navigate", True, 403),
        ("/healthz", b"document", b"navigate", True, 403),
        ("/metrics", b"document", b"navigate", True, 403),
    ],
)
def test_page_link_from_a_file_with_a_token_is_accepted_and_from_a_site_refused(
    path: str, dest: bytes, mode: bytes, guarded: bool, status: int
) -> None:
    """A file of `vitalsd open` does, to the document without data, if a token guards all else; no site does more."""
    host, site = (b"host", b"127.0.0.1:9779"), (b"sec-fetch-site", b"cross-site")
    gate = AccessControl(teapot, token="secret" if guarded else None)
    assert (
        asked(gate, ("127.0.0.1", 9779), host, site, (b"sec-fetch-dest", dest), (b"sec-fetch-mode", mode), path=path)
        == status
    )


@pytest.mark.parametrize(
    ("path", "status"),
    [("/", 418), ("/docs", 418), ("/metrics", 403), ("/report.zip", 403), ("/openapi.json", 403), ("/docs/", 403)],
)
@pytest.mark.parametrize("token", [None, "secret"])
def test_typed_address_leads_to_pages_without_data_only(path: str, status: int, token: str | None) -> None:
    """A typed address of another site that redirects looks the same to the sidecar."""
    typed = (b"host", b"127.0.0.1:9779"), (b"sec-fetch-site", b"none"), (b"sec-fetch-mode", b"navigate")
    gate, server = AccessControl(teapot, token=token), ("127.0.0.1", 9779)
    assert asked(gate, server, *typed, path=path) == status
    for purpose in (b"purpose", b"sec-purpose"):
        assert asked(gate, server, *typed, (purpose, b"prefetch"), path=path) == 403


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://{H}"])
def test_cors_preflight_of_any_origin_is_refused(edge: Edge, counted: Counted, origin: str) -> None:
    """The sidecar allows no origin, not even its own, and no answer has a header of CORS."""
    before = len(counted.reached)
    reply = get(
        edge.url,
        "/metrics",
        f"Origin: {origin.replace('{H}', edge.url.removeprefix('http://'))}",
        "Access-Control-Request-Method: GET",
        "Access-Control-Request-Headers: authorization",
        "Access-Control-Request-Private-Network: true",
        method="OPTIONS",
    )
    assert (reply.status, reason(reply)) == (403, "cross_site")
    assert len(counted.reached) == before
    assert not [name for name, _ in reply.headers if name.lower().startswith("access-control")]


# Headers of answers

ANSWERS = {
    "answer": ("GET", "/metrics?window_ms=10", 200),
    "text": ("GET", "/info", 200),
    "schema": ("GET", "/openapi.json", 200),
    "page": ("GET", "/", 200),
    "no route": ("GET", "/nothing", 404),
    "method": ("POST", "/metrics", 405),
    "parameter": ("GET", "/metrics?window_ms=1", 422),
    "no process": ("GET", "/metrics?window_ms=10&pid=2147483647", 404),
    "too long": ("GET", "/?" + "a" * 2050, 414),
    "no HTTP": ("GET", "/ /", 400),
}


@pytest.mark.parametrize("which", ANSWERS)
def test_answers_have_headers_against_caching_sniffing_framing_and_embedding(edge: Edge, which: str) -> None:
    """Answers forbid caching, sniffing, framing, embedding and scripts; none has a CORS header or a server name."""
    method, path, status = ANSWERS[which]
    reply = get(edge.url, path, "Origin: " + edge.url, method=method)
    assert reply.status == status
    names = [name.lower() for name, _ in reply.headers]
    assert len(set(names)) == len(names)
    assert reply.header("cache-control") == "no-store"
    assert reply.header("x-content-type-options") == "nosniff"
    assert reply.header("cross-origin-resource-policy") == "same-origin"
    assert reply.header("cross-origin-opener-policy") == "same-origin"
    assert reply.header("referrer-policy") == "no-referrer"
    assert reply.header("x-frame-options") == "DENY"
    policy = reply.header("content-security-policy") or ""
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in policy
    assert ("script-src" in policy) == (which == "page")
    assert "server" not in names
    assert not [name for name in names if name.startswith("access-control") or name == "set-cookie"]


@pytest.mark.parametrize(
    ("headers", "host", "path", "status"),
    [
        ((), None, "/healthz", 200),
        ((), "evil.test", "/healthz", 421),
        ((), "", "/healthz", 400),
        (("Sec-Fetch-Site: cross-site",), None, "/", 403),
        (("Origin: http://evil.test",), None, "/metrics", 403),
        ((), None, "/?" + "a" * 2050, 414),
        (("X: " + "1" * 17_000,), None, "/healthz", 431),
        ((), None, "/ /", 400),
    ],
)
def test_access_control_treats_head_like_get(
    edge: Edge, counted: Counted, headers: tuple[str, ...], host: str | None, path: str, status: int
) -> None:
    """The same status and headers as for GET, no body, and nothing behind the gate runs for what is refused."""
    before = len(counted.reached)
    head, full = (get(edge.url, path, *headers, host=host, method=method) for method in ("HEAD", "GET"))
    assert (head.status, full.status, head.body) == (status, status, b"")
    assert [name for name, _ in head.headers] == [name for name, _ in full.headers]
    differing = {name for name, _ in {*head.headers} ^ {*full.headers}}
    assert differing <= {"date", "content-length"}  # a refusal of what is no HTTP quotes the line with the method
    assert len(counted.reached) - before == (2 if status == 200 else 0)


# The token


@pytest.fixture(scope="module")
def secret() -> Counted:
    return Counted(whole_app())


@pytest.fixture(scope="module")
def guarded(secret: Counted) -> Iterator[Edge]:
    with Edge(secret, token=TOKEN) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((f"Authorization: Bearer {TOKEN}",), 200),
        ((f"authorization: bearer {TOKEN}",), 200),
        ((), 401),
        ((f"Authorization: Basic {TOKEN}",), 401),
        ((f"Authorization: {TOKEN}",), 401),
        ((f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}"), 401),
        ((f"X-Token: {TOKEN}",), 401),
        ((f"Cookie: token={TOKEN}",), 401),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_token_in_one_authorization_header_is_accepted(
    guarded: Edge, secret: Counted, headers: tuple[str, ...], status: int
) -> None:
    """It is taken from one Authorization header and from nowhere else."""
    before = len(secret.reached)
    reply = get(guarded.url, "/info", *headers)
    assert reply.status == status
    if status == 401:
        assert reason(reply) == "token"
        assert reply.header("www-authenticate") == "Bearer"
        assert len(secret.reached) == before


def test_token_is_required_on_a_connection_reset_before_accept(guarded: Edge, secret: Counted) -> None:
    """The request of a connection that is reset before it is accepted can be read, but its user is not known."""
    body = b'{"label": "x"}'
    head = f"POST /marks HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    before = list(secret.reached)
    for _ in range(100):
        with dial(guarded.url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    assert get(guarded.url).status == 200
    assert secret.reached == [*before, "GET /healthz"]


def test_token_in_the_query_is_refused(guarded: Edge) -> None:
    """Queries end up in logs and histories."""
    assert get(guarded.url, f"/info?token={TOKEN}").status == 401


@pytest.mark.parametrize("wrong", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), TOKEN[::-1], "\xff" * len(TOKEN)])
def test_token_longer_shorter_or_different_is_refused(wrong: str) -> None:
    """Longer, shorter or other than the right one."""
    headers = ((b"host", b"127.0.0.1:9"), (b"authorization", f"Bearer {wrong}".encode("latin-1")))
    assert asked(AccessControl(teapot, token=TOKEN), ("127.0.0.1", 9), *headers) == 401


def test_proxy_headers_grant_no_access(guarded: Edge) -> None:
    """A header does not make a client one of the Unix socket, or change the host."""
    for line in ("X-Forwarded-For: unix", "Forwarded: for=unix", "X-Real-IP: ", "X-Forwarded-Host: localhost"):
        assert get(guarded.url, "/info", line).status == 401
    assert get(guarded.url, host="evil.test").status == 421
    assert get(guarded.url, "/info", f"X-Forwarded-Host: {guarded.url[7:]}", host="evil.test").status == 421


def test_routes_without_token_contain_no_data(guarded: Edge) -> None:
    """Alive or not, our own code, and the proof of the sidecar: all else asks for the token."""
    open_paths = {
        path
        for path in ("/", "/docs", "/healthz", "/hello?nonce=0123456789abcdef", *PATHS)
        if get(guarded.url, path).status != 401
    }
    assert open_paths == {"/", "/docs", "/healthz", "/hello?nonce=0123456789abcdef"}
    assert json.loads(get(guarded.url).body) == {"status": "ok"}


PATHS = [
    *("/metrics", "/stream", "/history", "/marks", "/processes", "/runs", "/runs/x/history", "/report.zip", "/info"),
    *("/openapi.json", "/nothing", "//", "/healthz/", "/healthz/../info", "/%2e/info", "/HEALTHZ", "/healthz%00"),
]


def test_wrong_tokens_above_the_rate_limit_are_429_and_the_right_one_passes() -> None:
    """After ten wrong tokens in a second the next is 429; the right one passes all the while."""
    now = [0.0]
    gate = AccessControl(teapot, token=TOKEN, clock=lambda: now[0])

    def ask(token: str) -> int:
        headers = ((b"host", b"127.0.0.1:9"), (b"authorization", f"Bearer {token}".encode()))
        return asked(gate, ("127.0.0.1", 9), *headers)

    assert [ask("x") for _ in range(12)] == [401] * 10 + [429] * 2
    assert ask(TOKEN) == 418
    now[0] = 0.99
    assert ask("x") == 429
    now[0] = 1.0
    assert [ask("x") for _ in range(11)] == [401] * 10 + [429]


# Sizes


@pytest.mark.parametrize(
    ("length", "status"), [(2048 - len("/healthz?"), 422), (2049 - len("/healthz?"), 414), (9000, 414)]
)
def test_request_target_above_2_kib_is_414(edge: Edge, length: int, status: int) -> None:
    """Path and query together have 2 KiB."""
    assert get(edge.url, "/healthz?" + "a" * length).status == status


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"X-{i}: 1" for i in range(62)], 200),
        ([f"X-{i}: 1" for i in range(63)], 431),
        ([f"X-{i}: {'1' * 1000}" for i in range(15)], 200),
        ([f"X-{i}: {'1' * 1000}" for i in range(17)], 431),
        ([f"X: {'1' * 60_000}"], 431),
        ([f"X: {'1' * 300_000}"], 431),
    ],
    ids=["64 headers", "65 headers", "15 KiB", "17 KiB", "60 kB", "300 kB"],
)
def test_request_head_above_16_kib_or_64_headers_is_431(
    edge: Edge, counted: Counted, lines: list[str], status: int
) -> None:
    """64 headers and 16 KiB of them, whether they arrive in one piece or in many."""
    before = len(counted.reached)
    reply = get(edge.url, "/healthz", *lines)
    if reply.status == 0:
        assert len(lines[0]) > 100_000, "only a client that still writes may miss the answer"
    else:
        assert reply.status == status
    assert len(counted.reached) - before == (status == 200)
