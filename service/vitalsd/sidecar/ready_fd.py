"""Report once, on a descriptor, that the sidecar is ready, or why it is not."""

import errno
import fcntl
import json
import os
from contextlib import suppress
from typing import Any

__all__ = ["ReadyFd"]


class ReadyFd:
    """
    Write one line of JSON to a descriptor, and close it.

    ``{"pid": ..., "url": ..., "socket": ..., "runtime_file": ..., "notes": [...]}`` or ``{"error": "a sentence"}``; for
    `spawn` also the token.

    Args:
        fd: ``None``: no process reads an answer.

    Raises:
        OSError: `fd` is not open.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "it cannot be written to")

    def send(self, **answer: Any) -> None:
        """Write the answer once; a reader that has closed the pipe is ignored."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(BrokenPipeError), os.fdopen(fd, "wb") as pipe:
                pipe.write(json.dumps(answer).encode() + b"\n")
