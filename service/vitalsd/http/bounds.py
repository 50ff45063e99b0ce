"""What every request must keep to: a bounded body, declared or not."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalsd.http.problem import Refused, problem

__all__ = ["Bounds"]


class Bounds:
    """
    Refuses a body of more than `max_body_bytes`, by its declared length before anything is read, else
    as soon as that much has arrived.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = f"a body here has at most {self.max_body_bytes} bytes"
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared[:20]) > self.max_body_bytes:
            await problem("body_too_large", too_large)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise Refused("body_too_large", too_large)
            return message

        await self.app(scope, counted, send)
