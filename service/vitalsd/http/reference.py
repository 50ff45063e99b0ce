"""Make the reference of the API from the OpenAPI document: Markdown for ``docs/api.md``, HTML for ``GET /docs``."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

__all__ = ["html", "markdown"]


def markdown(schema: dict[str, Any]) -> str:
    """Return a section for each route, the refusals that any request may meet, and the shapes of answers."""
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    parts = [f"- [{name}](#{_anchor(name)})\n" for name, _ in operations]
    parts.append("- [Refusals that any request may meet](#refusals-that-any-request-may-meet)\n- [Shapes](#shapes)\n")
    parts += [_operation(name, operation, schema["x-common-problems"]) for name, operation in operations]
    parts.append("\n## Refusals that any request may meet\n\nEach is a [Problem](#problem), under 1 KiB.\n\n")
    parts.append(_table(("Status", "Reason", "Meaning"), _common_refusals(schema)))
    parts.append("\n## Shapes\n")
    for name, shape in schema["components"]["schemas"].items():
        parts.append(f"\n### {name}\n\n{shape.get('description', '').replace('``', '`')}\n\n{_fields(shape)}")
    return "".join(parts)


def html(text: str) -> str:
    """Return Markdown as HTML; its headings have the anchors of the links that `markdown` writes."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(text)
    for heading, content in pairwise(tokens):
        if heading.type == "heading_open":
            heading.attrSet("id", _anchor(content.content))
    made: str = parser.renderer.render(tokens, parser.options, {})
    return made


def _operation(name: str, operation: dict[str, Any], common: Sequence[str]) -> str:
    """Return the section of one operation; `name` is its heading."""
    parts = [f"\n## {name}\n\n**{operation['summary']}.** {operation['description']}\n\n### Parameters of {name}\n\n"]
    rows = [
        (f"`{each['name']}`", _type(each["schema"]), each["description"], f"`{each['example']}`")
        for each in operation["parameters"]
    ]
    parts.append(_table(("Name", "Type", "Meaning", "Example"), rows) if rows else "None.\n")
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        fields = (
            _fields(body)
            if "properties" in body
            else f"An object of values by name: {_type(next(iter(body['patternProperties'].values())))}.\n"
        )
        parts.append(f"\nThe body:\n\n{fields}")
    parts.append(f"\n### Answers of {name}\n\n")
    parts.append(_table(("Status", "Meaning", "Content"), _answers(operation, common)))
    if operation["x-codeSamples"]:
        parts.append(f"\n### Commands for {name}\n")
        for sample in operation["x-codeSamples"]:
            parts.append(f"\n{sample['label']}:\n\n```sh\n{sample['source']}\n```\n")
    if (example := _example(operation)) is not None:
        shown = example if isinstance(example, str) else json.dumps(example, indent=2)
        parts.append(f"\n### An answer of {name}\n\n```\n{shown.rstrip()}\n```\n")
    return "".join(parts)


def _answers(operation: dict[str, Any], common: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return status, meaning and content of each answer, without the refusals that any request may meet."""
    rows = []
    for status, answer in operation["responses"].items():
        text, content = answer["description"], dict(answer.get("content", {}))
        refused = content.pop("application/problem+json", None)
        for reason, example in (refused or {}).get("examples", {}).items():
            if reason in common:
                text = text.replace(f"`{reason}`: {example['value']['title']}.", "").strip()
            else:
                content["application/problem+json"] = refused
        if content or status.startswith("2"):
            kinds = "<br>".join(f"`{kind}` {_type(each['schema'])}" for kind, each in content.items())
            rows.append((status, text, kinds))
    return rows


def _common_refusals(schema: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return status, reason and meaning of the refusals that any request may meet."""
    found = {
        reason: (str(example["value"]["status"]), f"`{reason}`", f"{example['value']['title']}.")
        for methods in schema["paths"].values()
        for operation in methods.values()
        for answer in operation["responses"].values()
        for reason, example in answer.get("content", {}).get("application/problem+json", {}).get("examples", {}).items()
        if reason in schema["x-common-problems"]
    }
    return sorted(found.values(), key=lambda row: row[0])


def _example(operation: dict[str, Any]) -> Any:
    """Return the first example of an answer with a status of success; None if there is none."""
    return next(
        (
            each["example"]
            for status, answer in operation["responses"].items()
            if status.startswith("2")
            for each in answer.get("content", {}).values()
            if "example" in each
        ),
        None,
    )


def _fields(shape: dict[str, Any]) -> str:
    """Return the table of the fields of a shape."""
    required = shape.get("required", ())
    rows = [
        (f"`{name}`", _type(each), each.get("description", "") + ("" if name in required else " May be missing."))
        for name, each in shape.get("properties", {}).items()
    ]
    return _table(("Field", "Type", "Meaning"), rows)


def _type(schema: dict[str, Any]) -> str:
    """Return the text for a type, with a link to each shape."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{_anchor(name)})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema or "const" in schema:
        text = " or ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    else:
        text = str(schema.get("type", ""))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        text += f", {low} to {high}"
    if "default" in schema:
        default = schema["default"]
        text += f"; `{default if isinstance(default, str) else json.dumps(default)}` if not given"
    return text


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub generates for a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table; vertical bars in cells are escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
