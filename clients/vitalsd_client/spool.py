"""
Reports that wait to be sent: files that move between directories by rename(2), and so survive anything.

    new/       being written; swept when old
    pending/   <id>.zip waits for its upload; <id>.json has its URL, its attempts and when to try again
    done/      <id>.json is the receipt of the server; the report itself is gone
    failed/    <id>.zip was refused for good; kept for a person to look at, until it is too old
    clock      when the spool was last used, and by how much the clock was set since it was made

A sender holds flock(2) on the report itself, and then makes sure that it still is in ``pending/``: two
processes never send one report at the same time, and none sends it again once it is done. A sender
that is killed between the server's receipt and the rename sends it once more, with the same
idempotency key; the server knows it by that. Where the file system has no locks, as NFS without lockd,
this holds for the threads of one process alone; a report that two processes send has the same key, too.
Nothing here runs by itself, least of all at exit.

A report ages from its first attempt on. A clock that is set by months makes none older: see `States.use`.
"""

import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vitalsd.contract.report_archive import Bundle
from vitalsd.discovery.atomic_file import sync_directory
from vitalsd_client.spool_store import STATES, Entry, SpoolError, States, Use, first_note
from vitalsd_client.upload import (
    ATTEMPT_S,
    Attempt,
    Failed,
    Parcel,
    Receipt,
    check_proxy,
    check_url,
    read_ca_file,
    send,
)

__all__ = ["Outcome", "Spool"]

_Progress = Callable[[Entry, int, int], None]

MAX_BYTES = 128 << 20
MAX_REPORTS = 200
MAX_AGE_S = 30 * 86_400.0
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 900.0
CLOCK_STEP_S = 86_400.0
"""A time to try again further away than any delay that is ever asked for is a clock that was wrong."""
PART_OF_AGE = 1 / 3
"""The clock moving by more than this part of max_age_s between two uses, and by more than CLOCK_STEP_S, is no age: one
step of the clock alone never makes a report too old. A program that is started weekly still ages its reports."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one report in one `Spool.send`."""

    report_id: str
    attempt: Attempt


