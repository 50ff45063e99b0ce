"""
``/openapi.json``: every route with its parameters, units, answers, refusals, examples and commands to try.

The routes declare their parameters (`vitalsd.http.parameters`), `vitalsd.http.route_docs` says the rest; they meet
here when somebody asks, and not while the service starts.
"""

from collections.abc import Sequence
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from vitalsd import __version__
from vitalsd.contract.metrics import Unavailable
from vitalsd.http import response_models as bodies
from vitalsd.http.access.access_control import OPEN_PATHS
from vitalsd.http.parameters import Given, Sent
from vitalsd.http.responses import MEDIA_TYPE, STATUS, TITLES, Reason
from vitalsd.http.route_docs import DETAILS, FAILURES, JSON, OPERATIONS, RUN, Operation

__all__ = ["anywhere", "openapi"]

REF = "#/components/schemas/{model}"

NONCE: dict[str, Any] = {
    "name": "nonce",
    "in": "query",
    "required": True,
    "description": "Chosen by the client, new each time.",
    "schema": {"type": "string", "pattern": "^[0-9A-Za-z_-]{16,128}$"},
    "example": "0123456789abcdef",
}
KEYWORDS = ("type", "minimum", "maximum", "minLength", "maxLength", "enum", "pattern")
"""Of a query parameter, what the schema says besides its description."""
RUN_ID: dict[str, Any] = {
    "name": "run_id",
    "in": "path",
    "required": True,
    "description": "As `/runs` lists it.",
    "schema": {"type": "string"},
    "example": RUN["id"],
}

SHAPES: dict[str, dict[str, Any]] = {
    JSON: {"type": "object"},
    "text/event-stream": {
        "type": "object",
        "description": "One event.",
        "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    },
}
"""Of what is not text."""


def openapi(routes: Sequence[APIRoute]) -> dict[str, Any]:
    """The schema of `routes`, each of which is described in `OPERATIONS`."""
    declared = {(method.lower(), route.path): route for route in routes for method in route.methods or ()}
    every: set[type[BaseModel]] = {bodies.Problem, Unavailable}
    every.update(model for operation in OPERATIONS.values() for model in operation.models)
    models = sorted(every, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "serialization") for model in models], ref_template=REF)
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        route = declared.get((method, path))
        described: dict[str, Any] = {
            "operationId": f"{method}{path}".translate(str.maketrans("/.", "__", "{}")).strip("_"),
            "summary": (route.summary if route else None) or operation.summary,
            "description": operation.description,
            "parameters": _parameters(route, path),
        }
        if (body := _depended(route, Sent)) is not None:
            described["requestBody"] = {"required": True, "content": {JSON: {"schema": _plain(body)}}}
        described["responses"] = _responses(operation, open_to_all=path in OPEN_PATHS)
        described["x-codeSamples"] = [
            {"lang": "Shell", "label": sample.title, "source": sample.command} for sample in operation.samples
        ]
        paths.setdefault(path, {})[method] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vitalsd",
            "version": __version__,
            "summary": "What one process is doing: CPU, memory and every thread.",
            "description": "Times are in ms, sizes in KiB, CPU in percent of one core, as the names say."
            " Parameters are read strictly: digits only, each once, no unknown names."
            " Each route that has GET answers HEAD, with the same checks of the request and the same headers, of which"
            " Content-Length and Content-Disposition may be missing. For HEAD nothing is measured and no run is read:"
            " 200 does not say that the target can be measured.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only with `--auth token`, and only over TCP: the token of the runtime file.",
                }
            },
        },
        "security": [{}, {"token": []}],
        "x-anywhere": anywhere(),
    }


def _depended(route: APIRoute | None, kind: type[Any]) -> type[BaseModel] | None:
    """The model of a `Given` or `Sent` that the route depends on."""
    for dependency in route.dependant.dependencies if route else ():
        if isinstance(dependency.call, kind):
            model: type[BaseModel] = dependency.call.model
            return model
    return None


def _plain(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {key: schema[key] for key in ("type", "required", "properties", "additionalProperties") if key in schema}


def _parameters(route: APIRoute | None, path: str) -> list[dict[str, Any]]:
    if path == "/hello":
        return [NONCE]
    found = [RUN_ID] if "{run_id}" in path else []
    query = _depended(route, Given)
    for name, schema in (query.model_json_schema()["properties"] if query else {}).items():
        of = schema["anyOf"][0] if "anyOf" in schema else schema
        kept = {key: of[key] for key in KEYWORDS if key in of}
        if schema.get("default") is not None:
            kept["default"] = schema["default"]
        found.append(
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema["description"],
                "schema": kept,
                "example": schema["examples"][0],
            }
        )
    return found


def _responses(operation: Operation, *, open_to_all: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.models:
        refs = [{"$ref": REF.format(model=model.__name__)} for model in operation.models]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        content[JSON] = {
            "schema": {"type": "array", "items": schema} if operation.listed else schema,
            "example": operation.example,
        }
    for media_type, example in (operation.other or {}).items():
        content[media_type] = {"schema": SHAPES.get(media_type, {"type": "string"})}
        if example:
            content[media_type]["example"] = example
    responses: dict[str, Any] = {str(operation.status): {"description": operation.answer, "content": content}}
    for status, found in sorted(_refusals(operation, open_to_all=open_to_all).items()):
        responses[str(status)] = found
    return responses


def _refusals(operation: Operation, *, open_to_all: bool) -> dict[int, dict[str, Any]]:
    """By status: what is not an answer."""
    found: dict[int, dict[str, Any]] = {}
    if operation.unavailable:
        for error, text in FAILURES.items():
            found[STATUS[error]] = {
                "description": f"Unavailable: {text}",
                "content": {
                    JSON: {
                        "schema": {"$ref": REF.format(model="Unavailable")},
                        "example": {"platform": "linux", "available": False, "reason": text},
                    }
                },
            }
    for reason in (*operation.reasons, *anywhere()):
        if reason in ("token", "guessing") and open_to_all:
            continue
        status, title = TITLES[reason]
        response = found.setdefault(status, {"description": "", "content": {}})
        response["description"] = f"{response['description']} `{reason}`: {title}.".strip()
        content = response["content"].setdefault(
            MEDIA_TYPE, {"schema": {"$ref": REF.format(model="Problem")}, "examples": {}}
        )
        example = {"title": title, "status": status, "reason": reason, "detail": DETAILS.get(reason, title)}
        if reason == "bad_parameter":
            example["parameter"] = "window_ms"
        content["examples"][reason] = {"value": example}
    return found


def anywhere() -> list[Reason]:
    """The refusals that no operation names as its own: any request may meet them, those for a route of ours."""
    named = {reason for operation in OPERATIONS.values() for reason in operation.reasons}
    return [reason for reason in TITLES if reason not in named | {"no_such_route", "method_not_allowed"}]
