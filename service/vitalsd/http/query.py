"""
Query parameters, parsed strictly.

Digits only, no unknown names, and (see `vitalsd.http.bounds`) each name once: a typo in
``windw_ms=5000`` must be an error and not a silent default. FastAPI alone would accept ``1_000``,
``+5``, `` 5`` and ``5.0`` for an integer, let the last of two duplicates win and echo kilobytes of input.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from vitalsd.wire import Detail, Sort

__all__ = ["HistoryQuery", "MetricsQuery", "NoQuery", "ReportQuery", "RunHistoryQuery", "StreamQuery"]


@dataclass(frozen=True, slots=True)
class Digits:
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
            raise ValueError("must be written in digits only")
        return value


WindowMs = Annotated[int, Digits(10, 60_000), Field(description="Window to measure, ms.")]
IntervalMs = Annotated[int, Digits(10, 60_000), Field(description="One answer each, ms.")]
Limit = Annotated[
    Annotated[int, Digits(0, 20_000)] | None, Field(description="At most so many threads, after sorting.")
]
OtherPid = Annotated[
    Annotated[int, Digits(1, 2**31 - 1)] | None, Field(description="Another process than the sidecar's target.")
]
SortBy = Annotated[Sort, Field(description="Order of the threads; `cpu` is busiest first.")]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NoQuery(_Query):
    """A route without parameters."""


class MetricsQuery(_Query):
    """Parameters of ``GET /metrics``."""

    window_ms: WindowMs = 1000
    mode: Annotated[
        Literal["wait", "trailing"],
        Field(description="`wait` measures the coming window; `trailing` answers at once for the one just recorded."),
    ] = "wait"
    detail: Annotated[Detail, Field(description="`full` adds the accounting, error bars and more per thread.")] = (
        "basic"
    )
    sort: SortBy = "tid"
    limit: Limit = None
    pid: OtherPid = None


class RunHistoryQuery(_Query):
    """Parameters of ``GET /runs/{id}/history``."""

    seconds: Annotated[int, Digits(1, 86_400), Field(description="How far back, s.")] = 300
    top: Annotated[int, Digits(0, 20_000), Field(description="Show so many threads, the busiest ones.")] = 10
    step_ms: Annotated[int, Digits(0, 3_600_000), Field(description="At least so long a row, ms; 0 for all.")] = 0


class ReportQuery(_Query):
    """Parameters of ``GET /report.zip``."""

    window_ms: WindowMs = 2000
    seconds: Annotated[int, Digits(1, 86_400), Field(description="How far back the history goes, s.")] = 300


class HistoryQuery(RunHistoryQuery):
    """Parameters of ``GET /history``."""

    pid: OtherPid = None


class StreamQuery(_Query):
    """Parameters of ``GET /stream``."""

    interval_ms: IntervalMs = 1000
    sort: SortBy = "tid"
    limit: Limit = None
    pid: OtherPid = None
