"""Build the responses that routes share: uncached JSON, answers to HEAD, and the status of each error."""

from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from vitalsd.contract.encoding import unavailable
from vitalsd.contract.json_pieces import to_json
from vitalsd.sources import AccessDenied, KernelError, NoSuchProcess, SourceError, TargetGone, Unsupported

__all__ = ["JSON", "STATUS", "bare", "failed"]

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
        return content if isinstance(content, bytes) else to_json(content)


def bare(content_type: str = JSON.media_type) -> Response:
    """
    Return the answer to HEAD where GET would measure, read a file or build a report.

    It has the headers of GET except Content-Length: the body is not made, so its length is not known.
    """
    response = Response(headers={"Content-Type": content_type, "Cache-Control": "no-store"})
    del response.headers["Content-Length"]
    return response


def failed(error: SourceError, platform: str) -> JSON:
    """The `Unavailable` answer, with its status."""
    return JSON(unavailable(error, platform), STATUS[type(error)])
