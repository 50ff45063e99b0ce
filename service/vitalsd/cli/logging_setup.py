"""
Set up the log of a service on stderr, as text or as JSON: a line when it is ready, and what fails.

Only the commands that serve call this, in a process of their own. The logging of a client stays as it is.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

__all__ = ["logging_as"]


class _Text(logging.Formatter):
    """Format a record as ``vitalsd: a sentence``, followed by the traceback of a bug."""

    def format(self, record: logging.LogRecord) -> str:
        from vitalsd.text import one_line

        lines = [f"vitalsd: {one_line(record.getMessage())}"]
        if record.exc_info:
            lines += map(one_line, self.formatException(record.exc_info).splitlines())
        return "\n".join(lines)


class _Json(logging.Formatter):
    """Format a record as one object on one line, in ASCII: no name in it can break the line or control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        from vitalsd.text import iso, shortened

        entry = {
            "time": iso(round(record.created * 1e9)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shortened(record.getMessage()),
        }
        if record.exc_info:
            entry["exception"] = "\n".join(map(shortened, self.formatException(record.exc_info).splitlines()))
        return json.dumps(entry)


@contextmanager
def logging_as(form: str) -> Iterator[logging.Logger]:
    """
    Log to stderr for as long as the context lasts: from INFO for vitalsd, from WARNING for other libraries.

    With ``json`` the error that ends the command is a line of JSON too.

    Args:
        form: ``text`` or ``json``.
    """
    # Some supervisors start a process without a stderr.
    handler = logging.NullHandler() if sys.stderr is None else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    log, root = logging.getLogger("vitalsd"), logging.getLogger()
    before = log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield log
    except click.ClickException as error:
        if form != "json":
            raise
        log.error(error.format_message())
        raise SystemExit(error.exit_code) from None
    except Exception:
        if form != "json":
            raise
        log.critical("a bug in vitalsd", exc_info=True)
        raise SystemExit(1) from None
    finally:
        logging.captureWarnings(False)
        log.setLevel(before)
        root.removeHandler(handler)
