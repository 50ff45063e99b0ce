"""
Make a bug report of the calling program: what the sidecar knows, what the user says, what the program adds.

Three moments: `BugReport.collect` when the user asks for a report, within the window and two seconds;
`BugReport.preview` before the user agrees; `BugReport.save` or `submit` after that, of the very bytes that were shown.
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
    """What `BugReport.submit` needs of a `Spool`."""

    def add(self, bundle: Bundle) -> str: ...


class BugReport:
    """
    One report. Nothing of it is written anywhere before `save` or `submit`.

    Environment, command lines, user and host names and paths under the home directory never enter by
    themselves. What the program attaches, names its threads, or the user writes, is theirs: see `redact`.

    Without a sidecar that can be asked, the run that crashed before is read from disk.

    Args:
        app: application id: the report contains the crashed run that was recorded with it, and the name of the file
            begins with it. 1 to 64 of ``A-Z a-z 0-9 . _ -``. ``None``: that of the sidecar.
        app_version: as the program calls it; ``None``: that of the sidecar.
        description: what the user says; may be set until the report is saved.
        window_ms: window of the metrics, 10 to 60000 ms.
        mode: see `fetch`.
        history_s: how far back the history goes, 1 to 86400 s.
        url: of a sidecar, instead of looking for one; see `fetch`.
        socket: path of its Unix socket, instead of looking for one.
        pid: another process than this one.
        direct: measure the process without a sidecar if none can be asked.
        redact: a function, or several, given every member before it is shown or written; one that fails loses the
            member.
        triggered: when it was asked for; default: now.
        run_id: include this earlier run, whether it is in a report already or not.
        running: False: no process of the application runs, as for a launcher that reports the crash of its client;
            no sidecar is asked.

    Raises:
        ValueError: `app` or `app_version` cannot be one, or a number is out of range.
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
            triggered or datetime.now(UTC),
        )
        self._window_ms = window_ms
        self._fetch = partial(fetch, window_ms, mode, url=url, socket=socket, pid=pid, direct=direct)
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
        """128 random bits, hexadecimal: names the report in a spool and at the receiver."""
        return self._heading.report_id

    @property
    def description(self) -> str:
        """What the user says. Setting it after a preview makes a new preview due."""
        return self._heading.description

    @description.setter
    def description(self, text: str) -> None:
        self._heading = replace(self._heading, description=text)
        self._sealed = None

    def attach(self, name: str, content: Content, *, limit: int = ATTACHMENT_BYTES) -> None:
        """
        Add a member ``attachments/<number>-<name>`` when the report is collected.

        What is too large, cannot be read, raises or does not return in time is left out, and the manifest says so; the
        report is made all the same.

        Args:
            name: characters other than ``A-Z a-z 0-9 . _ -`` become ``_``.
            content: see `Content`; for files there is `attach_file` too.
            limit: bytes.

        Raises:
            ValueError: it comes after `collect`, is one too many, is not a `Content`, or is text that is the path of
                a file.
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
            path: of the file, which is opened when the report is collected.
            name: default: the name of the file, without its directory.
            limit: bytes.
            tail: of a larger file, take the last `limit` bytes, as for a log, instead of leaving it out.

        Raises:
            ValueError: it comes after `collect`, or is one too many.
        """
        self._add(os.path.basename(os.fspath(path)) if name is None else name, Path(path), limit, tail=tail)

    def _add(self, name: str, content: Content, limit: int, *, tail: bool = False) -> None:
        if self._collected is not None:
            raise ValueError("the report has been collected; attach before that")
        self._attachments.add(name, content, limit, tail=tail)

    def collect(self) -> None:
        """
        Ask the sidecar and read the attachments, all at once, within the window and 2 s; never raises.

        A second call does nothing.
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
        """The members as they will be written, redacted, to the byte. Collects first if need be."""
        return self.bundle().members

    @property
    def failures(self) -> Sequence[Failure]:
        """The members that are missing, and why. Collects first if need be."""
        return self.bundle().failures

    def bundle(self) -> Bundle:
        """The sealed report, for `Spool.add`. Collects first if need be; the same object until something changes."""
        if self._sealed is None:
            self.collect()
            assert self._collected is not None
            self._sealed = build(self._heading, self._collected, self._redact, created=datetime.now(UTC))
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
        """Note that the crashed runs in it are reported, now that it is on disk: the next one leaves them out."""
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
    Put Python's names of this process's threads into the members where the kernel has none.

    Platform limit: that is so on macOS before Python 3.14; on Linux `publish_names` gives them to the kernel.
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
    if not isinstance(number, int) or not least <= number <= most:
        raise ValueError(f"{name} is a whole number from {least} to {most}")
