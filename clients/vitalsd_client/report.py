"""
A bug report of the program that calls: what the sidecar knows, what the user says, what the program adds.

Three moments: `BugReport.collect` at the key press, within the window and two seconds; `BugReport.preview`
before the user agrees; `BugReport.save` after that, of exactly the bytes that were shown.
"""

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vitalsd.model import Unavailable
from vitalsd_client.archive import (
    HISTORY,
    METADATA,
    METRICS,
    PREVIOUS_RUN,
    Bundle,
    Failure,
    check_app,
    metadata,
    new_report_id,
    seal,
)
from vitalsd_client.client import BUDGET_S, Mode, fetch
from vitalsd_client.past import Past
from vitalsd_client.patience import Call

__all__ = ["BugReport", "Content", "Outbox", "Redact"]

MAX_ATTACHMENTS = 50
ATTACHMENT_BYTES = 5 << 20
ALL_ATTACHMENTS_BYTES = 32 << 20

T = TypeVar("T")

Content = bytes | str | os.PathLike[str] | Callable[[], bytes | str]
"""Bytes, text, the file at a `pathlib.Path`, or a function that returns bytes or text."""
Redact = Callable[[str, bytes], bytes | None]
"""Given a member's name and content, what of it may go out; ``None``: nothing."""


class Outbox(Protocol):
    """What `BugReport.submit` needs of a `Spool`."""

    def add(self, bundle: Bundle) -> str: ...


@dataclass(frozen=True, slots=True)
class _Attachment:
    member: str
    content: Content
    limit: int


class BugReport:
    """
    One report. Nothing of it is written anywhere before `save`.

    Environment, command lines, user and host names and paths under the home directory never enter by
    themselves. What the program attaches, names its threads, or the user writes, is theirs: see `redact`.

    Args:
        app: begins the name of the file; letters, digits, ``.``, ``_`` and ``-``.
        app_version: as the program calls it.
        description: what the user says; may be set until the report is saved.
        window_ms: window of the metrics, 10 to 60000 ms.
        mode: see `fetch`.
        history_s: how far back the history goes, 1 to 86400 s.
        url: of a sidecar, instead of looking for one; see `fetch`.
        socket: likewise.
        pid: another process than this one.
        direct: measure this process from within if there is no sidecar.
        redact: each is given every member before it is shown or written; one that fails loses the member.
        triggered: when it was asked for; default: now.

    Raises:
        ValueError: `app` cannot be part of a file's name, or a number is out of range.
    """

    def __init__(
        self,
        app: str,
        *,
        app_version: str = "",
        description: str = "",
        window_ms: int = 2000,
        mode: Mode = "auto",
        history_s: int = 300,
        url: str | None = None,
        socket: str | os.PathLike[str] | None = None,
        pid: int | None = None,
        direct: bool = False,
        redact: Sequence[Redact] = (),
        triggered: datetime | None = None,
    ) -> None:
        self.app = check_app(app)
        _check("window_ms", window_ms, 10, 60_000)
        _check("history_s", history_s, 1, 86_400)
        self.report_id = new_report_id()
        self._app_version = app_version
        self._description = description
        self._window_ms, self._mode = window_ms, mode
        self._past = Past(history_s, url=url, socket=socket, pid=pid)
        self._url, self._socket, self._pid, self._direct = url, socket, pid, direct
        self._redact = tuple(redact)
        self._triggered = triggered or datetime.now(UTC)
        self._attachments: list[_Attachment] = []
        self._collected: dict[str, bytes] | None = None
        self._failures: list[Failure] = []
        self._platform = ""
        self._sealed: Bundle | None = None
        self._previous_run: str | None = None

    @property
    def description(self) -> str:
        """What the user says. Setting it after a preview makes a new preview due."""
        return self._description

    @description.setter
    def description(self, text: str) -> None:
        self._description = text
        self._sealed = None

    def attach(self, name: str, content: Content, *, limit: int = ATTACHMENT_BYTES) -> None:
        """
        Add a member ``attachments/<number>-<name>`` when the report is collected.

        It cannot sink the report: what is too large, cannot be read, raises or does not return in time is
        left out, and the manifest says so.

        Args:
            name: characters other than ``A-Z a-z 0-9 . _ -`` become ``_``.
            content: see `Content`.
            limit: bytes.

        Raises:
            ValueError: it comes after `collect`, or is one too many.
        """
        if self._collected is not None:
            raise ValueError("the report has been collected; attach before that")
        if len(self._attachments) >= MAX_ATTACHMENTS:
            raise ValueError(f"a report has at most {MAX_ATTACHMENTS} attachments")
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".") or "attachment"
        member = f"attachments/{len(self._attachments) + 1:02}-{safe}"
        self._attachments.append(_Attachment(member, content, limit))

    def collect(self) -> None:
        """
        Ask the sidecar and read the attachments, all at once, within the window and 2 s; never raises.

        A second call does nothing.
        """
        if self._collected is not None:
            return
        deadline = time.monotonic() + self._window_ms / 1000 + BUDGET_S
        reading = [(each, _start(partial(_read, each))) for each in self._attachments]
        past = _start(lambda: self._past.read(deadline - 0.2))
        metrics = fetch(
            self._window_ms, self._mode, url=self._url, socket=self._socket, pid=self._pid, direct=self._direct
        )
        self._platform = metrics.platform
        members = {METRICS: metrics.model_dump_json(by_alias=True, exclude_unset=True).encode()}
        failures = [Failure(METRICS, metrics.reason)] if isinstance(metrics, Unavailable) else []
        if past is not None and past.wait(deadline - time.monotonic()):
            found, missing = past.result()
            members |= found
            failures += missing
        else:
            failures.append(Failure(HISTORY, "the sidecar's record did not come in time"))
        room = ALL_ATTACHMENTS_BYTES
        for attachment, call in reading:
            content = _outcome(attachment, call, deadline, room)
            if isinstance(content, Failure):
                failures.append(content)
            else:
                members[attachment.member] = content
                room -= len(content)
        self._collected, self._failures = members, failures

    def preview(self) -> Mapping[str, bytes]:
        """The members as they will be written, redacted, to the byte. Collects first if need be."""
        return self.bundle().members

    def bundle(self) -> Bundle:
        """The sealed report, for `Spool.add`. Collects first if need be; the same object until something changes."""
        if self._sealed is None:
            self.collect()
            self._sealed = self._seal(datetime.now(UTC))
        return self._sealed

    def save(self, directory: str | os.PathLike[str] = ".") -> Path:
        """
        Write ``<app>-bugreport-YYYY-MM-DDTHH-MM-SSZ.zip`` into `directory`, which is made if it alone is missing.

        Whole or not at all, mode 0600.

        Raises:
            OSError: it could not be written; nothing is left behind, and it can be tried elsewhere.
        """
        path = self.bundle().write(Path(directory))
        self._delivered()
        return path

    def submit(self, spool: "Outbox") -> str:
        """
        Put it into a `Spool`, from where it is uploaded, and return the report's id.

        Raises:
            SpoolError: it cannot be kept there; nothing is lost, it can still be saved.
        """
        report_id = spool.add(self.bundle())
        self._delivered()
        return report_id

    def _delivered(self) -> None:
        """It is in safe hands: a crashed run that it tells of is not to be told of again."""
        run, self._previous_run = self._previous_run, None
        if run is not None:
            deadline = time.monotonic() + 1
            call = _start(lambda: self._past.mark_reported(run, deadline))
            if call is not None:
                call.wait(1)

    def _seal(self, submitted: datetime) -> Bundle:
        assert self._collected is not None
        about = metadata(
            app=self.app,
            app_version=self._app_version,
            vitalsd_version=version("vitalsd"),
            report_id=self.report_id,
            triggered=self._triggered,
            submitted=submitted,
            description=self._description,
            platform=self._platform,
        )
        members: dict[str, bytes] = {}
        failures = list(self._failures)
        for name, content in {METADATA: about, **self._collected}.items():
            kept = self._redacted(name, content)
            if isinstance(kept, Failure):
                failures.append(kept)
            else:
                members[name] = kept
        self._previous_run = self._past.run_id if PREVIOUS_RUN in members else None
        return seal(self.app, self.report_id, submitted, members, failures)

    def _redacted(self, name: str, content: bytes) -> bytes | Failure:
        for redact in self._redact:
            try:
                kept = redact(name, content)
            except Exception as error:  # noqa: BLE001 - what a hook could not look through does not go out
                return Failure(name, f"left out: a redact hook raised {type(error).__name__}")
            if kept is None:
                return Failure(name, "left out by a redact hook")
            if not isinstance(kept, bytes):
                return Failure(name, f"left out: a redact hook returned {type(kept).__name__}")
            content = kept
        return content


