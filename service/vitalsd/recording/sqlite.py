"""Import SQLite, or stand in for it: some Pythons, above all embedded ones, are built without it."""

from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["sqlite3"]


class _Missing:
    """What `sqlite3` is where it cannot be imported: no run is written or read, and the rest of the sidecar works."""

    class Error(Exception):
        """Never raised."""

    OperationalError = Error
    Connection = Any

    @staticmethod
    def connect(*_: Any, **__: Any) -> NoReturn:
        """Raise `OSError`."""
        raise OSError("this Python was built without SQLite (no module _sqlite3)")


if TYPE_CHECKING:
    import sqlite3
else:
    try:
        import sqlite3
    except ImportError:
        sqlite3 = _Missing()
