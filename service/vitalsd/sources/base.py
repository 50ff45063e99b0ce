"""
Define the `Source` protocol and its errors. One source reads one process; each kernel has its own package.

A source raises these errors; the user gets the text of each unchanged::

    SourceError
    ├── NoSuchProcessError  there is no such process
    ├── AccessDeniedError   the process exists, and this user may not read it
    ├── TargetGoneError     the process was being read and has exited, also if its pid was reused
    ├── UnsupportedError    this platform or kernel cannot give the numbers
    └── KernelError         the kernel gave an unexpected answer
"""

import os
import signal
from contextlib import suppress
from typing import NamedTuple, Protocol

from vitalsd.snapshot import Identity, Part, Snapshot

__all__ = [
    "AccessDeniedError",
    "ExitStatus",
    "KernelError",
    "NoSuchProcessError",
    "ProcessEntry",
    "Source",
    "SourceError",
    "TargetGoneError",
    "ThreadLook",
    "UnsupportedError",
]


class SourceError(Exception):
    """The numbers cannot be read; ``str(error)`` states why in a sentence."""


class NoSuchProcessError(SourceError):
    """There is no such process."""


class AccessDeniedError(SourceError):
    """The process exists and this user may not read it."""


TERMINATION_SIGNALS = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))
"""Signals that request termination: an exit by one of them is clean, as in systemd.service(5) under ``Restart=``."""


class ExitStatus(NamedTuple):
    """How a process ended."""

    is_clean: bool
    """Whether it ended with status 0 or by a signal in `TERMINATION_SIGNALS`."""
    description: str
    """Description of the end: the exit status or the signal."""

    @classmethod
    def of(cls, status: int) -> "ExitStatus":
        """Decode a status of wait(2)."""
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return cls(code == 0, f"exit status {code}")
        with suppress(ValueError):
            number = signal.Signals(-code)
            return cls(number in TERMINATION_SIGNALS, f"killed by {number.name}")
        return cls(False, f"killed by signal {-code}")


class TargetGoneError(SourceError):
    """The process has exited since it was opened, or is a zombie."""

    def __init__(self, reason: str, exit_status: ExitStatus | None = None) -> None:
        super().__init__(reason)
        self.exit_status = exit_status
        """How it ended; ``None``: unknown, because the kernel reports it only to the parent."""


class UnsupportedError(SourceError):
    """This platform or kernel cannot give the numbers."""


class KernelError(SourceError):
    """The kernel refused a call, or its answer does not have the documented form."""


class ThreadLook(NamedTuple):
    """
    What one thread does now, and its counters; ``None`` where the platform does not give a value.

    The counters grow from the start of the thread.
    """

    monotonic_ns: int
    """Time just before the counters were read, ns."""
    cpu_ns: int
    """CPU time, ns."""
    wait_ns: int | None = None
    """Time that it was runnable and had no CPU, ns. The kernel adds a wait when the wait is over. Linux only."""
    slices: int | None = None
    """Number of times that it got a CPU. Linux only."""
    state: str | None = None
    """What it does, as in `Snapshot.state`: ``running`` also means runnable. ``None``: not asked."""
    major_faults: int | None = None
    """Page faults that waited for a disk. Linux only."""
    wait_channel: str | None = None
    """
    Function of the kernel in which it sleeps, or ``poll``, ``epoll``, ``select``, ``futex`` or ``frozen`` where the
    kernel has several functions for that. ``None``: it does not sleep, or the kernel does not let this user read it.
    Linux only.
    """


class Source(Protocol):
    """
    A reader of one process. Not thread-safe: call it from one thread only.

    A source stays bound to the process for which it was opened: after that has exited, every call raises
    `TargetGoneError`, even if another process gets the pid.
    """

    def identity(self) -> Identity:
        """
        Return which run of which process this reads. Raises `SourceError`.

        A process that executes another program stays the same one; its name changes with the next snapshot.
        """
        ...

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        """
        Read the counters now.

        Args:
            parts: what the snapshot has beside its counters.
            names: read the names of the threads again. If False, a name may be up to 2 s old on Linux, where it
                costs a read of its own, or as in the snapshot before.

        Raises:
            SourceError: one of its subclasses; a partial snapshot is never returned.
        """
        ...

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """
        Look at one thread, without a snapshot.

        Args:
            tid: its id.
            closely: whether to read `ThreadLook.state`, `major_faults` and `wait_channel`, which triples the cost.

        Returns:
            ``None`` if the process has no such thread, or does not exist any more.

        Raises:
            SourceError: the thread cannot be read.
        """
        ...

    def restart(self) -> None:
        """
        Read every thread anew with the next snapshot, because the counters contradicted each other.

        On Linux also choose the counter again. Raises `SourceError`.
        """
        ...

    def close(self) -> None:
        """Release every descriptor and port. A second call does nothing."""
        ...


class ProcessEntry(NamedTuple):
    """A process that this user may sample, as `list_processes` returns it."""

    pid: int
    name: str
    names: frozenset[str]
    """
    Names that ``--name`` matches: of its main thread, which Linux cuts to 15 bytes, of its program, and on Linux of its
    script.
    """
    started_unix_ns: int
    cpu_ns: int
    rss_bytes: int
    thread_count: int
    uids: frozenset[int]
    """
    Real, effective and saved user id, and on Linux that for file access; a set-user-ID program has several of them.
    Empty if the system does not report them.
    """
    parent: int
    """The pid of its parent."""

    def is_of(self, uid: int) -> bool:
        """Return whether all its user ids are `uid`, so that no other user has started it."""
        return self.uids == {uid}
