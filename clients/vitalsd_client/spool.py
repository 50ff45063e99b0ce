"""
Keep bug reports on disk until they are sent: a persistent queue of files that change state by rename(2).

    new/       files that are being written; old ones are removed
    pending/   <id>.zip waits for its upload; <id>.json has its URL, its attempts and the time of the next one
    done/      <id>.json is the receipt of the server; the report itself is removed
    failed/    <id>.zip was refused with a final status; kept for inspection until it is too old
    clock      time of the last use of the spool, and the steps of the clock since the spool was made

A sender holds flock(2) on the report and then checks that it still is in ``pending/``. So two processes never send
one report at the same time, and no process sends it again once it is done. After a sender is killed between the
server's receipt and the rename, the next one sends the report again with the same idempotency key, by which the
server recognizes it. On a file system without locks, as NFS without lockd, only the threads of one process exclude
each other; if two processes send a report, its key is the same.

The spool starts no thread and no exit handler: only its methods do work.

A report ages from its first attempt on. A step of the clock by months makes no report older: see `SpoolClock`.
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
"""Default limit for the size of all reports together, bytes."""
MAX_REPORTS = 200
"""Default limit for the number of reports in all states."""
MAX_AGE_S = 30 * 86_400.0
"""Default age, s, at which a report is dropped: 30 days after its first attempt."""
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 900.0
"""Default first delay and upper bound of the exponential backoff between attempts, s."""
PART_OF_AGE = 1 / 3
"""If the clock moves between two uses by more than this fraction of max_age_s, and by more than CLOCK_STEP_S, that is
no age: a single step of the clock never makes a report too old. A program that runs weekly still ages its reports."""


class Spool:
    """
    Keep and send the reports of this user in one directory.

    Args:
        directory: made with mode 0700 if it does not exist; a directory that other users can write is refused.
        url: URL of the server: https, or http on this machine. ``None``: only list reports, and send those that were
            added with a URL.
        max_bytes: size of all reports together, bytes; above it the oldest are dropped first.
        max_reports: number of reports in all states; above it the oldest are dropped first.
        max_age_s: age since the first attempt, s, at which a report is dropped. A report without an attempt has no
            age. If the clock moves between two uses of the spool by more than a third of this, and by more than a
            day, that does not count as age: it is a step of the clock, or a long pause.
        attempt_s: time limit for one whole attempt, s.
        first_delay_s: upper bound of the delay before the second attempt, s; doubled for each further one.
        longest_delay_s: upper bound of the doubled delays, s.
        proxy: URL of a proxy; the proxies of the environment are not used.
        ca_file: file in PEM form with certificates of authorities to trust besides those of the system; read once, now.
            The authorities of the system are, on Linux, in the files of OpenSSL or those that SSL_CERT_FILE and
            SSL_CERT_DIR name; on macOS, in the keychains.
        clock: returns Unix time, s.
        jitter: returns a number from 0 to 1, by which each delay is multiplied.

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
        Keep a report until it is sent, and return its id. The report is synced to disk when this returns.

        Above the limits of the spool older reports are dropped, those in done and failed first. Each drop of a report
        that was not sent is logged.

        Raises:
            SpoolError: the report cannot be written, or is larger than the whole spool; nothing has changed.
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
        """Return all reports: pending, then done, then failed; in each state the oldest first. Raises `SpoolError`."""
        return self._states.all()

    def drop(self, report_id: str) -> bool:
        """
        Remove a report in any state; return False if there is none with this id.

        Raises:
            SpoolError: another sender is sending it, or it cannot be removed.
        """
        entry = self._states.find(report_id)
        return entry is not None and self._states.remove(entry)

    def retry(self, report_id: str) -> bool:
        """Move a failed report back to pending, with no attempts; False if there is none. Raises `SpoolError`."""
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
        Replace the URL of a pending report by `url`, and reset its attempts; return False if there is none.

        Raises:
            SpoolError: another sender is sending it.
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
        Evict reports above the limits, remove leftovers of killed writers, and return the evicted reports.

        Args:
            keep: id of a report that is not evicted.
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
        Send the reports that are due, oldest first; block for up to `attempt_s` per report.

        Args:
            wait_s: time, s, during which failed attempts are repeated when they are due again.
            ignore_delays: also send reports that are not due yet, unless the server asked for the delay.
            progress: called on another thread with the report, the bytes sent and its size. A function that raises is
                not called again.
            report_id: send only this report.

        Returns:
            One outcome per attempt; none for a report that another process is sending.

        Raises:
            SpoolError: the directory cannot be written, so the outcomes could not be recorded; nothing was sent.
            ValueError: `wait_s` is not a number.
        """
        return self._sender.send(wait_s, ignore_delays, progress, report_id)
