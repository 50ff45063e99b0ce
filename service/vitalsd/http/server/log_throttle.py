"""What the service has to say, and no flood of it."""

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
    A logger of errors: one line of a kind a second, with a traceback one a minute, and how many it left out.

    Whoever is at the other end of a connection decides how often a thing happens: a line each would
    fill a disk, and a pipe that nobody reads would stop the service. What a client did wrong is no
    error of ours; it is told so, and not logged at all.

    Args:
        logger: says it.
        clock: monotonic seconds.
    """

    level = logging.ERROR
    """uvicorn looks at it too, to see whether to trace every connection."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logger)
        self._clock = clock
        self._kinds: dict[tuple[str, type], tuple[float, int]] = {}

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if level < self.level:
            return
        error = kwargs.get("exc_info")
        left_out = self._suppressed_count(str(msg), error)
        if left_out is not None:
            more = f" ({left_out} more since it was last said)" if left_out else ""
            super().log(level, f"{str(msg).rstrip()}{more}", *args, **kwargs)

    def loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """
        An event loop's handler of exceptions.

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
        """How many of this kind were left out before this one; ``None`` if it is left out too."""
        key = kind, type(error)
        now = self._clock()
        since, left_out = self._kinds.get(key, (float("-inf"), 0))
        if now - since < (LOG_TRACEBACK_S if isinstance(error, BaseException) else LOG_LINE_S):
            self._kinds[key] = since, left_out + 1
            return None
        if len(self._kinds) >= MAX_KINDS:
            self._kinds.clear()
        self._kinds[key] = now, 0
        return left_out
