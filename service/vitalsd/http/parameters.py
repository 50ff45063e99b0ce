"""
Query parameters and bodies, parsed strictly.

Digits only, no unknown names, each name once: a typo in
``windw_ms=5000`` must be an error and not a silent default. FastAPI alone would accept ``1_000``,
``+5``, `` 5`` and ``5.0`` for an integer, let the last of two duplicates win and echo kilobytes of input.

The models are FastAPI dependencies, by `given` and `sent`, and are built when first asked for: a
``Query()`` of FastAPI's own builds its validators, and loads all of ``pydantic.v1``, while the service
starts. `vitalsd.http.openapi` reads the same models.

`StrictRoute` calls them by itself: FastAPI's way of solving dependencies, which may nest, be cached or want
something done when the answer is out, takes longer than most answers here.
"""

import re
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema
from starlette.routing import request_response

from vitalsd.contract.application import APP, APP_VERSION
from vitalsd.contract.encoding import Detail, Sort
from vitalsd.contract.labels import MAX_LABEL_LENGTH
from vitalsd.http.responses import Refused, nearest, shown

__all__ = [
    "READING",
    "Given",
    "HistoryQuery",
    "MarkRequest",
    "MetricsQuery",
    "NoQuery",
    "ReportQuery",
    "ReportRequest",
    "RunHistoryQuery",
    "Sent",
    "StreamQuery",
    "StrictRoute",
    "given",
    "sent",
]


READING = ["GET", "HEAD"]
"""
Methods of a route that changes nothing. The server leaves the body out of an answer to HEAD (RFC 9110 section 9.3.2).

A function that would measure, read a file or build something asks for the method when the request is checked, and
returns `vitalsd.http.responses.bare` for HEAD.
"""
QUERIES = 32
"""Of one route, kept as they were parsed."""

Model = TypeVar("Model", bound="_Strict")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True, frozen=True)


class Given(Generic[Model]):
    """A dependency: the query of a request, or `Refused`. Who asks again asks the same: the last ones are kept."""

    def __init__(self, model: type[Model]) -> None:
        self.model = model
        self._parsed = lru_cache(QUERIES)(self._parse)

    async def __call__(self, request: Request) -> Model:
        return self._parsed(request.scope["query_string"])

    def _parse(self, query_string: bytes) -> Model:
        parameters: dict[str, str] = {}
        for name, value in parse_qsl(query_string.decode("latin-1"), keep_blank_values=True):
            if name in parameters:
                raise Refused("bad_parameter", "given more than once", name)
            parameters[name] = value
        try:
            return self.model.model_validate(parameters)
        except ValidationError as error:
            raise _bad_parameter(error, tuple(self.model.model_fields)) from None


