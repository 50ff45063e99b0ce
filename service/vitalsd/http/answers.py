"""What the routes share: JSON bytes nobody caches, and the statuses of the contract."""

import json
from typing import Any

from fastapi.responses import JSONResponse

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


class JSON(JSONResponse):
    """JSON, of a value or ready as bytes, that nobody caches."""

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, {"Cache-Control": "no-store"})

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":")).encode()


def failed(error: SourceError) -> JSON:
    """The `Unavailable` answer, with its status."""
    return JSON(unavailable(error), STATUS[type(error)])
