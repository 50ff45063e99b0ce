"""
Routes that describe the API: ``/openapi.json`` for programs, and ``/docs``, the same as a page without a script.

Both are made when first asked for. The page works offline, and its policy lets in nothing but its own style.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute

from vitalsd.http.page import policy
from vitalsd.http.parameters import READING, NoQuery, StrictRoute, given
from vitalsd.http.responses import JSON
from vitalsd.worker_thread import Worker

__all__ = ["docs_routes"]


def docs_routes(routers: Sequence[APIRouter], reader: Worker) -> APIRouter:
    """The routes that describe those of `routers`, and themselves; the schema is made on `reader`."""
    routes = APIRouter(route_class=StrictRoute)

    @cache
    def schema() -> dict[str, Any]:
        from vitalsd.http.openapi import openapi

        return openapi([route for each in (*routers, routes) for route in each.routes if isinstance(route, APIRoute)])

    @cache
    def as_json() -> bytes:
        return json.dumps(schema(), separators=(",", ":")).encode()

    @cache
    def as_page() -> tuple[str, dict[str, str]]:
        return _page(schema())

    @routes.api_route("/openapi.json", methods=READING, summary="The schema of all routes")
    async def openapi_json(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        return JSON(await reader.result(as_json))

    @routes.api_route("/docs", methods=READING, summary="This reference, as a page")
    async def docs(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        page, headers = await reader.result(as_page)
        return HTMLResponse(page, headers=headers)

    return routes


def _page(schema: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the reference as a page, and its policy."""
    from importlib.resources import files

    from vitalsd.http.reference import html, markdown

    text = f"{schema['info']['description']} In the commands `$URL` is this server.\n\n{markdown(schema)}"
    folder = files("vitalsd.http.page")
    style, frame = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "docs.html"))
    page = frame.replace("/*STYLE*/", style).replace("<!--CONTENT-->", html(text))
    return page, {"Content-Security-Policy": policy(style=style, more="img-src data:")}
