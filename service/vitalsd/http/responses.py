"""
Make refusals as ``application/problem+json`` (RFC 9457): one shape, a closed set of reasons, under 1 KiB.

A failed measurement is no refusal: it is the `Unavailable` variant of the contract.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NotRequired

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route
from typing_extensions import TypedDict

from vitalsd.admission import BusyError
from vitalsd.contract.encoding import unavailable
from vitalsd.contract.json_pieces import to_json
from vitalsd.contract.limits import DETAIL_CHARACTERS
from vitalsd.contract.shapes import Doc
from vitalsd.recording.recorder import NotRecordingError
from vitalsd.sources.base import (
    AccessDeniedError,
    KernelError,
    NoSuchProcessError,
    SourceError,
    TargetGoneError,
    UnsupportedError,
)
from vitalsd.worker_thread import HungError, NoThreadError

__all__ = [
    "JSON",
    "MEDIA_TYPE",
    "STATUS",
    "TITLES",
    "ProblemError",
    "ProblemJson",
    "Reason",
    "bare",
    "did_you_mean",
    "failed",
    "install_problem_handlers",
    "problem",
    "truncate_for_display",
]

MEDIA_TYPE = "application/problem+json"

Reason = Literal[
    "bad_parameter",
    "bad_body",
    "body_too_large",
    "target_too_long",
    "head_too_large",
    "bad_request",
    "no_host",
    "misdirected",
    "cross_site",
    "another_user",
    "too_slow",
    "no_such_route",
    "no_such_run",
    "no_report",
    "unreadable_run",
    "not_recording",
    "too_many",
    "no_signals",
    "not_acceptable",
    "method_not_allowed",
    "busy",
    "token",
    "guessing",
    "full",
    "unread",
    "stopping",
    "hung",
    "no_thread",
    "internal",
]

TITLES: dict[Reason, tuple[int, str]] = {
    "bad_parameter": (422, "A parameter is wrong"),
    "bad_body": (422, "The body is wrong"),
    "body_too_large": (413, "The body is too large"),
    "target_too_long": (414, "The path or the query is too long"),
    "head_too_large": (431, "The head of the request is too large"),
    "bad_request": (400, "The request is not valid HTTP"),
    "no_host": (400, "The request does not have exactly one Host header"),
    "misdirected": (421, "The request is for another server"),
    "cross_site": (403, "Requests of other web origins are refused"),
    "another_user": (403, "Requests of other users are refused"),
    "too_slow": (408, "The request took too long to arrive"),
    "no_such_route": (404, "There is no such route"),
    "no_such_run": (404, "There is no such run"),
    "no_report": (409, "There is no report"),
    "unreadable_run": (503, "The file of this run is damaged"),
    "not_recording": (409, "Nothing is being recorded"),
    "too_many": (409, "There are too many heartbeats or gauges"),
    "no_signals": (503, "There is no shared memory for heartbeats and gauges"),
    "not_acceptable": (406, "None of the requested media types is available"),
    "method_not_allowed": (405, "This route does not take that method"),
    "busy": (429, "Too many requests at once"),
    "token": (401, "A token is needed"),
    "guessing": (429, "Too many wrong tokens"),
    "full": (503, "Too many connections"),
    "unread": (503, "Too many bytes of answers wait for their clients"),
    "stopping": (503, "The sidecar is being stopped"),
    "hung": (503, "A read or a write hangs"),
    "no_thread": (503, "The system gives no more threads"),
    "internal": (500, "A bug in vitalsd"),
}


class ProblemJson(TypedDict):
    """A refusal (RFC 9457)."""

    title: Annotated[str, Doc("Meaning of `reason`, as text.")]
    status: Annotated[int, Doc("The HTTP status.")]
    reason: Annotated[Reason, Doc("One of a closed set, for programs.")]
    detail: Annotated[str, Doc("What is wrong, and what the sidecar accepts.")]
    parameter: NotRequired[Annotated[str | None, Doc("The query parameter, or the field of the body, that is wrong.")]]


class ProblemError(Exception):
    """Report the refusal of a request; raised by a route or a function it calls, and answered as a problem."""

    def __init__(self, reason: Reason, detail: str, parameter: str | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.parameter = reason, detail, parameter


def problem(
    reason: Reason, detail: str, *, parameter: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Return one refusal; `detail` and `parameter` may contain text of the client, and are truncated."""
    status, title = TITLES[reason]
    body: ProblemJson = {"title": title, "status": status, "reason": reason, "detail": detail[:DETAIL_CHARACTERS]}
    if parameter is not None:
        body["parameter"] = truncate_for_display(parameter)
    return Response(json.dumps(body), status, media_type=MEDIA_TYPE, headers=headers)


