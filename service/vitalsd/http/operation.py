"""Declare an operation of the API, with its method, path and documentation, beside the function that answers it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from fastapi.routing import APIRoute

from vitalsd.http.parameters import READING
from vitalsd.http.responses import Reason

__all__ = ["CommandExample", "Operation", "OperationRoute"]


class CommandExample(NamedTuple):
    """Hold a shell command to try, in which ``$URL`` is the URL of the sidecar."""

    title: str
    text: str


class Operation(NamedTuple):
    """
    Document one method of one path, without the parameters that its function declares.

    A named tuple, because the definition of a dataclass takes 1 ms of the start.
    """

    path: str
    summary: str
    description: str
    answer: str
    """Description of the answer with `status`."""
    method: Literal["GET", "POST"] = "GET"
    """GET includes HEAD."""
    status: int = 200
    shapes: tuple[Any, ...] = ()
    """Alternatives for the JSON of that answer, each a `TypedDict` or a `vitalsd.contract.shapes.Lazy`."""
    is_list: bool = False
    """Whether the answer is a list of `shapes`."""
    example: Any = None
    media_types: Mapping[str, str] | None = None
    """Other media types of the answer, with an example of each; ``""`` for none."""
    reasons: tuple[Reason, ...] = ()
    """Reasons of the refusals that not every route has."""
    unavailable: bool = False
    """Whether it may answer `Unavailable`."""
    parameters: tuple[Mapping[str, Any], ...] = ()
    """OpenAPI objects of the parameters that are not in a query model."""
    commands: tuple[CommandExample, ...] = ()


class OperationRoute(APIRoute):
    """
    Route requests to the function of one operation.

    Args:
        operation: method, path and documentation.
        endpoint: the function that answers it.
    """

    def __init__(self, operation: Operation, endpoint: Callable[..., Any]) -> None:
        methods: list[str] = READING if operation.method == "GET" else [operation.method]
        super().__init__(operation.path, endpoint, methods=methods, status_code=operation.status)
        self.operation = operation
