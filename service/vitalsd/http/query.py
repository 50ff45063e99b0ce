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
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vitalsd.wire import Detail, Sort

__all__ = ["MetricsQuery", "NoQuery", "unique_parameters"]

MAX_PID = 2**31 - 1


def _digits(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        raise ValueError("must be written in digits only")
    return value


Digits = BeforeValidator(_digits)
"""Stands after the `Field` with the bounds: before it, they would be lost from the published schema."""


class NoQuery(BaseModel):
    """A route without parameters."""

    model_config = ConfigDict(extra="forbid")


class MetricsQuery(BaseModel):
    """Parameters of ``GET /metrics``."""

    model_config = ConfigDict(extra="forbid")

    window_ms: Annotated[int, Field(ge=10, le=60_000, description="Window to measure, ms."), Digits] = 1000
    mode: Annotated[Literal["wait"], Field(description="`wait` measures the coming window.")] = "wait"
    detail: Annotated[Detail, Field(description="`full` adds the accounting, error bars and more per thread.")] = (
        "basic"
    )
    sort: Annotated[Sort, Field(description="Order of the threads; `cpu` is busiest first.")] = "tid"
    limit: Annotated[
        int | None, Field(ge=0, le=20_000, description="At most so many threads, after sorting."), Digits
    ] = None
    pid: Annotated[
        int | None, Field(ge=1, le=MAX_PID, description="Another process than the sidecar's target."), Digits
    ] = None


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