def truncate_for_display(text: object, length: int = 32) -> str:
    """Return text of a client, escaped and truncated to `length` characters, for use in a refusal."""
    whole = str(text)
    return ascii(whole[:length])[1:-1] + ("..." if len(whole) > length else "")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ``did you mean X? `` for a misspelt name; empty if none of `known` is similar."""
    from difflib import get_close_matches

    found = get_close_matches(given[:64].lower(), list(known), 1)
    return f"did you mean {found[0]}? " if found else ""


def install_problem_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every exception of `app` with a problem; `routes` are all its routes."""
    served = [route for route in routes if isinstance(route, Route)]
    paths = sorted({route.path for route in served})

    @app.exception_handler(ProblemError)
    async def refuse(_: Request, error: ProblemError) -> Response:
        return problem(error.reason, error.detail, parameter=error.parameter)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            path = request.scope["path"]
            methods = {method for route in served if route.path_regex.match(path) for method in route.methods or ()}
            allowed = ", ".join(sorted(methods))
            return problem("method_not_allowed", f"use {allowed}", headers={"Allow": allowed})
        path = request.scope["path"]
        there = f"{did_you_mean(path, paths)}there are: {', '.join(paths)}"
        return problem("no_such_route", f"{truncate_for_display(path)} is not served here; {there}")

    @app.exception_handler(ClientDisconnect)
    async def hung_up(_: Request, error: ClientDisconnect) -> Response:
        return problem("bad_request", "the connection was closed before the body was whole")

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        return problem("busy", str(error), headers={"Retry-After": "1"})

    @app.exception_handler(HungError)
    async def hung(_: Request, error: HungError) -> Response:
        return problem("hung", str(error))

    @app.exception_handler(NoThreadError)
    async def no_thread(_: Request, error: NoThreadError) -> Response:
        return problem("no_thread", str(error), headers={"Retry-After": "1"})

    @app.exception_handler(NotRecordingError)
    async def not_recording(_: Request, error: NotRecordingError) -> Response:
        return problem("not_recording", str(error))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return problem("internal", f"{type(error).__name__}; the log has the rest")


STATUS: dict[type[SourceError], int] = {
    AccessDeniedError: 403,
    NoSuchProcessError: 404,
    TargetGoneError: 410,
    UnsupportedError: 501,
    KernelError: 503,
}


class JSON(JSONResponse):
    """Answer with JSON, from a value or from encoded bytes, with ``Cache-Control: no-store``."""

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, {"Cache-Control": "no-store"})

    def render(self, content: Any) -> bytes:
        """Return the body: bytes as they are, any other value encoded as JSON."""
        return content if isinstance(content, bytes) else to_json(content)


def bare(content_type: str = JSON.media_type) -> Response:
    """
    Return the answer to HEAD for a route that at GET measures, reads a file or builds a report.

    It has the headers of GET except Content-Length, because the body is not made.
    """
    response = Response(headers={"Content-Type": content_type, "Cache-Control": "no-store"})
    del response.headers["Content-Length"]
    return response


def failed(error: SourceError, platform: str) -> JSON:
    """Return the `Unavailable` answer, with its status."""
    return JSON(unavailable(error, platform), STATUS[type(error)])
