"""
Mark the environment of a sidecar that `spawn` starts, and read the mark in the new process.

By the marker a sidecar knows that a client reads its standard error and its ready line. An application that is run
again in place of a sidecar knows by it that it must start none.
"""

import os
import re
import stat
import sys
from contextlib import suppress
from threading import Lock

from vitalsd.sidecar.ready_fd import ReadyFd

__all__ = ["marker_of", "take_marker", "why_second_generation"]

MARKER = "VITALSD_SPAWNED"
"""Variable that holds the pid of the client, and the number and the inode of the sidecar's ready-fd."""


def marker_of(ready_fd: int) -> dict[str, str]:
    """Return the marker, as a variable of the environment, for a sidecar that gets `ready_fd` from this process."""
    return {MARKER: f"{os.getpid()}:{ready_fd}:{os.fstat(ready_fd).st_ino}"}


def take_marker(fd: int | None) -> bool:
    """
    Return whether `spawn` started this process, and remove the marker, which later children would inherit.

    Args:
        fd: the ready-fd.
    """
    marker = _marker()
    os.environ.pop(MARKER, None)
    return marker is not None and marker[1] == fd and _is_ready_fd(marker)


class _SecondGeneration:
    """What is one per process."""

    reason: str | None = None
    """Why this process may start no sidecar."""
    known = False
    """Whether the variable in the environment has been judged."""
    lock = Lock()
    """Held while the variable is judged, which happens only in a process that runs the application again."""


def why_second_generation() -> str | None:
    """
    Return why this process may start no sidecar; ``None``: it may.

    It may not if it was to be a sidecar and runs the application again, as where `sys.executable` is the application
    without a sign that it is frozen. The first call also sends the reason to the first process, which waits for its
    sidecar. Later calls return the reason too, as do calls in processes that this one starts while the first one lives.
    """
    if not _SecondGeneration.known and (marker := _marker()) is not None:
        with _SecondGeneration.lock:
            if not _SecondGeneration.known:
                _SecondGeneration.reason, _SecondGeneration.known = _why_refused(marker), True
    return _SecondGeneration.reason


def _why_refused(marker: tuple[int, int, int]) -> str | None:
    """Return the reason, and give it to the process that waits for it; ``None``: that one has ended long ago."""
    waits = _is_ready_fd(marker)
    if not waits and not _lives(marker[0]):
        return None
    reason = (
        f"to run {sys.executable} as a sidecar starts the application again, so it is no Python interpreter: call"
        ' vitalsd.freeze_support() first in its main module, or pass command=["/path/to/vitalsd"]'
    )
    if waits:
        with suppress(OSError):
            ReadyFd(marker[1]).send(error=reason)
    return reason


def _marker() -> tuple[int, int, int] | None:
    """Return pid, descriptor and inode; ``None`` if there are none, or `spawn` did not write them."""
    found = re.fullmatch(r"(\d{1,10}):(\d{1,9}):(\d{1,20})", os.environ.get(MARKER, ""))
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def _is_ready_fd(marker: tuple[int, int, int]) -> bool:
    """Return whether the pipe to the client is open here."""
    _, fd, inode = marker
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return fd > 2 and stat.S_ISFIFO(status.st_mode) and status.st_ino == inode


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return pid != os.getpid()
