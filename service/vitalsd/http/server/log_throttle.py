"""Throttle the log: clients decide how often an error happens, and must not fill a disk with it."""

import asyncio
import errno
import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from vitalsd.contract.limits import LOG_LINE_S, LOG_TRACEBACK_S

__all__ = ["ThrottledLogger"]

MAX_KINDS = 64


class ThrottledLogger(logging.LoggerAdapter[logging.Logger]):
    """
    Log errors: one line of a kind a second, with a traceback one a minute, and how many were suppressed.

    A line for each would fill a disk, and stop the sidecar once it blocks on a pipe that is not read. What a client did
    wrong is answered, and not logged at all.

    Args:
        logger: writes the lines.
        clock: monotonic seconds.
    """

    level = logging.ERROR
    """uvicorn reads it as well, to decide whether to trace every connection."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logger)
        self._clock = clock
        self._kinds: dict[tuple[str, type], tuple[float, int]] = {}

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if level < self.level:
            return
        error = kwargs.get("exc_info")
        suppressed = self._suppressed_count(str(msg), error)
        if suppressed is not None:
            more = f" ({suppressed} more since it was last said)" if suppressed else ""
            super().log(level, f"{str(msg).rstrip()}{more}", *args, **kwargs)

    def loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """
        Handle an exception of the event loop.

        Without it asyncio logs a traceback for each connection that waits while there are no
        descriptors left, and tries them all again at every turn.
        """
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self.error("out of file descriptors: new connections wait")
        elif self._suppressed_count(context["message"], error) is not None:
            loop.default_exception_handler(context)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs

    def _suppressed_count(self, kind: str, error: object) -> int | None:
        """Return how many of this kind were suppressed before this one; None if it is suppressed too."""
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
