"""
``GET /openapi.json``, and ``GET /docs``: the same for people, in a page without a script.

Both are made when first asked for. The page is markup written here and not a bundle of somebody's: it
works offline, under a policy that lets nothing in but its style, and it is small.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute

from vitalsd.http.page import policy
from vitalsd.http.parameters import READING, NoQuery, StrictRoute, given
from vitalsd.http.responses import JSON
from vitalsd.worker_thread import Worker

__all__ = ["answers_of", "docs_routes", "example_of", "refusals", "type_text"]


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
        from importlib.resources import files

        folder = files("vitalsd.http.page")
        style, html = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "docs.html"))
        page = html.replace("/*STYLE*/", style).replace("<!--CONTENT-->", content(schema()))
        return page, {"Content-Security-Policy": policy(style=style, more="img-src data:")}

    @routes.api_route("/openapi.json", methods=READING, summary="The schema of all routes")
    async def openapi_json(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        return JSON(await reader.result(as_json))

    @routes.api_route("/docs", methods=READING, summary="This reference, as a page")
    async def docs(query: Annotated[NoQuery, given(NoQuery)]) -> Response:
        page, headers = await reader.result(as_page)
        return HTMLResponse(page, headers=headers)

    return routes


def content(schema: dict[str, Any]) -> str:
    """The schema as markup."""
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    index = "".join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name, _ in operations)
    sections = "".join(_operation(name, operation, schema) for name, operation in operations)
    everywhere = "".join(
        f"<tr><th scope=row>{status}</th><td><code>{reason}</code></td><td>{escape(title)}.</td></tr>"
        for reason, status, title in refusals(schema)
    )
    refused = _table("", ("Status", "Reason", "Meaning"), everywhere).replace("<h3></h3>", "")
    shapes = "".join(_shape(name, shape) for name, shape in schema["components"]["schemas"].items())
    return (
        f"<p>{_prose(schema['info']['description'])} In the commands <code>$URL</code> is this server.</p>"
        f'<ul class="index">{index}</ul>{sections}'
        f'<section><h2 id="refusals">Refusals that any request may meet</h2>{refused}</section>'
        f'<section><h2 id="shapes">Shapes</h2>{shapes}</section>'
    )


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _prose(text: str) -> str:
    """Text with `code` in it."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _operation(name: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row><code>{escape(each['name'])}</code></th><td>{_type(each['schema'])}</td>"
        f"<td>{_prose(each['description'])}</td></tr>"
        for each in operation["parameters"]
    )
    parameters = _table("Parameters", ("Name", "Type", "Meaning"), rows) if rows else ""
    body = operation.get("requestBody")
    if body:
        parameters += _shape("Body", body["content"]["application/json"]["schema"], f"{_anchor(name)}-body")
    answers = "".join(
        f"<tr><th scope=row>{status}</th><td>{_prose(text)}</td><td>{_content(content)}</td></tr>"
        for status, text, content in answers_of(operation, schema["x-anywhere"])
    )
    samples = "".join(
        f"<h3>{escape(sample['label'])}</h3><pre tabindex=0><code>{escape(sample['source'])}</code></pre>"
        for sample in operation["x-codeSamples"]
    )
    example = example_of(operation)
    shown = (
        "" if example is None else f"<h3>An answer</h3><pre tabindex=0><code>{escape(_pretty(example))}</code></pre>"
    )
    return (
        f'<section><h2 id="{_anchor(name)}">{escape(name)}</h2><p><strong>{escape(operation["summary"])}.</strong>'
        f" {_prose(operation['description'])}</p>{parameters}"
        f"{_table('Answers', ('Status', 'Meaning', 'Content'), answers)}{samples}{shown}</section>"
    )


def _pretty(example: Any) -> str:
    return example if isinstance(example, str) else json.dumps(example, indent=2)


def _table(title: str, heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th scope=col>{each}</th>" for each in heads)
    return f"<h3>{title}</h3><div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _content(content: dict[str, Any]) -> str:
    return "<br>".join(
        f"<code>{escape(media_type)}</code> {_type(each['schema'])}" for media_type, each in content.items()
    )


def _type(schema: dict[str, Any]) -> str:
    def link(name: str) -> str:
        return f'<a href="#{name}">{name}</a>'

    return type_text(schema, link, lambda text: f"<code>{escape(text)}</code>")


def _shape(name: str, shape: dict[str, Any], anchor: str | None = None) -> str:
    required = shape.get("required", ())
    rows = "".join(
        f"<tr><th scope=row><code>{escape(field)}</code></th><td>{_type(each)}</td>"
        f"<td>{_prose(each.get('description', ''))}{'' if field in required else ' May be missing.'}</td></tr>"
        for field, each in shape.get("properties", {}).items()
    )
    about = f"<p>{_prose(shape['description'].replace('``', '`'))}</p>" if "description" in shape else ""
    head = f'<h3 id="{anchor or name}">{escape(name)}</h3>'
    return f"{head}{about}{_table('', ('Field', 'Type', 'Meaning'), rows).replace('<h3></h3>', '')}"


# What both this page and docs/api.md say


def answers_of(operation: dict[str, Any], anywhere: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Status, meaning and content of each answer of an operation, but for the refusals that any request may meet."""
    rows = []
    for status, answer in operation["responses"].items():
        text, content = answer["description"], dict(answer["content"])
        refused = content.pop("application/problem+json", None)
        for reason, example in (refused or {}).get("examples", {}).items():
            if reason in anywhere:
                text = text.replace(f"`{reason}`: {example['value']['title']}.", "").strip()
            else:
                content["application/problem+json"] = refused
        if content:
            rows.append((status, text, content))
    return rows


def refusals(schema: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Reason, status and meaning of the refusals that any request may meet."""
    found = {
        reason: (reason, example["value"]["status"], example["value"]["title"])
        for methods in schema["paths"].values()
        for operation in methods.values()
        for answer in operation["responses"].values()
        for reason, example in answer["content"].get("application/problem+json", {}).get("examples", {}).items()
        if reason in schema["x-anywhere"]
    }
    return sorted(found.values(), key=lambda each: each[1])


def example_of(operation: dict[str, Any]) -> Any:
    """The first example of a good answer; ``None`` if there is none."""
    return next(
        (
            each["example"]
            for status, answer in operation["responses"].items()
            if status.startswith("2")
            for each in answer["content"].values()
            if "example" in each
        ),
        None,
    )


def type_text(schema: dict[str, Any], link: Callable[[str], str], code: Callable[[str], str]) -> str:
    """A type in words; `link` leads to a shape, `code` shows a value."""
    if "$ref" in schema:
        return link(schema["$ref"].rsplit("/", 1)[1])
    if "anyOf" in schema:
        return " or ".join(type_text(each, link, code) for each in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {type_text(schema.get('items', {}), link, code)}"
    if "enum" in schema or "const" in schema:
        text = " or ".join(code(str(each)) for each in schema.get("enum", [schema.get("const")]))
    else:
        text = str(schema.get("type", ""))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        text += f", {low} to {high}"
    if "default" in schema:
        default = schema["default"]
        text += f"; {code(default if isinstance(default, str) else json.dumps(default))} if not given"
    return text