class Spool:
    """
    The reports of this user that wait in one directory.

    Args:
        directory: made with mode 0700 if it is not there; one that others can write is refused.
        url: where reports go: https, or http on this machine. ``None``: only to look, and to send what
            was added with a URL.
        max_bytes: of all reports together; the oldest go first.
        max_reports: of all states together; the oldest go first.
        max_age_s: since the first attempt, s. A report that was never tried does not get too old. What the clock moves
            between two uses of the spool by more than a third of this, and more than a day, does not count: it is a
            step of the clock, or a long pause.
        attempt_s: for one attempt as a whole, s.
        first_delay_s: before the second attempt at most; doubled for each one after.
        longest_delay_s: bound of that.
        proxy: of the network; those of the environment are not used.
        ca_file: file in PEM form with certificates of authorities to trust besides those of the system; read once, now.
            The system's are, on Linux, the files of OpenSSL or those that SSL_CERT_FILE and SSL_CERT_DIR name; on
            macOS, the keychains.
        clock: Unix time, s.
        jitter: a number from 0 to 1.

    Raises:
        ValueError: a report may not be sent to `url`, `proxy` is not the URL of one, or `ca_file` cannot be read or
            has no certificate.
        SpoolError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        url: str | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        max_reports: int = MAX_REPORTS,
        max_age_s: float = MAX_AGE_S,
        attempt_s: float = ATTEMPT_S,
        first_delay_s: float = FIRST_DELAY_S,
        longest_delay_s: float = LONGEST_DELAY_S,
        proxy: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.url = None if url is None else check_url(url)
        self._max_bytes, self._max_reports, self._max_age_s = max_bytes, max_reports, max_age_s
        self._attempt_s = attempt_s
        self._delays_s = first_delay_s, longest_delay_s
        self._proxy = None if proxy is None else check_proxy(proxy)
        self._authorities = None if ca_file is None else read_ca_file(ca_file)
        self._clock, self._jitter = clock, jitter
        self._states = States(self.directory)
        self._settled: set[str] = set()

    # Keeping

    def add(self, bundle: Bundle) -> str:
        """
        Keep a report until it is sent, and return its id. Durable once this returns.

        Older reports make room, those first that need no sending any more; each that is lost to that
        before it was sent is logged.

        Raises:
            SpoolError: it cannot be written, or is larger than the whole spool; nothing changed.
        """
        content = bundle.zip()
        if len(content) > self._max_bytes:
            raise SpoolError(f"the report has {len(content)} bytes, and the spool holds {self._max_bytes}")
        report_id = bundle.report_id
        if self._states.find(report_id) is not None:
            return report_id
        try:
            self._states.write("pending", f"{report_id}.json", first_note(self.url, self._clock()))
            self._states.write("pending", f"{report_id}.zip", content)
        except OSError as error:
            with suppress(OSError):
                os.unlink(self._states.path("pending", report_id, "json"))
            raise SpoolError(f"cannot keep the report in {self.directory}: {error.strerror}") from None
        self.prune(keep=report_id)
        return report_id

    def entries(self) -> list[Entry]:
        """Return all reports: pending ones, then done, then failed; in each the oldest first. Raises `SpoolError`."""
        return self._states.all()

    def drop(self, report_id: str) -> bool:
        """
        Forget a report, sent or not; False if there is none with this id.

        Raises:
            SpoolError: it is being sent right now, or cannot be removed.
        """
        entry = self._states.find(report_id)
        return entry is not None and self._states.remove(entry)

    def retry(self, report_id: str) -> bool:
        """Let a failed report be sent again, as if new; False if there is none. Raises `SpoolError`."""
        entry = self._states.find(report_id)
        if entry is None or entry.state != "failed":
            return False
        try:
            self._states.write("pending", f"{report_id}.json", first_note(entry.url, entry.added))
            self._states.move(report_id, "zip", "failed", "pending")
        except OSError as error:
            raise SpoolError(f"cannot move {report_id}: {error.strerror}") from None
        return True

    def readdress(self, report_id: str) -> bool:
        """
        Let a pending report go to `url` instead of where it was to go, as if new; False if there is none.

        Raises:
            SpoolError: it is being sent right now.
        """
        entry = self._states.find(report_id)
        if entry is None or entry.state != "pending":
            return False
        with self._states.locked(report_id) as file:
            if file is None:
                raise SpoolError(f"{report_id} is being sent right now")
            self._states.note(report_id, {"url": self.url, "added": entry.added, "attempts": 0})
        return True

    def prune(self, *, keep: str | None = None) -> list[Entry]:
        """
        Drop what is too old or too much, and sweep what dead writers left; return what was dropped.

        Args:
            keep: the id of a report that stays in any case.
        """
        use = self._use()
        self._states.sweep(use.before)
        rank = {"done": 0, "failed": 1, "pending": 2}
        entries = sorted(self.entries(), key=lambda entry: (rank[entry.state], entry.added))
        count, size = len(entries), sum(entry.size for entry in entries)
        dropped = []
        for entry in entries:
            tried = self._states.tried(entry)
            too_old = tried is not None and use.age_clock - tried > self._max_age_s
            too_much = size > self._max_bytes and entry.size > 0
            if entry.report_id == keep or not (too_old or too_much or count > self._max_reports):
                continue
            with suppress(SpoolError):
                if self._states.remove(entry):
                    count, size = count - 1, size - entry.size
                    dropped.append(entry)
                    if entry.state != "done":
                        logging.getLogger("vitalsd_client").warning(
                            "dropped the %s report %s: %s",
                            entry.state,
                            entry.report_id,
                            "it is too old" if too_old else "the spool is full",
                        )
        return dropped

    def _use(self) -> Use:
        return self._states.use(self._clock(), max(CLOCK_STEP_S, self._max_age_s * PART_OF_AGE))

    # Sending

    def send(
        self,
        *,
        wait_s: float = 0.0,
        ignore_delays: bool = False,
        progress: _Progress | None = None,
        report_id: str | None = None,
    ) -> list[Outcome]:
        """
        Send what is due, the oldest first; blocks, for up to `attempt_s` per report.

        Args:
            wait_s: go on for so long with what failed, at the times when it is due again.
            ignore_delays: also send what is not due yet, unless the server asked for time.
            progress: called with the report, the bytes sent and all of them; on another thread. One that
                raises is not called again.
            report_id: send only this one.

        Returns:
            One outcome per attempt. A report that another process is sending is left to that one.

        Raises:
            SpoolError: the directory cannot be written, so it could not be noted what was sent.
            ValueError: `wait_s` is not a number.
        """
        if math.isnan(wait_s):
            raise ValueError("wait_s is not a number")
        for state in STATES:
            if not os.access(self.directory / state, os.W_OK | os.X_OK):
                raise SpoolError(f"{self.directory / state} cannot be written; nothing was sent")
        self._use()
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
            due_s = min(self._not_before(entry) for entry in left) - self._clock()
            # Another process may be sending what is due here: look again, but not too often.
            time.sleep(min(max(0.05, due_s), max(0.0, deadline - time.monotonic())))

    def _is_due(self, entry: Entry, ignore_delays: bool) -> bool:
        # A clock before 1970 must not keep back what has no time to wait for.
        return self._not_before(entry) <= max(0.0, self._clock()) or (ignore_delays and not entry.asked)

    def _not_before(self, entry: Entry) -> float:
        return entry.not_before if entry.not_before <= self._clock() + CLOCK_STEP_S else 0.0

    def _send(self, report_id: str, ignore_delays: bool, progress: _Progress | None) -> Outcome | None:
        with self._states.locked(report_id) as file:
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
                raise SpoolError(f"cannot send {report_id} from {self.directory}: {error.strerror}") from None
            if not self._is_due(entry, ignore_delays):
                return None  # another process has tried it since we looked
            url = entry.url or self.url
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

    def _attempt(self, url: str, entry: Entry, file: BinaryIO, progress: _Progress | None) -> Attempt:
        try:
            parcel = _parcel(entry.report_id, file)
        except OSError as error:
            return Failed(f"the report cannot be read: {error.strerror}", final=False)
        return send(
            url,
            parcel,
            attempt_s=self._attempt_s,
            proxy=self._proxy,
            authorities=self._authorities,
            progress=None if progress is None else lambda sent, total: progress(entry, sent, total),
        )

    def _settle(self, entry: Entry, attempt: Attempt) -> None:
        """Write down how it ended, while the lock is held."""
        report_id, attempts = entry.report_id, entry.attempts + 1
        now = self._use().age_clock
        tried = self._states.tried(entry)
        note: dict[str, Any] = {
            "url": entry.url or self.url,
            "added": entry.added,
            "attempts": attempts,
            # Later than now: the file with the steps of the clock was lost.
            "tried": now if tried is None else min(tried, now),
        }
        if isinstance(attempt, Receipt):
            # Even on a full disk the rename takes it out of the way of other senders.
            note |= {"receipt": attempt.number, "sent": self._clock()}
            self._states.note(report_id, note)
            self._states.move(report_id, "json", "pending", "done")
            with suppress(FileNotFoundError):
                os.unlink(self._states.path("pending", report_id, "zip"))
            sync_directory(self.directory / "pending")
        elif attempt.final:
            self._states.note(report_id, note | {"error": attempt.reason})
            self._states.move(report_id, "zip", "pending", "failed")
            self._states.move(report_id, "json", "pending", "failed")
        else:
            first_s, longest_s = self._delays_s
            delay_s = self._jitter() * min(longest_s, first_s * 2 ** min(attempts - 1, 30))
            asked = attempt.retry_after_s > delay_s
            not_before = self._clock() + max(delay_s, attempt.retry_after_s)
            self._states.note(report_id, note | {"error": attempt.reason, "not_before": not_before, "asked": asked})


def _until_it_raises(progress: _Progress) -> _Progress:
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
