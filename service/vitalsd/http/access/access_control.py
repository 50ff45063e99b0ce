"""Check the head of each request: size, host (DNS rebinding), origin (CSRF), token and user; end requests at a stop."""

import asyncio
import hmac
import ipaddress
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vitalsd.admission import Peer
from vitalsd.contract.limits import BAD_TOKENS_PER_S, HEAD_BYTES, HEADERS, TARGET_BYTES
from vitalsd.http.access.peer import PEER, peer_of
from vitalsd.http.parameters import READING
from vitalsd.http.responses import problem, truncate_for_display

__all__ = ["OPEN_PATHS", "AccessControl", "protected"]

OPEN_PATHS = frozenset(("/", "/docs", "/healthz", "/hello"))
"""Paths that need no token: the two pages, which hold no data, liveness, and the proof that it knows the token."""

PAGES = frozenset(("/", "/docs"))
"""Paths that an address typed into a browser may open: the pages hold no data."""
PAGE = "/"
"""Path to which the file of `vitalsd open` links, with the token; for the browser that file is another site."""

VISIBLE_PATHS = frozenset(("/", "/docs", "/healthz", "/metrics"))
"""
Paths that another user of this machine may read over TCP without a token: pages, and what ps(1) and top(1) show.
``/metrics`` refuses the parameters that would show more.
"""

UNIX_HOSTS = frozenset(("localhost", "vitalsd", "metrics", "unix"))
"""
Values of ``Host`` that programs send over the Unix socket. A browser reaches it only through a forwarder, and sends the
port of that, so its ``Host`` is none of these.
"""
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z_.-]+))(?::[0-9]{1,5})?", re.ASCII)

