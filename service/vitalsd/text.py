"""Make text safe for terminals, logs and error messages: escape it, cut it, and write times."""

from datetime import UTC, datetime

__all__ = ["iso", "one_line", "printable", "shortened"]

MAX_LINE = 1000
"""Characters of an error message or of a line of a log; `shortened` cuts longer text in its middle."""


def iso(unix_ns: int, precision: str = "milliseconds") -> str:
    """Format a Unix time in ns as ISO 8601 in UTC; `precision`: ``milliseconds`` or ``microseconds``."""
    seconds, rest_ns = divmod(unix_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000)
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")


def printable(text: str) -> str:
    """Escape control, invisible and bidirectional characters of `text`, which a terminal would act on or not show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """Return `text` cut by `shortened` and escaped by `printable`, for an error message or a line of a log."""
    return printable(shortened(text, limit))


def shortened(text: str, limit: int = MAX_LINE) -> str:
    """
    Return `text`, or, of more than `limit` characters, its beginning and its end.

    A message begins with what failed and ends with the remedy.
    """
    if len(text) <= limit:
        return text
    head, tail = text[: 2 * limit // 3], text[-(limit // 3) :]
    return f"{head} [{len(text) - len(head) - len(tail)} characters left out] {tail}"
