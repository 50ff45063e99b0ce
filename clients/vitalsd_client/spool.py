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

A report ages from its first attempt on. A clock that is set by months makes none older: see `SpoolClock`.
"""

import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from vitalsd.contract.report_archive import Bundle
from vitalsd_client.spool_clock import SpoolClock
from vitalsd_client.spool_lock import SpoolError, locked
from vitalsd_client.spool_sender import CLOCK_STEP_S, EntryProgress, Outcome, Sender
from vitalsd_client.spool_store import Entry, States, first_note
from vitalsd_client.upload import ATTEMPT_S
from vitalsd_client.upload_tls import read_ca_file
from vitalsd_client.upload_url import check_proxy, check_url

__all__ = ["Spool"]

MAX_BYTES = 128 << 20
MAX_REPORTS = 200
MAX_AGE_S = 30 * 86_400.0
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 900.0
PART_OF_AGE = 1 / 3
"""The clock moving by more than this part of max_age_s between two uses, and by more than CLOCK_STEP_S, is no age: one
step of the clock alone never makes a report too old. A program that is started weekly still ages its reports."""


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
        proxy = None if proxy is None else check_proxy(proxy)
        authorities = None if ca_file is None else read_ca_file(ca_file)
        self._states = States(self.directory)
        self._clock = SpoolClock(
            self.directory,
            partial(self._states.put, self.directory),
            clock,
            max(CLOCK_STEP_S, max_age_s * PART_OF_AGE),
        )
        self._sender = Sender(
            self._states,
            self._clock,
            url=self.url,
            attempt_s=attempt_s,
            delays_s=(first_delay_s, longest_delay_s),
            proxy=proxy,
            authorities=authorities,
            jitter=jitter,
        )

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
            self._states.write("pending", f"{report_id}.json", first_note(self.url, self._clock.now()))
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
        with locked(self._states.path("pending", report_id, "zip")) as file:
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
        use = self._clock.use()
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

    # Sending

    def send(
        self,
        *,
        wait_s: float = 0.0,
        ignore_delays: bool = False,
        progress: EntryProgress | None = None,
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
        return self._sender.send(wait_s, ignore_delays, progress, report_id)
