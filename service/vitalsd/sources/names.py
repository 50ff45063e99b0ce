"""Name the threads of this process as `threading` does, where the kernel has no name for them."""

import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from vitalsd.snapshot import Identity, Part, Snapshot, ThreadRoster
from vitalsd.sources.base import Source, ThreadLook

__all__ = ["Inherited", "PythonNames", "decode_name", "names_by_id", "publish_names"]

COMM_BYTES = 15
"""Bytes of a thread's name that Linux keeps."""
MAX_INHERITED = 4096
"""Names that `Inherited` remembers; a limit, because a program may name each of a million threads differently."""


class PythonNames:
    """
    A source of this process that gives unnamed threads the names that Python has for them.

    Before 3.14 Python does not pass the names of its threads to the kernel. On Linux such a thread has the name of the
    thread that made it: that of the main thread, or one that `publish_names` set; on macOS it has none. A thread that
    was named in another way keeps that name.

    Args:
        source: of this process.
        threads: the threads that Python knows.
    """

    def __init__(self, source: Source, threads: Callable[[], Iterable[threading.Thread]] = threading.enumerate) -> None:
        self._source = source
        self._threads = threads
        self._given = ThreadRoster()
        self._known: list[tuple[int | None, str]] = []
        self._roster = ThreadRoster()

    def identity(self) -> Identity:
        """Return the identity that the wrapped source has."""
        return self._source.identity()

    def restart(self) -> None:
        """Restart the wrapped source."""
        self._source.restart()

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """Look at a thread through the wrapped source."""
        return self._source.look_at(tid, closely=closely)

    def close(self) -> None:
        """Close the wrapped source."""
        self._source.close()

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        """Return a snapshot of the wrapped source with the names of Python; the kernel's are in `public_roster`."""
        taken = self._source.snapshot(parts=parts, names=names)
        # A thread that eventlet or gevent made has no id of the kernel.
        known = [
            (getattr(thread, "native_id", None), _name(thread))
            for thread in self._threads()
            if _is_named_by_python(thread)
        ]
        if taken.roster != self._given or known != self._known:
            self._given, self._known = taken.roster, known
            self._roster = self._named(taken.roster, dict(known)).sharing(self._roster)
        return replace(taken, roster=self._roster, public_roster=self._given)

    def _named(self, given: ThreadRoster, known: dict[int | None, str]) -> ThreadRoster:
        main = getattr(threading.main_thread(), "native_id", None) or os.getpid()
        for tid, name in zip(given.tids, given.names, strict=True):
            if tid == main:
                _inherited.add(name)
        names = tuple(
            known[tid] if tid in known and tid != main and name in _inherited else name
            for tid, name in zip(given.tids, given.names, strict=True)
        )
        return replace(given, names=names)


def publish_names() -> None:
    """
    Pass the names of the threads that Python knows to the kernel, so that a sidecar in another process sees them.

    Python 3.14 and later do that themselves. On Linux a thread has the name of the thread that made it until then; a
    thread that was named in another way keeps its name. Platform limit: nothing is done on macOS, where a thread can
    name only itself.
    """
    if sys.platform != "linux" or sys.version_info >= (3, 14):
        return
    _inherited.add(_comm(os.getpid()))
    for tid, name in names_by_id().items():
        given, present = _cut(name), _comm(tid)
        if not given or present is None or present not in _inherited:
            continue
        if present != decode_name(given):
            with suppress(OSError), open(f"/proc/self/task/{tid}/comm", "wb") as file:
                file.write(given)
        _inherited.add(
            decode_name(given)
        )  # also if it has this name already: so names of living threads stay among the newest


def names_by_id() -> dict[int, str]:
    """Return the names of the threads that Python knows, except the main thread, by the kernel's id."""
    main = threading.main_thread()
    # A thread that eventlet or gevent made is a greenlet, with the id of the main thread or none.
    others = (None, os.getpid(), getattr(main, "native_id", None))
    threads = [thread for thread in threading.enumerate() if thread is not main and _is_named_by_python(thread)]
    names = [(getattr(thread, "native_id", None), _name(thread)) for thread in threads]
    return {tid: name for tid, name in names if tid not in others and name}


class Inherited:
    """
    The names that a thread of this process may have inherited from the thread that made it.

    Args:
        limit: number of names that are remembered; the oldest ones are removed first.
    """

    def __init__(self, limit: int = MAX_INHERITED) -> None:
        self._limit = limit
        self._names: dict[str, None] = {}
        self._of_exec: frozenset[str] | None = None

    def __contains__(self, name: str) -> bool:
        """Return whether a thread may have inherited `name`."""
        if self._of_exec is None:  # read on first use, so that an import has no effect
            self._of_exec = _names_of_exec() if sys.platform == "linux" else frozenset(("",))
        return name in self._of_exec or name in self._names

    def add(self, name: str | None) -> None:
        """Remember a name that threads may inherit from now on: of the main thread, or one that `publish_names` set."""
        if name is None:
            return
        self._names.pop(name, None)
        self._names[name] = None
        while len(self._names) > self._limit:
            # Another thread may do the same at this moment: then the name is gone already.
            with suppress(StopIteration, RuntimeError):
                self._names.pop(next(iter(self._names)), None)


_inherited = Inherited()


def _names_of_exec() -> frozenset[str]:
    """
    Return the names that the kernel may have given the process at exec.

    The kernel uses the name of the executed file, also if that is a script or a link. Later the main thread may get
    another name.
    """
    paths: list[object] = [sys.executable, *sys.orig_argv[:1], *sys.argv[:1]]
    with suppress(OSError):
        paths.append(os.readlink("/proc/self/exe"))
    names = (os.fsencode(os.path.basename(path)) for path in paths if isinstance(path, str))
    return frozenset(("", *(decode_name(name[:COMM_BYTES]) for name in names)))


def _is_named_by_python(thread: threading.Thread) -> bool:
    """Return whether `threading` started it: it calls others Dummy-1, so the kernel's name is better for those."""
    return not isinstance(thread, threading._DummyThread)


def _name(thread: threading.Thread) -> str:
    """Return the name of a thread in valid UTF-8; "" if the name is not text."""
    try:
        name: object = thread.name
    except Exception:  # noqa: BLE001 - a property of the host's class may raise; a mark or a fetch must not
        return ""
    # A surrogate could neither be recorded nor sent.
    return name.encode("utf-8", "replace").decode() if isinstance(name, str) else ""


def _comm(tid: int) -> str | None:
    try:
        with open(f"/proc/self/task/{tid}/comm", "rb") as file:
            return decode_name(file.read().removesuffix(b"\n"))
    except OSError:
        return None


def _cut(name: str) -> bytes:
    """Return the part of a name that Linux keeps, in complete characters and up to a NUL."""
    kept = name.encode()[:COMM_BYTES].decode("utf-8", "ignore").encode()
    return kept.partition(b"\0")[0]


def decode_name(raw: bytes) -> str:
    r"""Decode a comm: UTF-8, and any other byte as ``\xNN``, so that two names never have the same text."""
    return raw.decode("utf-8", "backslashreplace")