PROTECTIVE_HEADERS = (
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
"""Headers added to every answer that does not have them; the page for example has a policy of its own."""

IDENTIFYING_HEADERS = frozenset(
    (
        b"host",
        b"authorization",
        b"origin",
        b"access-control-request-method",
        b"purpose",
        b"sec-purpose",
        b"sec-fetch-site",
        b"sec-fetch-mode",
        b"sec-fetch-dest",
    )
)
"""Headers of a request that show which client sends it, and for which site."""
ABSOLUTE = re.compile(rb"http://([^/?#]*)", re.IGNORECASE)
ADDRESSES = 16
"""Size of the cache of allowed hosts, in addresses of this machine."""

Headers = list[tuple[bytes, bytes]]


def protected(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers of an answer with those of `PROTECTIVE_HEADERS` that it lacks."""
    own = list(headers)
    names = {name.lower() for name, _ in own}
    return own + [header for header in PROTECTIVE_HEADERS if header[0] not in names]


class AccessControl:
    """
    Refuse requests that are not allowed, and end the others at a stop; the outermost ASGI middleware.

    - A page of another site gets no answer. With DNS rebinding ``Host`` is wrong; with CSRF, by a fetch or an image,
      ``Sec-Fetch-Site`` is wrong, or ``Origin`` where that is missing. There is no CORS.
    - Over TCP a request must carry the token, if there is one. The Unix socket needs none: its mode and
      `ServerConnection` admit only this user and root.
    - `close` ends the requests that are being served: an answer that has not begun becomes a 503, a stream ends.

    Args:
        app: the application.
        token: value for ``Authorization: Bearer``; ``None``: no token is checked.
        clock: monotonic time, s.
    """

    def __init__(self, app: ASGIApp, *, token: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._clock = clock
        self._guesses: deque[float] = deque(maxlen=BAD_TOKENS_PER_S)
        self._machine = _names_of_this_machine()
        self._loopback_hosts = lru_cache(ADDRESSES)(_loopback_hosts)
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False

    def close(self) -> None:
        """End all answers now. Call it on the event loop."""
        self._closed = True
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it to the application; add `PROTECTIVE_HEADERS` to the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = protected(message.get("headers", ()))
            await send(message)

        authority = _made_relative(scope)
        refusal = self._refusal(scope, authority)
        if refusal is not None:
            await refusal(scope, receive, guarded)
        else:
            await self._forward(scope, receive, guarded)

    # Checks, cheapest first

    def _refusal(self, scope: Scope, authority: str | None) -> Response | None:
        """Return the refusal of a request, None if it is allowed; `authority` is the host of an absolute target."""
        headers: Headers = scope["headers"]
        if len(scope["raw_path"]) + len(scope["query_string"]) >= TARGET_BYTES:
            return problem("target_too_long", f"path and query have at most {TARGET_BYTES} bytes")
        if len(headers) > HEADERS or sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_BYTES:
            return problem("head_too_large", f"at most {HEADERS} headers and {HEAD_BYTES} bytes of them")
        identifying: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            if name in IDENTIFYING_HEADERS:
                identifying.setdefault(name, []).append(value)
        hosts = identifying.pop(b"host", [])
        if len(hosts) != 1 or not hosts[0]:
            return problem("no_host", "send one Host header")
        host = hosts[0].decode("latin-1").lower()
        if authority not in (None, host):
            return problem("bad_request", "the address of the request and its Host header name different servers")
        if not self._is_allowed_host(host, scope):
            return problem("misdirected", f"this is not {truncate_for_display(host)}; use {self._expected_host(scope)}")
        if identifying and (refusal := _cross_site(identifying, scope, host, guarded=self._token is not None)):
            return refusal
        if self._token is None:
            return _other_user(scope)
        return self._without_token(self._token, identifying.get(b"authorization", []), scope)

    def _is_allowed_host(self, host: str, scope: Scope) -> bool:
        """Return whether `host`, in lower case, is a name or an address of this server."""
        if scope["client"] is None:
            return host in UNIX_HOSTS
        hosts = self._loopback_hosts(*scope["server"])
        if hosts:
            return host in hosts
        # Other machines connect here, also through forwarders, so any port is allowed. The token keeps out a page
        # with DNS rebinding; this check only refuses foreign names.
        found = HOST.fullmatch(host)
        if found is None:
            return False
        try:
            return not ipaddress.ip_address(found[1] or found[2]).is_unspecified
        except ValueError:
            return found[1] is None and found[2] in self._machine

    def _expected_host(self, scope: Scope) -> str:
        """Return the host to use instead, as text for a refusal."""
        if scope["client"] is None:
            return "http://localhost/ on this socket"
        hosts = self._loopback_hosts(*scope["server"])
        if not hosts:
            return "the address of this machine"
        return f"{hosts[0]}, and forward it by the same port number"

    def _without_token(self, right: bytes, given: list[bytes], scope: Scope) -> Response | None:
        """Return the refusal of a request over TCP without the right token; limit the rate of wrong tokens."""
        if scope["client"] is None or scope["path"] in OPEN_PATHS:
            return None
        if given:
            scheme, _, token = given[0].partition(b" ")
            if len(given) == 1 and scheme.lower() == b"bearer" and hmac.compare_digest(token, right):
                scope[PEER] = Peer("tcp")  # The token gives the access of the owner to every user that knows it.
                return None  # Also at the rate limit: clients that guess must not lock out one with the token.
            now = self._clock()
            if len(self._guesses) == BAD_TOKENS_PER_S and now - self._guesses[0] < 1:
                return problem("guessing", "wait a second", headers={"Retry-After": "1"})
            self._guesses.append(now)
        return problem(
            "token",
            "send the token of the runtime file as Authorization: Bearer; `vitalsd endpoints` says where it is",
            headers={"WWW-Authenticate": "Bearer"},
        )

    # Stop

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; if `close` cancels it, end the answer."""
        head: MutableMapping[str, Any] | None = None

        async def observed(message: MutableMapping[str, Any]) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            if self._closed:
                raise asyncio.CancelledError
            await self._app(scope, receive, observed)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            if head is None:
                refusal = problem("stopping", "the sidecar is being stopped", headers={"Connection": "close"})
                await refusal(scope, receive, send)
            elif not any(name == b"content-length" for name, _ in head["headers"]):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._running.discard(task)


def _cross_site(identifying: dict[bytes, list[bytes]], scope: Scope, host: str, *, guarded: bool) -> Response | None:
    """
    Return a refusal of a request that a page of another origin made the browser send (CSRF); None if it is allowed.

    ``same-site`` is refused, because another port of this machine is another origin. ``none`` is a typed address or a
    bookmark, but also a typed address of another site that redirects here, and a prefetch by the speculation rules of
    another site. So it may open `PAGES` only, and a prefetch is refused. If a token guards everything else (`guarded`),
    a page of another site may link to `PAGE`, which holds no data.
    """
    if b"sec-purpose" in identifying or b"purpose" in identifying:
        return problem("cross_site", "a browser fetches this in advance, perhaps for another site; open it instead")
    sites = identifying.get(b"sec-fetch-site", [])
    if sites not in ([], [b"same-origin"]):
        navigates = identifying.get(b"sec-fetch-mode") == [b"navigate"]
        typed = sites == [b"none"] and navigates and scope["path"] in PAGES
        led = (
            guarded
            and navigates
            and scope["method"] == "GET"
            and scope["path"] == PAGE
            and identifying.get(b"sec-fetch-dest") == [b"document"]
        )
        if not typed and not led:
            return problem(
                "cross_site",
                "a browser gets only / and /docs by an address that was typed, and nothing by a link of another site;"
                f" open http://{truncate_for_display(host)}/, or use curl",
            )
    if identifying.get(b"origin", []) not in ([], [f"http://{host}".encode("latin-1")]):
        return problem(
            "cross_site",
            f"the request comes from another web origin, and only http://{truncate_for_display(host)} may ask;"
            " ask from a program, or open this address yourself",
        )
    if scope["method"] == "OPTIONS" and b"access-control-request-method" in identifying:
        return problem("cross_site", "requests of other web origins are always refused")
    return None


def _made_relative(scope: Scope) -> str | None:
    """
    Replace an absolute request target, as clients of a proxy send it, by its path (RFC 9112 section 3.2.2).

    Returns:
        The host and port of the target; None: it was a path already.
    """
    raw_path: bytes = scope["raw_path"]
    found = ABSOLUTE.match(raw_path)
    if found is None:
        return None
    scope["raw_path"] = raw_path[found.end() :] or b"/"
    scope["path"] = unquote(scope["raw_path"].decode("ascii"))
    return found[1].decode("ascii").lower()


def _other_user(scope: Scope) -> Response | None:
    """Return a refusal if another user requests more than ps(1) and top(1) show to it."""
    peer = peer_of(scope)
    if peer.is_owner or (scope["method"] in READING and scope["path"] in VISIBLE_PATHS):
        return None
    user = "a user that is not known" if peer.uid is None else f"user {peer.uid}"
    return problem(
        "another_user",
        f"{user} may only read {', '.join(sorted(VISIBLE_PATHS))} here;"
        " the owner of the sidecar gives more access with --auth token and the token",
    )


def _loopback_hosts(address: str, port: int) -> tuple[str, ...]:
    """
    Return the values of ``Host`` that are allowed on a connection to a loopback address.

    For other addresses, to which other machines may connect, the result is empty.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    local = getattr(found, "ipv4_mapped", None) or found
    if not local.is_loopback:
        return ()
    names = (f"[{local}]" if local.version == 6 else str(local), "localhost")
    full = tuple(f"{name}:{port}" for name in names)
    return full + names if port == 80 else full


def _names_of_this_machine() -> frozenset[str]:
    """Return the names of this machine, in lower case, that may be in ``Host``."""
    full = socket.gethostname().lower()
    short = full.partition(".")[0]
    return frozenset(("localhost", full, short, f"{short}.local")) - {""}
