"""Read the directory of runs on a thread of its own, because its file system may hang."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_files import has_run_name
from vitalsd.worker_thread import Worker

__all__ = ["RunDirectoryReader"]

T = TypeVar("T")


class RunDirectoryReader:
    """
    Read the directory of runs, for the routes.

    A file system that hangs blocks this thread alone: callers get `HungError` after 5 s, and then at once until the
    call returns.

    Args:
        runs: the directory.
    """

    def __init__(self, runs: RunDirectory) -> None:
        self._runs = runs
        self.worker = Worker("vitalsd-runs")
        """The thread that reads the directory."""

    async def read(self, call: Callable[[RunDirectory], T]) -> T:
        """
        Call `call` with the directory, on the thread, and return or raise what it does.

        Raises:
            HungError: the file system hangs. A `call` that has not begun is cancelled.
        """
        return await self.worker.run(lambda: call(self._runs), "the directory of runs: a read")

    async def has(self, run_id: str) -> bool:
        """
        Return whether there is a run with this id, by the name of its file, which is not read.

        Raises:
            HungError: the file system hangs.
        """

        def found(runs: RunDirectory) -> bool:
            with suppress(OSError):
                return any(path.stem == run_id and has_run_name(path) for path in runs.path.glob("*.sqlite"))
            return False

        return await self.read(found)
