"""
Pass a note from a client to its sidecar that the client exits by itself: one word on a pipe.

Linux before 6.15 shows the exit status of a process to its parent alone, so without the note each normal exit of a
client would pass for a crash.
"""

import atexit
import os
import posix
import sys
from contextlib import suppress

__all__ = ["ExitNoteReader", "ExitNoteWriter", "died_of_exception"]

EXIT_NOTE = b"exit"
"""The word that the client writes; the sidecar accepts no other."""


class ExitNoteReader:
    """
    Read the note, at the sidecar's end of the pipe. A client that crashes writes nothing.

    Args:
        fd: ``None``: the client gives no notes.

    Raises:
        OSError: `fd` is not open.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)
            os.set_blocking(fd, False)

    def received(self) -> bool:
        """Return whether the client has written its note."""
        if self._fd is None:
            return False
        with suppress(OSError):
            return os.read(self._fd, len(EXIT_NOTE)) == EXIT_NOTE
        return False


class ExitNoteWriter:
    """
    Write the note at the exit of the interpreter, at the client's end of the pipe.

    Args:
        fd: the pipe; it stays open until `close`, or until this process ends.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._file = os.fstat(fd)
        self._owner = os.getpid()
        atexit.register(self._write)

    def close(self) -> None:
        """Close the pipe; nothing is written. A second call does nothing."""
        atexit.unregister(self._write)
        if self._is_ours():
            os.close(self._fd)
        self._owner = -1

    def _is_ours(self) -> bool:
        """Return False in a forked child, or if the descriptor is another file now."""
        try:
            return os.getpid() == self._owner and os.path.samestat(os.fstat(self._fd), self._file)
        except OSError:
            return False

    def _write(self) -> None:
        if not died_of_exception() and self._is_ours():
            with suppress(OSError):
                posix.write(self._fd, EXIT_NOTE)  # under eventlet that of os does not return, if the sidecar has ended


def died_of_exception() -> bool:
    """Return whether this interpreter exits because of an exception that no code caught; SystemExit is none."""
    return getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
