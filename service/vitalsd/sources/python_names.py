"""Names of the threads of this very process, from `threading`, where the kernel has none."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from vitalsd.snapshot import Identity, Snapshot
from vitalsd.sources import Source

__all__ = ["PythonNames"]


class PythonNames:
    """
    A source of this process whose unnamed threads are called as Python calls them.

    Before 3.14 Python names its threads for itself alone. On Linux such a thread goes by the name of
    the thread that made it, in the end that of the main thread; on macOS it has none. A thread that
    somebody did name keeps that name.

    Args:
        source: of this process.
        threads: the threads that Python knows.
    """

    def __init__(self, source: Source, threads: Callable[[], Iterable[threading.Thread]] = threading.enumerate) -> None:
        self._source = source
        self._threads = threads
        self._given: Sequence[str] = ()
        self._known: list[tuple[int | None, str]] = []
        self._names: Sequence[str] = ()

    def identity(self) -> Identity:
        return self._source.identity()

    def close(self) -> None:
        self._source.close()

    def snapshot(self, *, extras: bool = False, names: bool = True) -> Snapshot:
        taken = self._source.snapshot(extras=extras, names=names)
        known = [(thread.native_id, thread.name) for thread in self._threads()]
        # The recorder takes an unchanged list for unchanged names, and spares itself the comparison.
        if taken.names is not self._given or known != self._known:
            named = self._named(taken, dict(known))
            if named != self._names or taken.names is not self._given:
                self._names = named
            self._given, self._known = taken.names, known
        return replace(taken, names=self._names)

    def _named(self, taken: Snapshot, known: dict[int | None, str]) -> Sequence[str]:
        main = threading.main_thread().native_id
        inherited = {"", *(name for tid, name in zip(taken.tids, taken.names, strict=True) if tid == main)}
        return [
            known.get(tid, name) if name in inherited and tid != main else name
            for tid, name in zip(taken.tids, taken.names, strict=True)
        ]
