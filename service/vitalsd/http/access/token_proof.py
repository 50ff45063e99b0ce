"""Answer ``GET /hello?nonce=``: prove to a client that this is its sidecar, before it sends the token."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import TypedDict

from vitalsd.contract.shapes import Doc
from vitalsd.discovery.runtime_file import proof
from vitalsd.http.operation import Operation
from vitalsd.http.parameters import READING
from vitalsd.http.responses import JSON, problem

__all__ = ["HELLO", "TokenProof"]

NONCE = re.compile(r"[0-9A-Za-z_-]{16,128}", re.ASCII)
"""Number used once, chosen by the client: it prevents the replay of an earlier proof."""


class HelloJson(TypedDict):
    """The proof that this sidecar knows the token of its runtime file."""

    app: Literal["vitalsd"]
    proof: Annotated[str, Doc("HMAC-SHA256 with the token over nonce and port, hexadecimal.")]


NONCE_PARAMETER: dict[str, Any] = {
    "name": "nonce",
    "in": "query",
    "required": True,
    "description": "Random value of the client, new for each request.",
    "schema": {"type": "string", "pattern": f"^{NONCE.pattern}$"},
    "example": "0123456789abcdef",
}
HELLO = Operation(
    path="/hello",
    summary="Prove that this is the sidecar of the runtime file",
    description="Exists only with `--auth token`. A client requests it before it sends the token, because another user"
    " may have taken the port of a sidecar that has died.",
    answer="The proof.",
    reasons=("no_such_route",),
    parameters=(NONCE_PARAMETER,),
    shapes=(HelloJson,),
    example={"app": "vitalsd", "proof": "5f" * 32},
)


class TokenProof:
    """
    Answer ``/hello`` in ASGI middleware; `AccessControl` asks for no token there, the client has not sent it yet.

    Args:
        app: the application, for all other paths.
        token: the secret to prove; ``None``: the route does not exist.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer ``/hello``, or pass the request to the application."""
        if scope["type"] == "http" and scope["path"] == "/hello" and self._token is not None:
            await self._answer(self._token, scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @staticmethod
    def _answer(token: str, scope: Scope) -> Response:
        """Return the proof for the nonce of a request, or the refusal of the request."""
        if scope["method"] not in READING:
            allowed = ", ".join(READING)
            return problem("method_not_allowed", f"use {allowed}", headers={"Allow": allowed})
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if [name for name, _ in pairs] != ["nonce"] or not NONCE.fullmatch(pairs[0][1]):
            return problem(
                "bad_parameter", "nonce must be 16 to 128 of the characters 0-9 A-Z a-z _ -", parameter="nonce"
            )
        # A Unix socket has no port; its mode already proves that it is of this user.
        _, port = scope["server"] or (None, None)
        return JSON(HelloJson(app="vitalsd", proof=proof(token, pairs[0][1], port or 0)))
