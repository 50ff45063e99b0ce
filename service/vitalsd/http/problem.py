"""
Refusals as ``application/problem+json`` (RFC 9457): one shape, a closed set of reasons, under 1 KiB.

A sampling failure is not one of these: it is the `Unavailable` variant of the contract.
"""

import json
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from vitalsd.sampler import Busy

__all__ = ["MEDIA_TYPE", "Problem", "install", "problem"]

MEDIA_TYPE = "application/problem+json"

Reason = Literal["bad_parameter", "no_such_route", "method_not_allowed", "busy", "internal"]

TITLES: dict[Reason, tuple[int, str]] = {
    "bad_parameter": (422, "A parameter is wrong"),
    "no_such_route": (404, "There is no such route"),
    "method_not_allowed": (405, "This route does not take that method"),
    "busy": (429, "Too much at once"),
    "internal": (500, "A bug in vitalsd"),
}


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
        body["parameter"] = _shown(parameter)
    return Response(json.dumps(body), status, media_type=MEDIA_TYPE, headers=headers)


def _shown(text: object) -> str:
    """What a stranger sent, harmless and short enough to repeat."""
    shown = str(text)
    return ascii(shown[:32])[1:-1] + ("..." if len(shown) > 32 else "")


def install(app: FastAPI) -> None:
    """Make every refusal of `app` a problem."""
    routes = ", ".join(sorted(path for route in app.routes if (path := getattr(route, "path", None))))

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(_parameters(request)) or "none"
            return problem("bad_parameter", f"unknown parameter; this route takes: {known}", parameter=name)
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        given = f"; got '{_shown(first['input'])}'" if isinstance(first.get("input"), str) else ""
        return problem("bad_parameter", f"{message[:1].lower()}{message[1:]}{given}", parameter=name)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "GET")
            return problem("method_not_allowed", f"use {allowed}", headers={"Allow": allowed})
        path = _shown(request.scope["path"])
        return problem("no_such_route", f"{path} is not served here; there are: {routes}")

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        return problem("busy", str(error), headers={"Retry-After": "1"})

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
