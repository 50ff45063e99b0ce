"""Send the reports that are due, one attempt after another, and record the outcome of each in the spool."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from vitalsd.discovery.atomic_file import sync_directory
from vitalsd_client.spool_clock import SpoolClock
from vitalsd_client.spool_lock import SpoolError, locked
from vitalsd_client.spool_store import STATES, Entry, States
from vitalsd_client.upload import UploadFailure, UploadReceipt, UploadRequest, UploadResult, send
from vitalsd_client.upload_url import check_url

__all__ = ["CLOCK_STEP_S", "EntryProgress", "Outcome", "Sender"]

EntryProgress = Callable[[Entry, int, int], None]
"""Function called with the report, the bytes of it sent so far, and its size."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold the result of one attempt of `Spool.send` to send a report."""

    report_id: str
    attempt: UploadResult


CLOCK_STEP_S = 86_400.0
"""Longest delay of an attempt, s: a time of the next attempt beyond it comes from a wrong clock, and is ignored."""


class Sender:
    """
    Send reports of one spool, one at a time.

    Args:
        states: the reports on disk.
        clock: the clock of the same spool.
        url: URL for reports that were added without one.
        attempt_s: time limit for one whole attempt, s.
        delays_s: first delay and upper bound of the exponential backoff, s.
        proxy: URL of a proxy; ``None``: none.
        authorities: certificates in PEM form, to trust besides those of the system.
        jitter: returns a number from 0 to 1, by which each delay is multiplied.
    """

    def __init__(
        self,
        states: States,
        clock: SpoolClock,
        *,
        url: str | None,
        attempt_s: float,
        delays_s: tuple[float, float],
        proxy: str | None,
        authorities: str | None,
        jitter: Callable[[], float],
    ) -> None:
        self._states, self._clock = states, clock
        self._url = url
        self._delays_s, self._jitter = delays_s, jitter
        self._send_once = partial(send, attempt_s=attempt_s, proxy=proxy, authorities=authorities)
        self._settled: set[str] = set()
        """Ids of reports that are sent but still in ``pending/``, because the directory could not be written."""

    def send(
        self, wait_s: float, ignore_delays: bool, progress: EntryProgress | None, report_id: str | None
    ) -> list[Outcome]:
        """Do what `vitalsd_client.Spool.send` describes."""
        if math.isnan(wait_s):
            raise ValueError("wait_s is not a number")
        for state in STATES:
            if not os.access(self._states.directory / state, os.W_OK | os.X_OK):
                raise SpoolError(f"{self._states.directory / state} cannot be written; nothing was sent")
        self._clock.use()
        progress = None if progress is None else _until_it_raises(progress)
        deadline = time.monotonic() + wait_s
        outcomes: list[Outcome] = []
        while True:
            wanted = [entry for entry in self._states.entries("pending") if report_id in (None, entry.report_id)]
            for entry in sorted(wanted, key=lambda entry: entry.added):
                if self._is_due(entry, ignore_delays):
                    outcome = self._send(entry.report_id, ignore_delays, progress)
                    outcomes += [outcome] if outcome is not None else []
            left = [
                entry
                for entry in self._states.entries("pending")
                if report_id in (None, entry.report_id) and entry.report_id not in self._settled
            ]
            if not left or time.monotonic() >= deadline:
                return outcomes
            due_s = min(self._not_before(entry) for entry in left) - self._clock.now()
            # Another process may be sending a report that is due here: look again, but at most every 50 ms.
            time.sleep(min(max(0.05, due_s), max(0.0, deadline - time.monotonic())))

    def _is_due(self, entry: Entry, ignore_delays: bool) -> bool:
        # With a clock before 1970, a report without a delay must still be sent.
        return self._not_before(entry) <= max(0.0, self._clock.now()) or (ignore_delays and not entry.asked)

    def _not_before(self, entry: Entry) -> float:
        """Return the time of the next attempt, Unix time in s; 0: any time, also if a wrong clock set it."""
        return entry.not_before if entry.not_before <= self._clock.now() + CLOCK_STEP_S else 0.0

    def _send(self, report_id: str, ignore_delays: bool, progress: EntryProgress | None) -> Outcome | None:
        """Lock a report, send it and record the outcome; ``None``: another sender has it. Raises `SpoolError`."""
        with locked(self._states.path("pending", report_id, "zip")) as file:
            if file is None or report_id in self._settled:
                return None
            try:
                if self._states.path("done", report_id, "json").exists():
                    # The process that sent it ended before it had removed the report.
                    os.unlink(self._states.path("pending", report_id, "zip"))
                    return None
                entry = self._states.entry("pending", report_id)
            except FileNotFoundError:
                return None  # another process has moved it
            except OSError as error:
                raise SpoolError(f"cannot send {report_id} from {self._states.directory}: {error.strerror}") from None
            if not self._is_due(entry, ignore_delays):
                return None  # another process has tried it since we looked
            url = entry.url or self._url
            if url is None:
                return Outcome(report_id, UploadFailure("it was added without a URL; name one", final=False))
            try:
                check_url(url)
            except ValueError as error:
                return Outcome(report_id, UploadFailure(str(error), final=False))
            attempt = self._attempt(url, entry, file, progress)
            try:
                self._settle(entry, attempt)
            except OSError as error:
                # The report stays in pending/. If it has been sent, this object remembers that; another process sends
                # it again, and the server recognizes its idempotency key.
                logging.getLogger("vitalsd_client").warning("cannot move %s on: %s", report_id, error.strerror)
                self._settled |= {report_id} if isinstance(attempt, UploadReceipt) else set()
            return Outcome(report_id, attempt)

    def _attempt(self, url: str, entry: Entry, file: BinaryIO, progress: EntryProgress | None) -> UploadResult:
        try:
            request = _upload_request(entry.report_id, file)
        except OSError as error:
            return UploadFailure(f"the report cannot be read: {error.strerror}", final=False)
        return self._send_once(
            url, request, progress=None if progress is None else lambda sent, total: progress(entry, sent, total)
        )

    def _settle(self, entry: Entry, attempt: UploadResult) -> None:
        """Record the outcome of an attempt and move the report, while the lock is held. Raises `OSError`."""
        report_id, attempts = entry.report_id, entry.attempts + 1
        now = self._clock.use().age_clock
        tried = self._states.tried(entry)
        note: dict[str, Any] = {
            "url": entry.url or self._url,
            "added": entry.added,
            "attempts": attempts,
            # It is later than now only if the file with the steps of the clock was lost.
            "tried": now if tried is None else min(tried, now),
        }
        if isinstance(attempt, UploadReceipt):
            # The rename works on a full disk too, and then no other sender sends the report again.
            note |= {"receipt": attempt.number, "sent": self._clock.now()}
            self._states.note(report_id, note)
            self._states.move(report_id, "json", "pending", "done")
            with suppress(FileNotFoundError):
                os.unlink(self._states.path("pending", report_id, "zip"))
            sync_directory(self._states.directory / "pending")
        elif attempt.final:
            self._states.note(report_id, note | {"error": attempt.reason})
            self._states.move(report_id, "zip", "pending", "failed")
            self._states.move(report_id, "json", "pending", "failed")
        else:
            first_s, longest_s = self._delays_s
            delay_s = self._jitter() * min(longest_s, first_s * 2 ** min(attempts - 1, 30))
            asked = attempt.retry_after_s > delay_s
            not_before = self._clock.now() + max(delay_s, attempt.retry_after_s)
            self._states.note(report_id, note | {"error": attempt.reason, "not_before": not_before, "asked": asked})


def _until_it_raises(progress: EntryProgress) -> EntryProgress:
    """Return `progress` without its exceptions: after the first one, which is logged, it is not called again."""
    raised = False

    def call(entry: Entry, sent: int, total: int) -> None:
        nonlocal raised
        if raised:
            return
        try:
            progress(entry, sent, total)
        except Exception as error:  # noqa: BLE001 - the program's own function must not stop the upload
            raised = True
            logging.getLogger("vitalsd_client").warning(
                "progress raised %s and is not called again", type(error).__name__
            )

    return call


def _upload_request(report_id: str, file: BinaryIO) -> UploadRequest:
    """Return the report with its size and hash, and its file positioned at the start. Raises `OSError`."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    size = file.tell()
    file.seek(0)
    return UploadRequest(report_id, size, digest.hexdigest(), file)
