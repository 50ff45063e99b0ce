"""``GET /hello?nonce=``: the sidecar proves that it is one before a client sends it the token."""

import re
from urllib.parse import parse_qsl

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vitalsd.discovery.runtime_file import proof
from vitalsd.http.parameters import READING
from vitalsd.http.responses import JSON, problem

__all__ = ["Hello"]

NONCE = re.compile(r"[0-9A-Za-z_-]{16,128}", re.ASCII)


class Hello:
    """
    Pure ASGI, at a path that `Gate` keeps open: whoever asks does not send the token yet.

    Args:
        app: answers everything else.
        token: the secret to prove; without one there is nothing to prove, and the route does not exist.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/hello" and self._token is not None:
            await self._answer(self._token, scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @staticmethod
    def _answer(token: str, scope: Scope) -> Response:
        if scope["method"] not in READING:
            allowed = ", ".join(READING)
            return problem("method_not_allowed", f"use {allowed}", headers={"Allow": allowed})
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if [name for name, _ in pairs] != ["nonce"] or not NONCE.fullmatch(pairs[0][1]):
            return problem(
                "bad_parameter", "nonce must be 16 to 128 of the characters 0-9 A-Z a-z _ -", parameter="nonce"
            )
        # On a Unix socket there is no port, and its mode is proof enough.
        _, port = scope["server"] or (None, None)
        return JSON({"app": "vitalsd", "proof": proof(token, pairs[0][1], port or 0)})
