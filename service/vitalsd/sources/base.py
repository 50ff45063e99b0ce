"""
The `Source` protocol: one source reads one process, one module per kernel.

Errors a source may raise, each with a sentence that reaches the user as it is::

    SourceError
    ├── NoSuchProcessError  there is no such process
    ├── AccessDeniedError   it exists, and this user may not read it
    ├── TargetGoneError     it was being read and has exited (a reused pid counts as that)
    ├── UnsupportedError    this platform or kernel cannot give the number
    └── KernelError         the kernel answered something else
"""

import os
import signal
from contextlib import suppress
from typing import NamedTuple, Protocol

from vitalsd.snapshot import Identity, Snapshot

__all__ = [
    "AccessDeniedError",
    "Ending",
    "KernelError",
    "NoSuchProcessError",
    "ProcessEntry",
    "Source",
    "SourceError",
    "TargetGoneError",
    "UnsupportedError",
]


class SourceError(Exception):
    """The numbers cannot be had; ``str(error)`` says why in a sentence."""


class NoSuchProcessError(SourceError):
    """There is no such process."""


class AccessDeniedError(SourceError):
    """The process exists and this user may not read it."""


GENTLE = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))


class Ending(NamedTuple):
    """How a process ended."""

    well: bool
    """With status 0, or by a signal that asked it to end, as systemd.service(5) has it under ``Restart=``."""
    words: str

    @classmethod
    def of(cls, status: int) -> "Ending":
        """What a status of wait(2) says."""
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return cls(code == 0, f"exit status {code}")
        with suppress(ValueError):
            number = signal.Signals(-code)
            return cls(number in GENTLE, f"killed by {number.name}")
        return cls(False, f"killed by signal {-code}")


class TargetGoneError(SourceError):
    """The process has exited since it was opened, or is a zombie."""

    def __init__(self, reason: str, ending: Ending | None = None) -> None:
        super().__init__(reason)
        self.ending = ending
        """``None`` where the kernel tells only the parent."""


class UnsupportedError(SourceError):
    """This platform or kernel cannot give the numbers."""


class KernelError(SourceError):
    """The kernel refused or answered out of contract."""


class Source(Protocol):
    """
    Reads one process. Not thread-safe: all calls come from one thread.

    A source holds on to the process it was opened for: when that exits, even if its pid is given
    to another process, every later call raises `TargetGoneError`.
    """

    def identity(self) -> Identity:
        """
        Which run of which process this reads. Raises `SourceError`.

        A process that executes another program stays the same one; it is called as that from the next snapshot on.
        """
        ...

    def snapshot(self, *, extras: bool = False, names: bool = True) -> Snapshot:
        """
        Read the counters now.

        Args:
            extras: also read what only ``detail=full`` shows (dearer: one more file per thread).
            names: read again what the threads are called. If not, a name may be up to 2 s old where it costs
                a read of its own (Linux), or as in the snapshot before.

        Raises:
            SourceError: one of its subclasses; no partial snapshot is ever returned.
        """
        ...

    def restart(self) -> None:
        """
        Read every thread anew with the next snapshot, because the counters contradicted each other.

        Linux: which counter is used is decided again, too. Raises `SourceError`.
        """
        ...

    def close(self) -> None:
        """Release every descriptor and port. A second call does nothing."""
        ...


class ProcessEntry(NamedTuple):
    """A process this user may sample, as listed by `list_processes`."""

    pid: int
    name: str
    names: frozenset[str]
    """What ``--name`` may call it: its main thread, cut by Linux to 15 bytes, its program, and (Linux) its script."""
    started_unix_ns: int
    cpu_ns: int
    rss_bytes: int
    thread_count: int
    uids: frozenset[int]
    """Real, effective and saved user id, and that for file access on Linux: a set-user-ID program has several.
    Empty if the system does not tell."""
    parent: int
    """The pid of its parent."""

    def is_of(self, uid: int) -> bool:
        """Return whether all its user ids are `uid`, so that no other user has started it."""
        return self.uids == {uid}
