"""One client connection: uvicorn's h11 protocol, kept out of the host program's logs."""

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Connection"]


class Connection(H11Protocol):
    """
    Writes no access log.

    uvicorn asks whether the logger ``uvicorn.access`` has handlers, which in a host program that is
    itself served by uvicorn it has; and its own switch silences that logger for the host as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False
