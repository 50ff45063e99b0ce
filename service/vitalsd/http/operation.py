"""An operation of the API: method, path and documentation, declared beside the function that answers it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from fastapi.routing import APIRoute

from vitalsd.http.parameters import READING
from vitalsd.http.responses import Reason

__all__ = ["CommandExample", "Operation", "OperationRoute"]


class CommandExample(NamedTuple):
    """A command to try; ``$URL`` in it is the sidecar."""

    title: str
    text: str


class Operation(NamedTuple):
    """
    The documentation of one method of one path, besides the parameters that its function declares.

    A named tuple: a dataclass takes 1 ms of the start to make.
    """

    path: str
    summary: str
    description: str
    answer: str
    """Content of an answer with `status`."""
    method: Literal["GET", "POST"] = "GET"
    """GET includes HEAD."""
    status: int = 200
    shapes: tuple[Any, ...] = ()
    """The JSON of such an answer is one of these: a `TypedDict` or a `vitalsd.contract.shapes.Lazy`."""
    is_list: bool = False
    """The answer is a list of `shapes`."""
    example: Any = None
    media_types: Mapping[str, str] | None = None
    """Other media types of the answer, with an example of each; ``""`` for none."""
    reasons: tuple[Reason, ...] = ()
    """Refusals that not every route has."""
    unavailable: bool = False
    """Whether it may answer `Unavailable`."""
    parameters: tuple[Mapping[str, Any], ...] = ()
    """OpenAPI objects of the parameters that are not in a query model."""
    commands: tuple[CommandExample, ...] = ()


class OperationRoute(APIRoute):
    """
    The route of one operation.

    Args:
        operation: its method, path and documentation.
        endpoint: the function that answers it.
    """

    def __init__(self, operation: Operation, endpoint: Callable[..., Any]) -> None:
        methods: list[str] = READING if operation.method == "GET" else [operation.method]
        super().__init__(operation.path, endpoint, methods=methods, status_code=operation.status)
        self.operation = operation