def _check(name: str, number: Any, least: int, most: int) -> None:
    if not isinstance(number, int) or not least <= number <= most:
        raise ValueError(f"{name} is a whole number from {least} to {most}")


def _start(work: Callable[[], T]) -> Call[T] | None:
    """``None`` where no thread can be had, as at the end of the interpreter."""
    try:
        return Call(work)
    except RuntimeError:
        return None


def _outcome(attachment: _Attachment, call: Call[bytes] | None, deadline: float, room: int) -> bytes | Failure:
    if call is None or not call.wait(deadline - time.monotonic()):
        return Failure(attachment.member, "it did not come in time")
    try:
        content = call.result()
    except _TooLarge as error:
        return Failure(attachment.member, str(error))
    except OSError as error:
        return Failure(attachment.member, f"it cannot be read: {error.strerror or type(error).__name__}")
    except BaseException as error:  # noqa: BLE001 - the program's own function; its text may say anything
        return Failure(attachment.member, f"it raised {type(error).__name__}")
    if len(content) > room:
        return Failure(
            attachment.member, f"all attachments together would have more than {ALL_ATTACHMENTS_BYTES} bytes"
        )
    return content


class _TooLarge(Exception):
    """An attachment over its limit."""


def _read(attachment: _Attachment) -> bytes:
    content = attachment.content
    if callable(content):
        content = content()
    if isinstance(content, os.PathLike):
        content = _read_file(Path(content), attachment.limit)
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    if not isinstance(content, bytes):
        raise TypeError
    if len(content) > attachment.limit:
        raise _TooLarge(f"it has {len(content)} bytes, and the limit is {attachment.limit}")
    return content


def _read_file(path: Path, limit: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a FIFO without a writer
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > limit:
            raise _TooLarge(f"it has {found.st_size} bytes, and the limit is {limit}")
        return file.read(limit + 1)