class Sent(Generic[Model]):
    """
    A dependency: the JSON in the body of a request, or `Refused`.

    The content type has to say so: a page of another site can send what says text/plain without asking first.
    """

    def __init__(self, model: type[Model]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> Model:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("bad_body", "send JSON, with the header Content-Type: application/json")
        try:
            return self.model.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            fields = ", ".join(self.model.model_fields)
            message = {
                "extra_forbidden": f"the field {shown(where)} is not known",
                "string_pattern_mismatch": f"{where} has characters that it may not have, or too many",
                "missing": f"the field {where} is missing",
            }.get(first["type"], first["msg"])
            raise Refused("bad_body", f"{message}; send a JSON object with {fields}", where or None) from None


def given(model: type[Model]) -> Any:
    """``Annotated[model, given(model)]``: the parameters of a route."""
    return Depends(Given(model))


def sent(model: type[Model]) -> Any:
    """``Annotated[model, sent(model)]``: the body of a route."""
    return Depends(Sent(model))


class StrictRoute(APIRoute):
    """
    A route whose function takes the request, what is `given` and what is `sent`, and returns the response.

    It runs no middleware of FastAPI's own, closes nothing afterwards and turns no value into JSON: there is
    no dependency here but these two kinds, which depend on nothing else.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        function, takes_request = self.endpoint, self.dependant.request_param_name
        parsers: dict[str, Given[Any] | Sent[Any]] = {}
        for each in self.dependant.dependencies:
            if not each.name or not isinstance(each.call, Given | Sent):
                raise TypeError(f"{self.path} depends on {each.call}, which is neither given nor sent")
            parsers[each.name] = each.call

        async def answer(request: Request) -> Response:
            arguments: dict[str, Any] = {name: await parse(request) for name, parse in parsers.items()}
            if takes_request is not None:
                arguments[takes_request] = request
            response: Response = await function(**arguments)
            return response

        self.app = request_response(answer)


def _bad_parameter(error: ValidationError, known: tuple[str, ...]) -> Refused:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        meant = nearest(name, known)
        takes = f"this route takes: {', '.join(known)}" if known else "this route takes none"
        return Refused("bad_parameter", f"unknown parameter; {meant}{takes}", name)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    got = f"; got '{shown(first['input'])}'" if isinstance(first.get("input"), str) else ""
    return Refused("bad_parameter", f"{message[:1].lower()}{message[1:]}{got}", name)


class Digits(NamedTuple):
    """An integer from `low` to `high`, written in ASCII digits and nothing else."""

    low: int
    high: int

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        limits = core_schema.int_schema(ge=self.low, le=self.high)
        return core_schema.no_info_before_validator_function(self._check, limits)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    @staticmethod
    def _check(value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
            raise ValueError("must be written in digits only, 10 at the most")
        return value


WindowMs = Annotated[int, Digits(10, 60_000), Field(description="Window to measure, ms.", examples=[500])]
IntervalMs = Annotated[int, Digits(10, 60_000), Field(description="One answer each, ms.", examples=[200])]
Limit = Annotated[
    Annotated[int, Digits(0, 20_000)] | None,
    Field(description="At most so many threads, after sorting.", examples=[20]),
]
OtherPid = Annotated[
    Annotated[int, Digits(1, 2**31 - 1)] | None,
    Field(description="Another process than the sidecar's target.", examples=[4242]),
]
SortBy = Annotated[Sort, Field(description="Order of the threads; `cpu` is busiest first.", examples=["cpu"])]


class NoQuery(_Strict):
    """A route without parameters."""


class MetricsQuery(_Strict):
    """Parameters of ``GET /metrics``."""

    window_ms: WindowMs = 1000
    mode: Annotated[
        Literal["wait", "trailing"],
        Field(
            description="`wait` measures the coming window; `trailing` answers at once for the one just recorded,"
            " which of a target that has exited is its last, and waits where nothing has been recorded.",
            examples=["trailing"],
        ),
    ] = "wait"
    detail: Annotated[
        Detail, Field(description="`full` adds the accounting, error bars and more per thread.", examples=["full"])
    ] = "basic"
    sort: SortBy = "tid"
    limit: Limit = None
    pid: OtherPid = None


class RunHistoryQuery(_Strict):
    """Parameters of ``GET /runs/{id}/history``."""

    seconds: Annotated[int, Digits(1, 86_400), Field(description="How far back, s.", examples=[60])] = 300
    top: Annotated[
        int, Digits(0, 20_000), Field(description="Show so many threads, the busiest ones.", examples=[5])
    ] = 10
    step_ms: Annotated[
        int, Digits(0, 3_600_000), Field(description="At least so long a row, ms; 0 for all.", examples=[5000])
    ] = 0


class ReportQuery(_Strict):
    """Parameters of ``/report.zip``."""

    window_ms: WindowMs = 2000
    seconds: Annotated[
        int, Digits(1, 86_400), Field(description="How far back the history goes, s.", examples=[60])
    ] = 300
    run: Annotated[
        Annotated[str, Field(min_length=1, max_length=128)] | None,
        Field(description="Include this earlier run, as `/runs` lists it.", examples=["2345-142313-9bfa3fdd-2300"]),
    ] = None


class HistoryQuery(RunHistoryQuery):
    """Parameters of ``GET /history``."""

    pid: Annotated[
        Annotated[int, Digits(1, 2**31 - 1)] | None,
        Field(description="Refused if another process than this is recorded.", examples=[4242]),
    ] = None


class StreamQuery(_Strict):
    """Parameters of ``GET /stream``."""

    interval_ms: IntervalMs = 1000
    sort: SortBy = "tid"
    limit: Limit = None
    pid: OtherPid = None


class MarkRequest(_Strict):
    """The body of ``POST /marks``."""

    model_config = ConfigDict(strict=True)

    label: Annotated[
        str,
        Field(min_length=1, max_length=MAX_LABEL_LENGTH, description="One line of text.", examples=["F12 pressed"]),
    ]


class ReportRequest(_Strict):
    """The body of ``POST /report.zip``."""

    model_config = ConfigDict(strict=True)

    app: Annotated[
        str | None,
        Field(
            pattern=f"^{APP.pattern}$", description="Application id; default: that of the sidecar.", examples=["viewer"]
        ),
    ] = None
    app_version: Annotated[
        str | None, Field(pattern=f"^{APP_VERSION.pattern}$", description="Its version.", examples=["3.1"])
    ] = None
    message: Annotated[str, Field(description="What the user says.", examples=["it stutters"])] = ""
