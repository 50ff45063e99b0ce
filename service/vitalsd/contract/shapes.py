"""
Declare field types and descriptions of the typed dictionaries of JSON answers, for mypy and for the schema.

A function that makes a JSON object returns a `TypedDict` declared beside it. mypy checks the function against it, and
`vitalsd.http.openapi` makes the schema from it when a client asks. Only pydantic calls the methods here, so a module
that declares a `TypedDict` does not load pydantic.
"""

from datetime import datetime
from importlib import import_module
from typing import Annotated, Any, NamedTuple

__all__ = ["APP", "PROGRAM", "Count", "Doc", "Lazy", "Seconds", "UnixMs", "UtcTime"]


class Doc(NamedTuple):
    """The description of a field in the schema."""

    text: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Return the JSON schema of the field with the description."""
        return {**handler(schema), "description": self.text}


class Lazy(NamedTuple):
    """
    The type of a field, loaded when the schema is made.

    Args:
        name: ``package.module:Name``.
    """

    name: str

    def resolve(self) -> Any:
        """Return the type."""
        module, _, name = self.name.partition(":")
        return getattr(import_module(module), name)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of the loaded type."""
        return handler.generate_schema(self.resolve())


class _NotNegative(NamedTuple):
    """A number from 0. `annotated_types.Ge` would be the same, and takes 19 ms to import."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return {**handler(source), "ge": 0}


class _Time(NamedTuple):
    """A text that is a date and time."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler.generate_schema(datetime)


Count = Annotated[int, _NotNegative()]
Seconds = Annotated[float, _NotNegative()]
UnixMs = Annotated[int, Doc("Unix time, ms.")]
UtcTime = Annotated[str, _Time()]

APP = Doc("Application id that the client passed; null: none.")
PROGRAM = Doc("Keyed digest of the executed file and of what it runs; empty: not known.")
