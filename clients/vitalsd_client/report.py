"""
Make a bug report of the calling program: data of the sidecar, a description by the user, attachments of the program.

There are three steps: `BugReport.collect` when the user asks for a report, within the window and 2 s;
`BugReport.preview` before the user agrees; then `BugReport.save` or `submit`, which write exactly the shown bytes.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vitalsd.contract.application import check_app, check_app_version
from vitalsd.contract.metrics import Unavailable
from vitalsd.contract.report_archive import HISTORY, METRICS, Bundle, Failure
from vitalsd.report.builder import Collected, Heading, Redact, build
from vitalsd.sources.names import names_by_id
from vitalsd_client.attachments import ATTACHMENT_BYTES, Attachments, Content, check_content
from vitalsd_client.daemon_call import start_call
from vitalsd_client.fetch_metrics import BUDGET_S, Mode, fetch, unavailable
from vitalsd_client.recorded_data import RecordedData

__all__ = ["BugReport", "Outbox"]

NOT_RUNNING = "no sidecar to ask: none of yours watches a running process of this application"


class Outbox(Protocol):
    """Declare what `BugReport.submit` calls of a `Spool`."""

    def add(self, bundle: Bundle) -> str:
        """Keep a report until it is sent, and return its id."""


class BugReport:
    """
    Hold one report; nothing of it is written to disk before `save` or `submit`.

    vitalsd itself adds no environment, command lines, user or host names, or paths under the home directory. The
    attachments, the names of threads and the description may contain them: see `redact`.

    If no sidecar can be asked, the last crashed run is read from disk.

    Args:
        app: application id, 1 to 64 of ``A-Z a-z 0-9 . _ -``: the report contains the crashed run with this id, and
            the name of the file begins with it. ``None``: the id that the sidecar was started with.
        app_version: version of the application; ``None``: the version that the sidecar was started with.
        description: text of the user; may be set until the report is saved.
        window_ms: window of the metrics, 10 to 60000 ms.
        mode: see `fetch`.
        history_s: length of the history, 1 to 86400 s.
        url: URL of a sidecar, instead of discovery; see `fetch`.
        socket: path of its Unix socket, instead of discovery.
        pid: the process to report; ``None``: this process.
        direct: measure the process without a sidecar if none can be asked.
        children: let metrics and history name the child processes of the process. False: the report has the sums of
            the application at most, whatever the sidecar records.
        redact: a function, or several, called with every member before it is shown or written; a member for which one
            raises is left out.
        triggered: time of the request for the report; default: now.
        run_id: include this earlier run, whether a report contains it already or not.
        running: False: no process of the application runs, as for a launcher that reports the crash of its client;
            no sidecar is asked.

    Raises:
        ValueError: `app` or `app_version` is not valid, or a number is out of range.
    """

    def __init__(
        self,
        app: str | None,
        *,
        app_version: str | None = None,
        description: str = "",
        window_ms: int = 2000,
        mode: Mode = "auto",
        history_s: int = 300,
        url: str | None = None,
        socket: str | os.PathLike[str] | None = None,
        pid: int | None = None,
        direct: bool = False,
        children: bool = False,
        redact: Redact | Sequence[Redact] = (),
        triggered: datetime | None = None,
        run_id: str | None = None,
        running: bool = True,
    ) -> None:
        _check("window_ms", window_ms, 10, 60_000)
        _check("history_s", history_s, 1, 86_400)
        self._heading = Heading(
            None if app is None else check_app(app),
            None if app_version is None else check_app_version(app_version),
            description,
            children,
            triggered or datetime.now(UTC),
        )
        self._window_ms = window_ms
        self._fetch = partial(
            fetch,
            window_ms,
            mode,
            url=url,
            socket=socket,
            pid=pid,
            detail="full" if children else "basic",
            children=children,
            direct=direct,
        )
        self._running = running
        self._own = pid is None and url is None and socket is None
        self._recorded = RecordedData(app, history_s, url=url, socket=socket, pid=pid, run_id=run_id, running=running)
        self._redact: Sequence[Redact] = (redact,) if callable(redact) else tuple(redact)
        self._attachments = Attachments()
        self._collected: Collected | None = None
        self._sealed: Bundle | None = None
        self._counted = False

    @property
    def report_id(self) -> str:
        """Return the id of the report in a spool and at the receiver: 128 random bits, hexadecimal."""
        return self._heading.report_id

    @property
    def description(self) -> str:
        """Return the text of the user. To set it seals the report anew, so `preview` has to be shown again."""
        return self._heading.description

    @description.setter
    def description(self, text: str) -> None:
        self._heading = replace(self._heading, description=text)
        self._sealed = None

    def attach(self, name: str, content: Content, *, limit: int = ATTACHMENT_BYTES) -> None:
        """
        Add a member ``attachments/<number>-<name>`` when the report is collected.

        An attachment that is too large, cannot be read, raises or does not return in time is left out; the report is
        made without it, and the manifest has the reason.

        Args:
            name: characters other than ``A-Z a-z 0-9 . _ -`` become ``_``.
            content: see `Content`; `attach_file` has options for files.
            limit: largest size, bytes.

        Raises:
            ValueError: the report has been collected, it has the most attachments already, or `content` is not a
                `Content` or is text that is the path of a file.
        """
        check_content(name, content)
        self._add(name, content, limit)

    def attach_file(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        limit: int = ATTACHMENT_BYTES,
        tail: bool = False,
    ) -> None:
        """
        Add the content of a file when the report is collected; see `attach`.

        Args:
            path: path of the file, which is opened when the report is collected.
            name: name of the member; default: the name of the file, without its directory.
            limit: largest size, bytes.
            tail: take the last `limit` bytes of a larger file, as for a log, instead of leaving it out.

        Raises:
            ValueError: the report has been collected, or it has the most attachments already.
        """
        self._add(os.path.basename(os.fspath(path)) if name is None else name, Path(path), limit, tail=tail)

    def _add(self, name: str, content: Content, limit: int, *, tail: bool = False) -> None:
        if self._collected is not None:
            raise ValueError("the report has been collected; attach before that")
        self._attachments.add(name, content, limit, tail=tail)

    def collect(self) -> None:
        """
        Ask the sidecar and read the attachments, concurrently, within the window and 2 s.

        A failure of any of them is a member of `failures`, not an exception. A second call does nothing.
        """
        if self._collected is not None:
            return
        deadline = time.monotonic() + self._window_ms / 1000 + BUDGET_S
        self._attachments.start()
        recorded = Collected(platform="")
        past = start_call(lambda: self._recorded.collect(recorded, deadline - 0.2))
        metrics = self._fetch() if self._running else unavailable(NOT_RUNNING)
        found = Collected(metrics.platform)
        found.members[METRICS] = metrics.model_dump_json(by_alias=True, exclude_unset=True).encode()
        if isinstance(metrics, Unavailable):
            found.failures.append(Failure(METRICS, metrics.reason))
        if past is not None and past.wait(deadline - time.monotonic()):
            found.members |= recorded.members
            found.failures += recorded.failures
            found.application, found.host = recorded.application, recorded.host
            found.target, found.runs = recorded.target, recorded.runs
        else:
            found.failures.append(Failure(HISTORY, "what was recorded did not come in time"))
        self._attachments.collect(deadline, found.members, found.failures)
        if self._own:
            _name_threads(found.members)
        self._collected = found

    def preview(self) -> Mapping[str, bytes]:
        """Return the redacted members, byte for byte as they will be written; call `collect` before if needed."""
        return self.bundle().members

    @property
    def failures(self) -> Sequence[Failure]:
        """Return the missing members and the reasons; call `collect` before if needed."""
        return self.bundle().failures

    def bundle(self) -> Bundle:
        """Return the sealed report for `Spool.add`; call `collect` before if needed. The same object until a change."""
        if self._sealed is None:
            self.collect()
            assert self._collected is not None
            self._sealed = build(self._heading, self._collected, self._redact, created=datetime.now(UTC))
        return self._sealed

    def save(self, directory: str | os.PathLike[str] = ".") -> Path:
        """
        Write ``<app>-bugreport-YYYY-MM-DDTHH-MM-SSZ.zip`` into `directory`, and return its path.

        The write is atomic, and the mode of the file is 0600. `directory` is made if its parent exists.

        Raises:
            OSError: the file cannot be written; no part of it is left, and `save` can be called with another directory.
        """
        path = self.bundle().write(Path(directory))
        self._delivered()
        return path

    def submit(self, spool: "Outbox") -> str:
        """
        Add the report to a `Spool`, which uploads it, and return the report's id.

        Raises:
            SpoolError: the spool cannot keep it; the report can still be saved.
        """
        report_id = spool.add(self.bundle())
        self._delivered()
        return report_id

    def _delivered(self) -> None:
        """Mark the crashed runs in the report as reported, so the next report omits them; wait at most 1 s."""
        assert self._collected is not None
        members = self.bundle().members
        run_ids = [run_id for run_id, member in self._collected.runs.items() if member in members]
        if not run_ids or self._counted:
            return
        self._counted = True
        deadline = time.monotonic() + 1
        call = start_call(lambda: self._recorded.mark_reported(run_ids, deadline))
        if call is not None:
            call.wait(1)


def _name_threads(members: dict[str, bytes]) -> None:
    """
    Add Python's names of this process's threads to the members where the kernel has no name.

    Platform limit: only macOS before Python 3.14 needs this; on Linux `publish_names` passes them to the kernel.
    """
    if sys.platform != "darwin" or sys.version_info >= (3, 14):
        return
    known = names_by_id()
    for member in (METRICS, HISTORY):
        with suppress(KeyError, ValueError, TypeError):
            body = json.loads(members[member])
            for thread in body["threads"]:
                thread["name"] = thread["name"] or known.get(thread["tid"], "")
            members[member] = json.dumps(body, separators=(",", ":")).encode()


def _check(name: str, number: Any, least: int, most: int) -> None:
    """Raise `ValueError` if `number` is not an `int` from `least` to `most`."""
    if not isinstance(number, int) or not least <= number <= most:
        raise ValueError(f"{name} is a whole number from {least} to {most}")
