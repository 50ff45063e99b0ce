"""What every request must keep to: a bounded body, declared or not, and each parameter once."""

from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalsd.http.problem import problem

__all__ = ["Bounds"]


class Bounds:
    """
    Refuses a body of more than `max_body_bytes`, by its declared length before anything is read, else
    as soon as that much has arrived; and a parameter given twice, of which FastAPI would take the last.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        query: bytes = scope["query_string"]
        twice = _given_twice(query) if b"&" in query else None
        if twice is not None:
            await problem("bad_parameter", "given more than once", parameter=twice)(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared[:20]) > self.max_body_bytes:
            detail = f"a body here has at most {self.max_body_bytes} bytes"
            await problem("body_too_large", detail)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)


def _given_twice(query: bytes) -> str | None:
    seen: set[str] = set()
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name in seen:
            return name
        seen.add(name)
    return None
