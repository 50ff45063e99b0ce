"""Who may ask, and until when: the first thing a request passes."""

import asyncio
import hmac
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from vitalsd.http.problem import problem

__all__ = ["OPEN_PATHS", "Gate"]

OPEN_PATHS = frozenset(("/", "/docs", "/healthz"))
"""Say nothing but that the service is alive, and what its own code holds."""


class Gate:
    """
    Pure ASGI, around the application.

    - Over TCP a request must carry the token, if there is one. The Unix socket needs none: its mode
      lets only this user in.
    - `close` ends what is under way: an answer not yet begun becomes a 503, a stream ends.

    Args:
        app: the application.
        token: ``Authorization: Bearer`` value; ``None`` for no check.
    """

    def __init__(self, app: ASGIApp, *, token: str | None = None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False

    def close(self) -> None:
        """Answer everything now; to be called on the event loop."""
        self._closed = True
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._admits(scope):
            refusal = problem(
                "token",
                "send the token of the runtime file as Authorization: Bearer; `vitalsd endpoints` says where it is",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
            return
        await self._forward(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        if self._expected is None or scope["client"] is None or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
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
