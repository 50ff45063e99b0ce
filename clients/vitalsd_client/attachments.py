"""Read the attachments of a bug report, each on a thread of its own, and return a reason for each missing one."""

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vitalsd.contract.report_archive import Failure
from vitalsd_client.daemon_call import Call, start_call

__all__ = ["ATTACHMENT_BYTES", "Attachments", "Content", "check_content"]

MAX_ATTACHMENTS = 50
"""Attachments of one report: each has a reading thread of its own."""
ATTACHMENT_BYTES = 5 << 20
"""Default limit of one attachment, bytes."""
ALL_ATTACHMENTS_BYTES = 32 << 20
"""Limit of all attachments of a report together, bytes."""

Content = bytes | str | os.PathLike[str] | Callable[[], bytes | str]
"""Bytes, text, the file at a `pathlib.Path`, or a function that returns bytes or text."""


@dataclass(frozen=True, slots=True)
class _Attachment:
    member: str
    content: Content
    limit: int
    tail: bool = False
    """Whether to take the last `limit` bytes of a larger file instead of failing."""


class Attachments:
    """Hold the attachments of one report in the order of `add`; at most `MAX_ATTACHMENTS`."""

    def __init__(self) -> None:
        self._all: list[_Attachment] = []
        self._reading: list[tuple[_Attachment, Call[bytes] | None]] = []

    def add(self, name: str, content: Content, limit: int, *, tail: bool = False) -> None:
        """Add an attachment, to be read by `start`. Raises `ValueError` above `MAX_ATTACHMENTS`."""
        if len(self._all) >= MAX_ATTACHMENTS:
            raise ValueError(f"a report has at most {MAX_ATTACHMENTS} attachments")
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".") or "attachment"
        self._all.append(_Attachment(f"attachments/{len(self._all) + 1:02}-{safe}", content, limit, tail))

    def start(self) -> None:
        """Begin to read all of them, each on a thread of its own."""
        self._reading = [(each, start_call(partial(_read, each))) for each in self._all]

    def collect(self, deadline: float, members: dict[str, bytes], failures: list[Failure]) -> None:
        """
        Put the attachments that have been read into `members`, and a reason for each of the others into `failures`.

        Args:
            deadline: monotonic time, s; the calls that still read then are abandoned.
            members: content by the name of the member, extended in place.
            failures: extended in place.
        """
        left = ALL_ATTACHMENTS_BYTES
        for attachment, call in self._reading:
            content = _outcome(attachment, call, deadline, left)
            if isinstance(content, Failure):
                failures.append(content)
            else:
                members[attachment.member] = content
                left -= len(content)


def check_content(name: str, content: Content) -> None:
    """Raise `ValueError` if `content` is not a `Content`, or is text that is the path of a file."""
    if not (isinstance(content, (bytes, str, os.PathLike)) or callable(content)):
        raise ValueError(
            f"the content of {name!r:.80} is bytes, text, a path or a function that returns bytes or text, not"
            f" {type(content).__name__}; to attach a file, call attach_file(path)"
        )
    if isinstance(content, str) and _names_file(content):
        raise ValueError(
            f"the content of {name!r:.80} is text, and that text is the path of a file;"
            " to attach the file, call attach_file(path)"
        )


def _names_file(text: str) -> bool:
    """Return whether `text` is the path of an existing file: the caller probably means its content."""
    try:
        return 0 < len(text) < 4096 and "\n" not in text and os.path.isfile(text)
    except ValueError:  # a NUL
        return False


def _outcome(attachment: _Attachment, call: Call[bytes] | None, deadline: float, left: int) -> bytes | Failure:
    """Return the content of an attachment, or why it is missing; `left` is the rest of the budget of bytes."""
    if call is None or not call.wait(deadline - time.monotonic()):
        return Failure(attachment.member, "it did not come in time")
    try:
        content = call.result()
    except _TooLargeError as error:
        return Failure(attachment.member, str(error))
    except OSError as error:
        return Failure(attachment.member, f"it cannot be read: {error.strerror or type(error).__name__}")
    except BaseException as error:  # noqa: BLE001 - the program's own function; its text may say anything
        return Failure(attachment.member, f"it raised {type(error).__name__}")
    if len(content) > left:
        return Failure(
            attachment.member, f"all attachments together would have more than {ALL_ATTACHMENTS_BYTES} bytes"
        )
    return content


class _TooLargeError(Exception):
    """Report that an attachment is over its limit; ``str(error)`` has both sizes."""


def _read(attachment: _Attachment) -> bytes:
    """Return the content as bytes, on the thread of its `Call`. Raises `_TooLargeError`, `OSError`, `TypeError`."""
    content = attachment.content
    if callable(content):
        content = content()
    if isinstance(content, os.PathLike):
        content = _read_file(Path(content), attachment.limit, tail=attachment.tail)
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    if not isinstance(content, bytes):
        raise TypeError
    if len(content) > attachment.limit:
        raise _TooLargeError(f"it has {len(content)} bytes, and the limit is {attachment.limit}")
    return content


def _read_file(path: Path, limit: int, *, tail: bool) -> bytes:
    """Return the bytes of a regular file, or its last `limit` bytes. Raises `_TooLargeError`, `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a FIFO without a writer
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if tail:
            file.seek(max(0, found.st_size - limit))
            return file.read(limit)
        if found.st_size > limit:
            raise _TooLargeError(f"it has {found.st_size} bytes, and the limit is {limit}")
        return file.read(limit + 1)
