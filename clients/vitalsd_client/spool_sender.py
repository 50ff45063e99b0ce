"""Send the reports that are due, one attempt after another, and write down how each ended."""

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
from vitalsd_client.upload import Attempt, Failed, Parcel, Receipt, send
from vitalsd_client.upload_url import check_url

__all__ = ["CLOCK_STEP_S", "EntryProgress", "Outcome", "Sender"]

EntryProgress = Callable[[Entry, int, int], None]
"""Called with the report, its bytes sent so far, and all of them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one report in one `Spool.send`."""

    report_id: str
    attempt: Attempt


CLOCK_STEP_S = 86_400.0
"""A time to try again further away than any delay that is ever asked for is a clock that was wrong."""


class Sender:
    """
    Send reports of one spool, one at a time.

    Args:
        url: for reports that were added without one.
        attempt_s: for one attempt as a whole, s.
        delays_s: before the second attempt at most, and the bound of its doublings, s.
        proxy: of the network.
        authorities: certificates in PEM form, to trust besides those of the system.
        jitter: a number from 0 to 1.
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
        """Sent, and not moved on, because the directory could not be written."""

    def send(
        self, wait_s: float, ignore_delays: bool, progress: EntryProgress | None, report_id: str | None
    ) -> list[Outcome]:
        """See `vitalsd_client.Spool.send`."""
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
            # Another process may be sending what is due here: look again, but not too often.
            time.sleep(min(max(0.05, due_s), max(0.0, deadline - time.monotonic())))

    def _is_due(self, entry: Entry, ignore_delays: bool) -> bool:
        # A clock before 1970 must not keep back what has no time to wait for.
        return self._not_before(entry) <= max(0.0, self._clock.now()) or (ignore_delays and not entry.asked)

    def _not_before(self, entry: Entry) -> float:
        return entry.not_before if entry.not_before <= self._clock.now() + CLOCK_STEP_S else 0.0

    def _send(self, report_id: str, ignore_delays: bool, progress: EntryProgress | None) -> Outcome | None:
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
                return None  # another process has moved it on
            except OSError as error:
                raise SpoolError(f"cannot send {report_id} from {self._states.directory}: {error.strerror}") from None
            if not self._is_due(entry, ignore_delays):
                return None  # another process has tried it since we looked
            url = entry.url or self._url
            if url is None:
                return Outcome(report_id, Failed("it was added without a URL; name one", final=False))
            try:
                check_url(url)
            except ValueError as error:
                return Outcome(report_id, Failed(str(error), final=False))
            attempt = self._attempt(url, entry, file, progress)
            try:
                self._settle(entry, attempt)
            except OSError as error:
                # It stays where it is. If it has been sent, this object knows; another one sends it
                # again, and the server knows it by its key.
                logging.getLogger("vitalsd_client").warning("cannot move %s on: %s", report_id, error.strerror)
                self._settled |= {report_id} if isinstance(attempt, Receipt) else set()
            return Outcome(report_id, attempt)

    def _attempt(self, url: str, entry: Entry, file: BinaryIO, progress: EntryProgress | None) -> Attempt:
        try:
            parcel = _parcel(entry.report_id, file)
        except OSError as error:
            return Failed(f"the report cannot be read: {error.strerror}", final=False)
        return self._send_once(
            url, parcel, progress=None if progress is None else lambda sent, total: progress(entry, sent, total)
        )

    def _settle(self, entry: Entry, attempt: Attempt) -> None:
        """Write down how it ended, while the lock is held."""
        report_id, attempts = entry.report_id, entry.attempts + 1
        now = self._clock.use().age_clock
        tried = self._states.tried(entry)
        note: dict[str, Any] = {
            "url": entry.url or self._url,
            "added": entry.added,
            "attempts": attempts,
            # Later than now: the file with the steps of the clock was lost.
            "tried": now if tried is None else min(tried, now),
        }
        if isinstance(attempt, Receipt):
            # Even on a full disk the rename takes it out of the way of other senders.
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
    raised = False

    def call(entry: Entry, sent: int, total: int) -> None:
        nonlocal raised
        if raised:
            return
        try:
            progress(entry, sent, total)
        except Exception as error:  # noqa: BLE001 - the program's own function must not stop the sending
            raised = True
            logging.getLogger("vitalsd_client").warning(
                "progress raised %s and is not called again", type(error).__name__
            )

    return call


def _parcel(report_id: str, file: BinaryIO) -> Parcel:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    size = file.tell()
    file.seek(0)
    return Parcel(report_id, size, digest.hexdigest(), file)
