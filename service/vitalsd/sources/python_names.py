"""Names of the threads of this very process, from `threading`, where the kernel has none."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from vitalsd.snapshot import Identity, Snapshot
from vitalsd.sources import Source

__all__ = ["PythonNames", "names_by_id", "publish_names"]

COMM_BYTES = 15
"""Of a thread's name, as Linux keeps it."""


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
        # Of a thread that eventlet or gevent made there is no id of the kernel.
        known = [(getattr(thread, "native_id", None), thread.name) for thread in self._threads()]
        # The recorder takes an unchanged list for unchanged names, and spares itself the comparison.
        if taken.names is not self._given or known != self._known:
            named = self._named(taken, dict(known))
            if named != self._names or taken.names is not self._given:
                self._names = named
            self._given, self._known = taken.names, known
        return replace(taken, names=self._names)

    def _named(self, taken: Snapshot, known: dict[int | None, str]) -> Sequence[str]:
        main = getattr(threading.main_thread(), "native_id", None) or os.getpid()
        inherited = {"", *(name for tid, name in zip(taken.tids, taken.names, strict=True) if tid == main)}
        return [
            known.get(tid, name) if name in inherited and tid != main else name
            for tid, name in zip(taken.tids, taken.names, strict=True)
        ]


def publish_names() -> None:
    """
    Give the kernel the names of the threads that Python knows, so that a sidecar beside this process sees them.

    Python does that itself since 3.14. On Linux such a thread has the name of the main thread until then; a thread that
    was named otherwise keeps its name. macOS lets a thread name itself alone, so nothing is done there.
    """
    if sys.platform != "linux" or sys.version_info >= (3, 14):
        return
    inherited = _comm(os.getpid())
    for tid, name in names_by_id().items():
        with suppress(OSError):
            if inherited is not None and _comm(tid) == inherited:
                with open(f"/proc/self/task/{tid}/comm", "wb") as file:
                    file.write(_cut(name))


def names_by_id() -> dict[int, str]:
    """Return the names of the threads that Python knows, but for the main thread, by the kernel's id."""
    main = threading.main_thread()
    # A thread that eventlet or gevent made is a greenlet, with the id of the main thread or none.
    others = (None, os.getpid(), getattr(main, "native_id", None))
    threads = [thread for thread in threading.enumerate() if thread is not main and thread.name]
    return {tid: thread.name for thread in threads if (tid := getattr(thread, "native_id", None)) not in others}


def _comm(tid: int) -> bytes | None:
    try:
        with open(f"/proc/self/task/{tid}/comm", "rb") as file:
            return file.read()
    except OSError:
        return None


def _cut(name: str) -> bytes:
    """Return as much of a name as Linux keeps, in whole characters."""
    return name.encode("utf-8", "replace")[:COMM_BYTES].decode("utf-8", "ignore").encode()
