"""What the routes share: JSON bytes nobody caches, and the statuses of the contract."""

import json
from typing import Any

from fastapi import Response

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


class JSON(Response):
    """JSON bytes that nobody caches."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":"))
        super().__init__(body, status_code, {"Cache-Control": "no-store"})


def failed(error: SourceError, platform: str) -> JSON:
    """The `Unavailable` answer, with its status."""
    return JSON(unavailable(error, platform), STATUS[type(error)])
