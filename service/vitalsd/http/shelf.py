"""The directory of runs, read on a thread of its own."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from vitalsd.runs import RunDirectory
from vitalsd.worker import PATIENCE_NS, Hung, Worker

__all__ = ["Shelf"]

T = TypeVar("T")


class Shelf:
    """
    Earlier runs, for the routes.

    A file system that hangs costs this thread and nobody else: who asks for a run is told so after 5 s, and
    from then on at once, until the call returns.

    Args:
        runs: where they are.
    """

    def __init__(self, runs: RunDirectory) -> None:
        self._runs = runs
        self._worker = Worker("vitalsd-runs")

    async def read(self, call: Callable[[RunDirectory], T]) -> T:
        """
        What `call` returns or raises, called on the thread with the directory.

        Raises:
            Hung: the file system hangs. What was not begun by then is not done later either.
        """
        if await self._worker.hangs():
            raise _hung()
        future = asyncio.wrap_future(self._worker.submit(lambda: call(self._runs)))
        try:
            return await self._worker.answer(future)
        except Hung:
            future.cancel()
            raise _hung() from None

    async def hangs(self) -> bool:
        """Whether a call does not return."""
        return await self._worker.hangs()

    def stop(self, timeout_s: float) -> None:
        """End the thread, unless that takes longer."""
        self._worker.stop(timeout_s)


def _hung() -> Hung:
    return Hung(f"the directory of runs: a read has not returned for {PATIENCE_NS / 1e9:g} s")
