"""
Parse query parameters and bodies strictly.

Only digits, no unknown names, each name once: a typo as in ``windw_ms=5000`` must be an error and no silent default.
FastAPI alone would accept ``1_000``, ``+5``, `` 5`` and ``5.0`` for an integer, take the last of two duplicates and
repeat kilobytes of input.

Each route declares its models beside its function, by `query_params` and `json_body`. Their validators are built at the
first use: a ``Query()`` of FastAPI builds them, and loads all of ``pydantic.v1``, while the sidecar starts.
`vitalsd.http.openapi` reads the same models.
"""

import re
from functools import lru_cache
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from vitalsd.contract.encoding import Sort
from vitalsd.contract.limits import ANSWER_THREADS, HISTORY_SECONDS, WINDOW_MS
from vitalsd.http.responses import ProblemError, did_you_mean, truncate_for_display

__all__ = [
    "READING",
    "Digits",
    "HistorySeconds",
    "JsonBody",
    "NoQuery",
    "OtherPid",
    "QueryParams",
    "SortBy",
    "StrictModel",
    "ThreadLimit",
    "WindowMs",
    "json_body",
    "query_params",
]

READING = ["GET", "HEAD"]
"""
Methods of a route that changes nothing. The server leaves the body out of an answer to HEAD (RFC 9110 section 9.3.2).

A function that would measure, read a file or build something checks the method after the request, and returns
`vitalsd.http.responses.bare` for HEAD.
"""
CACHED_QUERIES = 32
"""Size of the cache of parsed queries of one route: clients repeat the same query at each poll."""

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Parameters or a body without unknown fields; validators are built when first used."""

    model_config = ConfigDict(extra="forbid", defer_build=True, frozen=True)


class QueryParams(Generic[Model]):
    """
    Parse the query of a request as `model`; a dependency of FastAPI.

    Raises:
        ProblemError: a parameter is unknown, given twice or wrong.
    """

    def __init__(self, model: type[Model]) -> None:
        self.model = model
        self._parsed = lru_cache(CACHED_QUERIES)(self._parse)

    async def __call__(self, request: Request) -> Model:
        """Return the model of the query. Raises `ProblemError`."""
        return self._parsed(request.scope["query_string"])

    def _parse(self, query_string: bytes) -> Model:
        parameters: dict[str, str] = {}
        for name, value in parse_qsl(query_string.decode("latin-1"), keep_blank_values=True):
            if name in parameters:
                raise ProblemError("bad_parameter", "given more than once", name)
            parameters[name] = value
        try:
            return self.model.model_validate(parameters)
        except ValidationError as error:
            raise _bad_parameter(error, tuple(self.model.model_fields)) from None


class JsonBody(Generic[Model]):
    """
    Parse the JSON body of a request as `model`; a dependency of FastAPI.

    The content type must be JSON: a page of another site can send text/plain without a preflight request (CSRF).

    Raises:
        ProblemError: the content type or the body is wrong.
    """

    def __init__(self, model: type[Model]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> Model:
        """Read the body and return its model. Raises `ProblemError`."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ProblemError("bad_body", "send JSON, with the header Content-Type: application/json")
        try:
            return self.model.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            fields = ", ".join(self.model.model_fields)
            expected = f"with {fields}" if issubclass(self.model, StrictModel) else "of names and values"
            message = {
                "extra_forbidden": f"the field {truncate_for_display(where)} is not known",
                "string_pattern_mismatch": f"{where} has characters that it may not have, or too many",
                "missing": f"the field {where} is missing",
            }.get(first["type"], first["msg"])
            raise ProblemError("bad_body", f"{message}; send a JSON object {expected}", where or None) from None


def query_params(model: type[Model]) -> Any:
    """Return the dependency that parses the query of a route, for the annotation of its parameter."""
    return Depends(QueryParams(model))


def json_body(model: type[Model]) -> Any:
    """Return the dependency that parses the JSON body of a route, for the annotation of its parameter."""
    return Depends(JsonBody(model))


def _bad_parameter(error: ValidationError, known: tuple[str, ...]) -> ProblemError:
    """Return the refusal for the first error of a query; `known` are the names of the parameters."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        meant = did_you_mean(name, known)
        takes = f"this route takes: {', '.join(known)}" if known else "this route takes none"
        return ProblemError("bad_parameter", f"unknown parameter; {meant}{takes}", name)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    got = f"; got '{truncate_for_display(first['input'])}'" if isinstance(first.get("input"), str) else ""
    return ProblemError("bad_parameter", f"{message[:1].lower()}{message[1:]}{got}", name)


class Digits(NamedTuple):
    """Validate an integer from `low` to `high` that is written in ASCII digits only; an annotation of pydantic."""

    low: int
    high: int

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema by which pydantic validates the parameter."""
        limits = core_schema.int_schema(ge=self.low, le=self.high)
        return core_schema.no_info_before_validator_function(self._check, limits)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON schema of the parameter for the OpenAPI document."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    @staticmethod
    def _check(value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
            raise ValueError("must be written in digits only, 10 at the most")
        return value


WindowMs = Annotated[int, Digits(*WINDOW_MS), Field(description="Window to measure, ms.", examples=[500])]
HistorySeconds = Annotated[int, Digits(*HISTORY_SECONDS)]
ThreadLimit = Annotated[
    Annotated[int, Digits(0, ANSWER_THREADS)] | None,
    Field(description="Maximum number of threads, after sorting.", examples=[20]),
]
OtherPid = Annotated[
    Annotated[int, Digits(1, 2**31 - 1)] | None,
    Field(description="Measure this process instead of the sidecar's target.", examples=[4242]),
]
SortBy = Annotated[Sort, Field(description="Order of the threads; `cpu` is busiest first.", examples=["cpu"])]


class NoQuery(StrictModel):
    """A route without parameters."""
