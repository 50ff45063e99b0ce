"""What the routes share: JSON bytes nobody caches, and the statuses of the contract."""

import json
from typing import Any

from fastapi import Response

from vitalsd.http import problem
from vitalsd.model import Unavailable
from vitalsd.sources import AccessDenied, KernelError, NoSuchProcess, SourceError, TargetGone, Unsupported
from vitalsd.wire import unavailable

__all__ = ["JSON", "REFUSALS", "UNAVAILABLE", "failed"]

STATUS: dict[type[SourceError], int] = {
    AccessDenied: 403,
    NoSuchProcess: 404,
    TargetGone: 410,
    Unsupported: 501,
    KernelError: 503,
}

REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": problem.Problem, "description": "A parameter is wrong."},
    429: {"model": problem.Problem, "description": "Too much at once."},
}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    403: {"model": Unavailable, "description": "This user may not read the target."},
    404: {"model": Unavailable, "description": "No such process."},
    410: {"model": Unavailable, "description": "The target has exited."},
    501: {"model": Unavailable, "description": "Not on this platform."},
    503: {"model": Unavailable, "description": "The kernel refused, or the target does not answer."},
}


class JSON(Response):
    """JSON bytes that nobody caches."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":"))
        super().__init__(body, status_code, {"Cache-Control": "no-store"})


def failed(error: SourceError) -> JSON:
    """The `Unavailable` answer, with its status."""
    return JSON(unavailable(error), STATUS[type(error)])
