"""Answer `/heartbeats` and `/gauges`, the routes of what an application signals."""

import re
from typing import Annotated, Literal

from fastapi import Request, Response
from pydantic import ConfigDict, Field, RootModel
from typing_extensions import TypedDict

from vitalsd.contract.shapes import Count, Doc
from vitalsd.contract.signals import LIMIT_S, PostedSignals, SignalsFullError
from vitalsd.contract.signals_page import NAME
from vitalsd.http.operation import CommandExample, Operation, OperationRoute
from vitalsd.http.parameters import NoQuery, StrictModel, json_body, query_params
from vitalsd.http.responses import JSON, ProblemError, problem
from vitalsd.http.routes.context import RouteContext
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.recorder import NotRecordingError

__all__ = ["signals_routes"]


class HeartbeatJson(TypedDict):
    """A heartbeat that a client has opened."""

    name: str
    tid: Annotated[Count | None, Doc("Thread that beats; null: unknown, as of a heartbeat that is posted.")]
    limit_ms: Annotated[Count, Doc("Longest time between two beats that is no hang, ms.")]
    state: Annotated[
        Literal["beating", "silent", "paused"],
        Doc("silent: for longer than the limit. paused: no beats are expected, or none has come yet."),
    ]
    silent_ms: Annotated[Count, Doc("Time since the last beat in which the sidecar was looking, ms.")]
    cause: Annotated[HangCause | None, Doc("Why it is silent; null: it does not hang.")]
    detail: Annotated[str, Doc("More about the cause, such as where the thread sleeps; may be empty.")]


class HeartbeatRequest(StrictModel):
    """Body of ``POST /heartbeats/{name}``."""

    state: Annotated[
        Literal["beat", "pause", "close"],
        Field(description="`beat` opens the heartbeat, and resumes it after `pause`."),
    ] = "beat"
    limit_s: Annotated[
        Annotated[float, Field(ge=LIMIT_S[0], le=LIMIT_S[1], allow_inf_nan=False, strict=True)] | None,
        Field(description="Limit of the silence, s; without it as before, or 2 s."),
    ] = None


Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class GaugeValues(RootModel[dict[Name, Number | None]]):
    """Body of ``POST /gauges``: numbers by name; null closes a gauge."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})


EXAMPLE = {
    "name": "ui",
    "tid": 2345,
    "limit_ms": 2000,
    "state": "silent",
    "silent_ms": 4200,
    "cause": "blocked",
    "detail": "futex",
}
GET_HEARTBEATS = Operation(
    path="/heartbeats",
    summary="The heartbeats of the application, and which of them are silent",
    description="A client opens a heartbeat for a loop that should proceed, such as that of its user interface. A"
    " silence that is longer than the limit is an event `hang` of the history.",
    answer="The open heartbeats.",
    shapes=(HeartbeatJson,),
    is_list=True,
    example=[EXAMPLE],
    commands=(
        CommandExample("Names, states and causes", 'curl -s "$URL/heartbeats" | jq -c "map({name, state, cause})"'),
    ),
)
POST_HEARTBEAT = Operation(
    method="POST",
    path="/heartbeats/{name}",
    summary="Beat, pause or close a heartbeat",
    parameters=(
        {
            "name": "name",
            "in": "path",
            "required": True,
            "description": "Name of the heartbeat.",
            "schema": {"type": "string", "pattern": f"^{NAME.pattern}$"},
            "example": "ui",
        },
    ),
    description="For clients that cannot map the page of shared memory, see docs/protocol.md. A name is a letter and"
    " up to 31 of `A-Z a-z 0-9 . _ -`. The thread is unknown, so a hang has the cause `unknown`.",
    answer="Done.",
    status=204,
    reasons=("bad_body", "not_recording", "too_many", "no_signals"),
    commands=(
        CommandExample(
            "Beat once",
            "curl -s -o /dev/null -w '%{http_code}' \"$URL/heartbeats/ui\" -H 'Content-Type: application/json' -d '{}'",
        ),
    ),
)
POST_GAUGES = Operation(
    method="POST",
    path="/gauges",
    summary="Set gauges, the application's own numbers",
    description="The body is a JSON object of numbers by name, with names as those of heartbeats. The recorder keeps"
    " the last value of each of its intervals.",
    answer="Done.",
    status=204,
    reasons=("bad_body", "not_recording", "too_many", "no_signals"),
    commands=(
        CommandExample(
            "Frames per second",
            "curl -s -o /dev/null -w '%{http_code}' \"$URL/gauges\" -H 'Content-Type: application/json'"
            " -d '{\"fps\": 58}'",
        ),
    ),
)


def signals_routes(context: RouteContext) -> list[OperationRoute]:
    """Return the routes ``/heartbeats`` and ``/gauges``."""
    signals = _Signals(context)
    return [
        OperationRoute(GET_HEARTBEATS, signals.listed),
        OperationRoute(POST_HEARTBEAT, signals.beat),
        OperationRoute(POST_GAUGES, signals.gauges),
    ]


class _Signals:
    """Answer ``/heartbeats`` and ``/gauges``."""

    def __init__(self, context: RouteContext) -> None:
        self._targets = context.targets
        self._posted = context.posted

    async def listed(self, query: Annotated[NoQuery, query_params(NoQuery)]) -> Response:
        body: list[HeartbeatJson] = [
            {
                "name": each.name,
                "tid": each.tid or None,
                "limit_ms": each.limit_ns // 1_000_000,
                "state": each.state,
                "silent_ms": each.silent_ns // 1_000_000,
                "cause": each.cause,
                "detail": each.detail,
            }
            for each in self._targets.default.heartbeats
        ]
        return JSON(body)

    async def beat(
        self,
        request: Request,
        body: Annotated[HeartbeatRequest, json_body(HeartbeatRequest)],
        query: Annotated[NoQuery, query_params(NoQuery)],
    ) -> Response:
        name = _checked(request.path_params["name"])
        try:
            self._signals().beat(name, body.state, body.limit_s)
        except SignalsFullError as error:
            return problem("too_many", str(error))
        return Response(status_code=204)

    async def gauges(
        self,
        body: Annotated[GaugeValues, json_body(GaugeValues)],
        query: Annotated[NoQuery, query_params(NoQuery)],
    ) -> Response:
        try:
            self._signals().set_gauges(body.root)
        except SignalsFullError as error:
            return problem("too_many", str(error))
        return Response(status_code=204)

    def _signals(self) -> PostedSignals:
        recorder = self._targets.default.recorder
        if recorder.record is None or self._targets.default.replay is not None:
            raise NotRecordingError(recorder.why_not_recorded or "a recorded run takes no heartbeats and no gauges")
        if self._posted is None:
            raise ProblemError("no_signals", "this sidecar has no page for heartbeats and gauges; its log states why")
        return self._posted


def _checked(name: str) -> str:
    """Return a name. Raise `ProblemError` if it does not have the form of one."""
    if not re.fullmatch(NAME, name):
        raise ProblemError("bad_parameter", "a name is a letter and up to 31 of A-Z a-z 0-9 . _ -", "name")
    return name
