"""
Write a bug report as a file: its members, the manifest of them, the zip.

It imports only the standard library, because a client builds reports in its own process.
"""

import errno
import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitalsd.contract.host import RecordedHost
from vitalsd.discovery.atomic_file import draft, sync_directory

__all__ = [
    "HISTORY",
    "MANIFEST",
    "MARKS",
    "METADATA",
    "METRICS",
    "PREVIOUS_RUN",
    "Bundle",
    "Failure",
    "metadata",
    "new_report_id",
    "previous_run",
    "seal",
    "timestamp",
    "write_new",
]

METADATA = "metadata.json"
METRICS = "runtime-metrics.json"
HISTORY = "runtime-history.json"
MARKS = "marks.json"
PREVIOUS_RUN = "previous-run.json"
MANIFEST = "manifest.json"
SCHEMA = 1

UNNAMED = "vitalsd"
"""Start of the file name of a report that names no application."""
MAX_SAME_SECOND = 1000
"""Upper bound, exclusive, of the number in file names of reports of the same second."""

ZIP_DATES = (1980, 1, 1, 0, 0, 0), (2107, 12, 31, 23, 59, 58)
"""First and last moment that a ZIP can store: it has 7 bits for the year, and 5 for the second halved."""


def new_report_id() -> str:
    """Make an id of 128 random bits, hexadecimal, for the report, its file in a spool, and its upload."""
    return secrets.token_hex(16)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except (OverflowError, ValueError, OSError):  # within a day of the years 1 and 9999
        return moment.replace(tzinfo=UTC)


def timestamp(moment: datetime) -> str:
    """Write a moment as ISO 8601 in UTC with milliseconds."""
    return _in_utc(moment).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Failure:
    """A member that is missing in the report, and the reason."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A sealed report: the client writes and sends exactly these bytes."""

    report_id: str
    app: str | None
    """Application id; ``None``: the report names no application."""
    created: datetime
    members: Mapping[str, bytes]
    """The content of each member by its name, `MANIFEST` last."""
    failures: Sequence[Failure] = ()
    """Missing members; the manifest lists them too."""

    @property
    def stem(self) -> str:
        """Return the name of its file, without ``.zip``."""
        return f"{self.app or UNNAMED}-bugreport-{_in_utc(self.created):%Y-%m-%dT%H-%M-%SZ}"

    def zip(self) -> bytes:
        """
        Return the archive. The same bundle gives the same bytes.

        The date of the members is that of the report, or the nearest one that a ZIP can store, because a report must
        not fail over a wrong clock.
        """
        first, last = ZIP_DATES
        date = min(max(_in_utc(self.created).timetuple()[:6], first), last)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name, content in self.members.items():
                info = zipfile.ZipInfo(name, date)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o600 << 16
                archive.writestr(info, content)
        return out.getvalue()

    def write(self, directory: str | Path) -> Path:
        """
        Write the zip into `directory` atomically, with mode 0600; create `directory` if its parent exists.

        An existing file is never replaced.

        Raises:
            OSError: the zip could not be written; no part of it is left.
        """
        Path(directory).mkdir(exist_ok=True)
        return write_new(Path(directory), self.stem, ".zip", self.zip())


def seal(
    app: str | None, report_id: str, created: datetime, members: Mapping[str, bytes], failures: Sequence[Failure]
) -> Bundle:
    """Add the manifest: size and SHA-256 of each member, and the missing members."""
    manifest = {
        "schema": SCHEMA,
        "report_id": report_id,
        "app": app,
        "created_at": timestamp(created),
        "members": [
            {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in members.items()
        ],
        "failures": [{"member": failure.member, "reason": failure.reason} for failure in failures],
    }
    return Bundle(report_id, app, created, {**members, MANIFEST: _json(manifest)}, tuple(failures))


def metadata(
    *,
    app: str | None,
    app_version: str | None,
    vitalsd_version: str,
    report_id: str,
    triggered: datetime,
    submitted: datetime,
    description: str,
    platform: str,
    host: RecordedHost,
    target: Mapping[str, Any] | None = None,
) -> bytes:
    """
    Return the content of `METADATA`: the application, the system and the time; no user or host name.

    Args:
        app: id of the application; ``None``: the report names none.
        app_version: version of the application.
        vitalsd_version: version of the program that makes the report.
        report_id: as `new_report_id` makes it.
        triggered: when the report was requested.
        submitted: when the report was submitted.
        description: the user's message.
        platform: name of the platform, as in answers.
        host: the machine that was recorded.
        target: state of the recorded process: ``{"state": "running" | "clean" | "crashed", "ended": sentence or
            None}``.
    """
    return _json(
        {
            "schema": SCHEMA,
            "report_id": report_id,
            "app": {"name": app, "version": app_version},
            "vitalsd": {"version": vitalsd_version},
            "platform": platform,
            "os": {"name": host.system, "release": host.release, "version": host.version, "arch": host.arch},
            "cpu_count": host.cpu_count,
            "utc_offset_minutes": host.utc_offset_minutes,
            "target": None if target is None else dict(target),
            "triggered_at": timestamp(triggered),
            "submitted_at": timestamp(submitted),
            "description": description,
        }
    )


def previous_run(listing: Mapping[str, Any], history: bytes) -> bytes:
    """
    Return the content of `PREVIOUS_RUN`: the history of an ended run, and its facts under ``run``.

    Raises:
        ValueError: `history` is not a JSON object.
    """
    table = json.loads(history)
    if not isinstance(table, dict):
        raise ValueError("not a history")
    return _json({"run": dict(listing), **table})


def _json(body: Any) -> bytes:
    return json.dumps(body, indent=1).encode() + b"\n"


def write_new(directory: Path, stem: str, suffix: str, content: bytes) -> Path:
    """
    Write a new file ``<stem><suffix>``, or ``<stem>-2<suffix>`` and so on; atomic, durable, mode 0600.

    Raises:
        OSError: the file could not be written; no part of it is left.
    """
    temporary = directory / f".{stem}.{secrets.token_hex(8)}.tmp"
    with draft(temporary, content):
        path = _name(temporary, directory, stem, suffix)
    sync_directory(directory)
    return path


def _name(temporary: Path, directory: Path, stem: str, suffix: str) -> Path:
    """Give the file the first name that is free, with link(2), because rename(2) would replace an existing file."""
    for number in range(1, MAX_SAME_SECOND):
        path = directory / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        try:
            os.link(temporary, path, follow_symlinks=False)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without links: reserve the name with an empty file, then rename the file to it.
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            except FileExistsError:
                continue
            os.rename(temporary, path)
        return path
    raise FileExistsError(errno.EEXIST, "too many reports of the same second", str(directory))
