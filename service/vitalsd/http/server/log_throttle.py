"""Limit the rate of log lines: clients decide how often an error happens, and must not fill a disk with lines."""

import asyncio
import errno
import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from vitalsd.contract.limits import LOG_LINE_S, LOG_TRACEBACK_S

__all__ = ["ThrottledLogger"]

MAX_KINDS = 64
"""Kinds of errors to count at most; at the limit all counts start again."""


class ThrottledLogger(logging.LoggerAdapter[logging.Logger]):
    """
    Log errors with a rate limit for each kind: a line each second, a traceback each minute, with a suppressed count.

    A line for each error would fill a disk, and stop the sidecar when it blocks on a pipe that is not read. An error of
    a client is answered, not logged.

    Args:
        logger: writes the lines.
        clock: monotonic time, s.
    """

    level = logging.ERROR
    """Lowest level that is logged; uvicorn reads it too, to decide whether to trace every connection."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logger)
        self._clock = clock
        self._kinds: dict[tuple[str, type], tuple[float, int]] = {}

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line if `level` is high enough and the rate limit allows it."""
        if level < self.level:
            return
        error = kwargs.get("exc_info")
        suppressed = self._suppressed_count(str(msg), error)
        if suppressed is not None:
            more = f" ({suppressed} more since it was last said)" if suppressed else ""
            super().log(level, f"{str(msg).rstrip()}{more}", *args, **kwargs)

    def loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """
        Log an exception of the event loop, with the rate limit.

        By default asyncio logs a traceback for each connection that waits while no descriptor is free, and tries all of
        them again at every turn.
        """
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self.error("out of file descriptors: new connections wait")
        elif self._suppressed_count(context["message"], error) is not None:
            loop.default_exception_handler(context)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message unchanged: there is no context to add."""
        return msg, kwargs

    def _suppressed_count(self, kind: str, error: object) -> int | None:
        """Return the number of suppressed errors of this kind before this one; None: suppress this one too."""
        key = kind, type(error)
        now = self._clock()
        since, suppressed = self._kinds.get(key, (float("-inf"), 0))
        if now - since < (LOG_TRACEBACK_S if isinstance(error, BaseException) else LOG_LINE_S):
            self._kinds[key] = since, suppressed + 1
            return None
        if len(self._kinds) >= MAX_KINDS:
            self._kinds.clear()
        self._kinds[key] = now, 0
        return suppressed
