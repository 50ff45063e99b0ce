"""
Answer ``/openapi.json``, the description of the API for programs, and ``/docs``, the same as a page without a script.

The first request makes each of them. The page works offline, and its content security policy allows only its style.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

from fastapi import Response
from fastapi.responses import HTMLResponse

from vitalsd.http.access.token_proof import HELLO
from vitalsd.http.operation import CommandExample, Operation, OperationRoute
from vitalsd.http.page import policy
from vitalsd.http.parameters import NoQuery, query_params
from vitalsd.http.responses import JSON
from vitalsd.http.routes.context import RouteContext

__all__ = ["reference_routes"]

DOCS = Operation(
    path="/docs",
    summary="This reference, as a page",
    description="The page has no script, and loads nothing from other servers.",
    answer="The page.",
    media_types={"text/html": ""},
)
OPENAPI = Operation(
    path="/openapi.json",
    summary="The schema of all routes",
    description="For code generators and for `/docs`.",
    answer="OpenAPI 3.1.",
    media_types={"application/json": ""},
    commands=(CommandExample("Every route", "curl -s \"$URL/openapi.json\" | jq -r '.paths | keys[]'"),),
)


def reference_routes(context: RouteContext, others: Sequence[OperationRoute]) -> list[OperationRoute]:
    """Return the routes that describe `others`, and themselves."""
    reference = _Reference(context)
    routes = [OperationRoute(DOCS, reference.page), OperationRoute(OPENAPI, reference.document)]
    reference.routes = [*others, *routes]
    return routes


class _Reference:
    """Answer ``/docs`` and ``/openapi.json``."""

    def __init__(self, context: RouteContext) -> None:
        self._reader = context.reader
        self.routes: Sequence[OperationRoute] = ()
        """All routes of the application."""

    async def document(self, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        return JSON(await self._reader.run_unbounded(lambda: self._json))

    async def page(self, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        page, headers = await self._reader.run_unbounded(lambda: self._page)
        return HTMLResponse(page, headers=headers)

    @cached_property
    def _schema(self) -> dict[str, Any]:
        from vitalsd.http.openapi import openapi

        return openapi(self.routes, (HELLO,))

    @cached_property
    def _json(self) -> bytes:
        return json.dumps(self._schema, separators=(",", ":")).encode()

    @cached_property
    def _page(self) -> tuple[str, dict[str, str]]:
        """Return the reference as a page, and the headers with its content security policy."""
        from importlib.resources import files

        from vitalsd.http.reference import html, markdown

        schema, folder = self._schema, files("vitalsd.http.page")
        text = f"{schema['info']['description']} In the commands `$URL` is this server.\n\n{markdown(schema)}"
        style, frame = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "docs.html"))
        page = frame.replace("/*STYLE*/", style).replace("<!--CONTENT-->", html(text))
        return page, {"Content-Security-Policy": policy(style=style, more="img-src data:")}
