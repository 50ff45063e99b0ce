"""What the routes share: JSON bytes nobody caches, and the statuses of the contract."""

import json
from typing import Any

from fastapi.responses import JSONResponse

from vitalsd.sources import AccessDenied, KernelError, NoSuchProcess, SourceError, TargetGone, Unsupported
from vitalsd.wire import unavailable

__all__ = ["JSON", "STATUS", "failed"]

STATUS: dict[type[SourceError], int] = {
    AccessDenied: 403,
    NoSuchProcess: 404,
    TargetGone: 410,
    Unsupported: 501,
    KernelError: 503,
}


class JSON(JSONResponse):
    """JSON, of a value or ready as bytes, that nobody caches."""

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, {"Cache-Control": "no-store"})

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":")).encode()


def failed(error: SourceError, platform: str) -> JSON:
    """The `Unavailable` answer, with its status."""
    return JSON(unavailable(error, platform), STATUS[type(error)])
