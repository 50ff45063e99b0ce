"""
Query parameters, parsed strictly.

Digits only, each name once, no unknown names: a typo in ``windw_ms=5000`` must be an error and not
a silent default. FastAPI alone would accept ``1_000``, ``+5``, `` 5`` and ``5.0`` for an integer, let the
last of two duplicates win and echo kilobytes of input.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from vitalsd.wire import Detail, Sort

__all__ = ["MetricsQuery", "NoQuery", "unique_parameters"]

MAX_PID = 2**31 - 1


def _digits(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        raise ValueError("must be written in digits only")
    return value


def _integer(low: int, high: int, description: str) -> Any:
    """An integer parameter in `low`...`high`, with the schema that pydantic loses behind a validator."""
    return Annotated[
        int,
        Field(ge=low, le=high, description=description),
        BeforeValidator(_digits),
        WithJsonSchema({"type": "integer", "minimum": low, "maximum": high}),
    ]


class NoQuery(BaseModel):
    """A route without parameters."""

    model_config = ConfigDict(extra="forbid")


class MetricsQuery(BaseModel):
    """Parameters of ``GET /metrics``."""

    model_config = ConfigDict(extra="forbid")

    window_ms: _integer(10, 60_000, "Window to measure, ms.") = 1000
    mode: Annotated[Literal["wait"], Field(description="`wait` measures the coming window.")] = "wait"
    detail: Annotated[Detail, Field(description="`full` adds the accounting, error bars and more per thread.")] = (
        "basic"
    )
    sort: Annotated[Sort, Field(description="Order of the threads; `cpu` is busiest first.")] = "tid"
    limit: _integer(0, 20_000, "At most so many threads, after sorting.") | None = None
    pid: _integer(1, MAX_PID, "Another process than the sidecar's target.") | None = None


async def unique_parameters(request: Request) -> None:
    """
    Refuse a parameter that is given twice.

    Raises:
        RequestValidationError: with the same shape as pydantic's own.
    """
    names = [name for name, _ in parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)]
    for name in names:
        if names.count(name) > 1:
            error = {"type": "duplicate", "loc": ("query", name), "msg": "Given more than once", "input": None}
            raise RequestValidationError([error])


Strict = Annotated[NoQuery, Query()]
