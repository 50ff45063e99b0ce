"""Import SQLite, or a substitute: some Pythons, above all embedded ones, are built without it."""

from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["sqlite3"]


class _Missing:
    """Replace `sqlite3` where it cannot be imported: no run is written or read, and the rest of the sidecar works."""

    class Error(Exception):
        """Take the place of `sqlite3.Error` in except clauses; it is never raised."""

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
