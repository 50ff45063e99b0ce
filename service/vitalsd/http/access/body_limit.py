"""Limit the size of request bodies, with or without a declared length."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalsd.http.responses import ProblemError, problem

__all__ = ["BodyLimit"]


class BodyLimit:
    """
    Refuse a body that is too large: by its declared length before it is read, else when too many bytes have arrived.

    Args:
        app: the application.
        max_body_bytes: limit of a body, bytes.
        larger: limits of the paths with larger bodies, bytes.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, larger: Mapping[str, int]) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it to the application with a body that is counted as it is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.larger.get(scope["path"], self.max_body_bytes)
        too_large = f"a body here has at most {limit} bytes"
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared[:20]) > limit:
            await problem("body_too_large", too_large)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise ProblemError("body_too_large", too_large)
            return message

        await self.app(scope, counted, send)
