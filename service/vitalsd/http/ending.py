"""What those hear who wait for an answer when the service ends."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitalsd.http.answers import JSON
from vitalsd.wire import unavailable

__all__ = ["Ending"]


class Ending:
    """
    Answers a request that is cancelled with 503 and the reason.

    uvicorn cancels requests only at the end of its patience with them when it shuts down; it would
    log a traceback and send a bare 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if started:
                raise
            await JSON(unavailable("vitalsd is shutting down"), 503)(scope, receive, send)
