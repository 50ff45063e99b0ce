"""
Refusals as ``application/problem+json`` (RFC 9457): one shape, a closed set of reasons, under 1 KiB.

A sampling failure is not one of these: it is the `Unavailable` variant of the contract.
"""

import json
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from vitalsd.sampler import Busy, NotRecording

__all__ = ["MEDIA_TYPE", "Problem", "install", "problem", "shown"]

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
    "unreadable_run",
    "not_recording",
    "not_acceptable",
    "method_not_allowed",
    "busy",
    "token",
    "full",
    "stopping",
    "internal",
]

TITLES: dict[Reason, tuple[int, str]] = {
    "bad_parameter": (422, "A parameter is wrong"),
    "bad_body": (422, "The body is wrong"),
    "body_too_large": (413, "The body is too large"),
    "target_too_long": (414, "The path or the query is too long"),
    "head_too_large": (431, "The head of the request is too large"),
    "bad_request": (400, "This is no HTTP request"),
    "no_host": (400, "There is not one Host header"),
    "misdirected": (421, "This is another server"),
    "cross_site": (403, "Other sites are not let in"),
    "another_user": (403, "Another user is not let in"),
    "too_slow": (408, "The request took too long to arrive"),
    "no_such_route": (404, "There is no such route"),
    "no_such_run": (404, "There is no such run"),
    "unreadable_run": (503, "The file of this run is damaged"),
    "not_recording": (409, "Nothing is being recorded"),
    "not_acceptable": (406, "None of the forms asked for is had here"),
    "method_not_allowed": (405, "This route does not take that method"),
    "busy": (429, "Too much at once"),
    "token": (401, "A token is needed"),
    "full": (503, "Too many connections"),
    "stopping": (503, "The sidecar is being stopped"),
    "internal": (500, "A bug in vitalsd"),
}


PROBLEM = {"schema": {"$ref": "#/components/schemas/Problem"}}


class Problem(BaseModel):
    """A refusal."""

    title: str
    status: int
    reason: Reason
    detail: Annotated[str, Field(description="What is wrong and what would be right.")]
    parameter: Annotated[str | None, Field(description="The query parameter that is wrong.")] = None


def problem(
    reason: Reason, detail: str, *, parameter: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """One refusal; `detail` and `parameter` may hold anything a stranger sent and are cut short."""
    status, title = TITLES[reason]
    body = {"title": title, "status": status, "reason": reason, "detail": detail[:400]}
    if parameter is not None:
        body["parameter"] = shown(parameter)
    return Response(json.dumps(body), status, media_type=MEDIA_TYPE, headers=headers)


def shown(text: object, length: int = 32) -> str:
    """What a stranger sent, harmless and short enough to repeat."""
    whole = str(text)
    return ascii(whole[:length])[1:-1] + ("..." if len(whole) > length else "")


def install(app: FastAPI) -> None:
    """Make every refusal of `app` a problem."""
    routes = ", ".join(sorted(path for route in app.routes if (path := getattr(route, "path", None))))

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["loc"][:1] == ("body",):
            where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
            return problem("bad_body", f"{first['msg']}; send a JSON object", parameter=where or None)
        name = str(first["loc"][-1]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(_parameters(request)) or "none"
            return problem("bad_parameter", f"unknown parameter; this route takes: {known}", parameter=name)
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        given = f"; got '{shown(first['input'])}'" if isinstance(first.get("input"), str) else ""
        return problem("bad_parameter", f"{message[:1].lower()}{message[1:]}{given}", parameter=name)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "GET")
            return problem("method_not_allowed", f"use {allowed}", headers={"Allow": allowed})
        if error.status_code == 413:
            return problem("body_too_large", "a body here has at most 4 KiB")
        path = shown(request.scope["path"])
        return problem("no_such_route", f"{path} is not served here; there are: {routes}")

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        return problem("busy", str(error), headers={"Retry-After": "1"})

    @app.exception_handler(NotRecording)
    async def not_recording(_: Request, error: NotRecording) -> Response:
        return problem("not_recording", str(error))

    made = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's schema, with refusals as what they are, and with those that come before any route."""
        schema = made()
        early = {"description": "Refused before the route was looked for.", "content": {MEDIA_TYPE: PROBLEM}}
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].setdefault("default", early)
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if content.get("application/json", {}) == PROBLEM:
                        content[MEDIA_TYPE] = content.pop("application/json")
        return schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return problem("internal", f"{type(error).__name__}; the log has the rest")


def _parameters(request: Request) -> list[str]:
    route = request.scope.get("route")
    return [
        name
        for field in getattr(getattr(route, "dependant", None), "query_params", ())
        for name in field.field_info.annotation.model_fields
    ]
