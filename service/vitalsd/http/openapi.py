"""
Make the OpenAPI document: every route with its parameters, units, answers, refusals, examples and commands to try.

Each route declares its parameters (`vitalsd.http.parameters`), its documentation (`vitalsd.http.operation`) and the
`TypedDict` of its answer. This module combines them at the first request, not while the sidecar starts.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from vitalsd import __version__
from vitalsd.contract.shapes import Lazy
from vitalsd.http.access.access_control import OPEN_PATHS
from vitalsd.http.operation import Operation, OperationRoute
from vitalsd.http.parameters import JsonBody, QueryParams
from vitalsd.http.responses import MEDIA_TYPE, STATUS, TITLES, ProblemJson, Reason
from vitalsd.sources.base import (
    AccessDeniedError,
    KernelError,
    NoSuchProcessError,
    SourceError,
    TargetGoneError,
    UnsupportedError,
)

__all__ = ["openapi", "shape_adapter"]

JSON = "application/json"
REF = "#/components/schemas/{model}"
UNAVAILABLE = Lazy("vitalsd.contract.metrics:Unavailable")

KEYWORDS = ("type", "minimum", "maximum", "minLength", "maxLength", "enum", "pattern")
"""JSON Schema keywords to keep of a query parameter."""
SCHEMAS: dict[str, dict[str, Any]] = {
    JSON: {"type": "object"},
    "text/event-stream": {
        "type": "object",
        "description": "One event.",
        "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    },
}
"""Schemas of the media types that are not plain text."""
FAILURES: dict[type[SourceError], str] = {
    AccessDeniedError: "This user may not read the target.",
    NoSuchProcessError: "No such process.",
    TargetGoneError: "The target has exited.",
    UnsupportedError: "Not on this platform.",
    KernelError: "The kernel refused, or the target does not answer.",
}
DETAILS: dict[Reason, str] = {
    "bad_parameter": "must be greater than or equal to 10; got '5'",
    "bad_body": "Field required; send a JSON object with label",
    "not_recording": "nothing is being recorded (--record-interval 0)",
    "busy": "8 streams are open already",
    "hung": "the directory of runs: a read has not returned for 5 s",
    "unread": "32 MiB of answers wait already for clients that take them",
    "token": "send the token of the runtime file as Authorization: Bearer; `vitalsd endpoints` says where it is",
}
"""Examples of the detail of a refusal; for the other reasons the title is used."""


BODY_KEYWORDS = ("type", "required", "properties", "additionalProperties", "propertyNames", "patternProperties")
"""Keywords of JSON Schema that a body keeps."""


def openapi(routes: Sequence[OperationRoute], others: Sequence[Operation] = ()) -> dict[str, Any]:
    """
    Return the OpenAPI document of the application.

    Args:
        routes: the routes of the application.
        others: operations that middleware answers.
    """
    described: list[tuple[Operation, OperationRoute | None]] = [(route.operation, route) for route in routes]
    described += [(operation, None) for operation in others]
    common = _common_problems([operation for operation, _ in described])
    paths: dict[str, dict[str, Any]] = {}
    for operation, route in described:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, route, common)
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
            "schemas": _schemas([operation for operation, _ in described]),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only with `--auth token`, and only over TCP: the token of the runtime file.",
                }
            },
        },
        "security": [{}, {"token": []}],
        "x-common-problems": common,
    }


def shape_adapter(shapes: Sequence[Any]) -> TypeAdapter[Any]:
    """Return an adapter that validates a list of `shapes` and makes their schema; unknown fields are errors."""
    types = [Annotated[Any, shape] if isinstance(shape, Lazy) else shape for shape in shapes]
    item: Any = types[0]
    for other in types[1:]:
        item |= other
    return TypeAdapter(list[item], config=ConfigDict(extra="forbid"))


class _Generator(GenerateJsonSchema):
    """Generate schemas without the suffix ``Json`` of typed dictionaries in their names."""

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(name).removesuffix("Json")

    def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
        made = super().typed_dict_schema(schema)
        return {**made, "title": str(made["title"]).removesuffix("Json")}


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the schemas of all answers, by name."""
    shapes = {_name(shape): shape for each in operations for shape in (*each.shapes, ProblemJson, UNAVAILABLE)}
    mode: JsonSchemaMode = "serialization"
    adapters = [(name, mode, shape_adapter([shapes[name]])) for name in sorted(shapes)]
    _, definitions = TypeAdapter.json_schemas(adapters, ref_template=REF, schema_generator=_Generator)
    found: dict[str, Any] = definitions["$defs"]
    return found


def _name(shape: Any) -> str:
    name: str = (shape.resolve() if isinstance(shape, Lazy) else shape).__name__
    return name.removesuffix("Json")


def _described(operation: Operation, route: OperationRoute | None, common: Sequence[Reason]) -> dict[str, Any]:
    """Return the OpenAPI object of one operation."""
    name = f"{operation.method.lower()}{operation.path}"
    described: dict[str, Any] = {
        "operationId": name.translate(str.maketrans("/.", "__", "{}")).strip("_"),
        "summary": operation.summary,
        "description": operation.description,
        "parameters": [*operation.parameters, *_query_parameters(route)],
    }
    if (body := _model(route, JsonBody)) is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _plain(body)}}}
    described["responses"] = _responses(operation, common)
    described["x-codeSamples"] = [
        {"lang": "Shell", "label": command.title, "source": command.text} for command in operation.commands
    ]
    return described


def _model(route: OperationRoute | None, kind: type[Any]) -> type[BaseModel] | None:
    """Return the model of a `QueryParams` or `JsonBody` that the route depends on."""
    for dependency in route.dependant.dependencies if route else ():
        if isinstance(dependency.call, kind):
            model: type[BaseModel] = dependency.call.model
            return model
    return None


def _plain(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {key: schema[key] for key in BODY_KEYWORDS if key in schema}


def _query_parameters(route: OperationRoute | None) -> list[dict[str, Any]]:
    """Return the OpenAPI objects of the query parameters."""
    found = []
    query = _model(route, QueryParams)
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


def _responses(operation: Operation, common: Sequence[Reason]) -> dict[str, Any]:
    """Return the OpenAPI objects of the answers by status."""
    content: dict[str, Any] = {}
    if operation.shapes:
        refs = [{"$ref": REF.format(model=_name(shape))} for shape in operation.shapes]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        content[JSON] = {
            "schema": {"type": "array", "items": schema} if operation.is_list else schema,
            "example": operation.example,
        }
    for media_type, example in (operation.media_types or {}).items():
        content[media_type] = {"schema": SCHEMAS.get(media_type, {"type": "string"})}
        if example:
            content[media_type]["example"] = example
    answer = {"description": operation.answer, "content": content} if content else {"description": operation.answer}
    responses: dict[str, Any] = {str(operation.status): answer}
    for status, found in sorted(_refusals(operation, common).items()):
        responses[str(status)] = found
    return responses


def _refusals(operation: Operation, common: Sequence[Reason]) -> dict[int, dict[str, Any]]:
    """Return the refusals and failures by status."""
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
    for reason in (*operation.reasons, *common):
        if reason in ("token", "guessing") and operation.path in OPEN_PATHS:
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


def _common_problems(operations: Sequence[Operation]) -> list[Reason]:
    """Return the reasons of the refusals that every route has: those that no operation declares."""
    named = {reason for operation in operations for reason in operation.reasons}
    return [reason for reason in TITLES if reason not in named | {"no_such_route", "method_not_allowed"}]
