"""
Read the file that ``vitalsd replay`` serves: a bug report, a member of one, or a run.

The file may come from another machine and another user, so it is not trusted: its sizes are bounded, and whatever is
not as vitalsd writes it raises an `UnreadableRunError` with one sentence.
"""

import errno
import io
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from typing_extensions import TypedDict

from vitalsd.contract.application import Application
from vitalsd.contract.host import HostFactsJson, RecordedHost
from vitalsd.contract.metrics import FullMetrics, Measured, parse_runtime_metrics
from vitalsd.contract.report_archive import HISTORY, MANIFEST, METADATA, METRICS, PREVIOUS_RUN
from vitalsd.contract.shapes import Count, Doc, Lazy
from vitalsd.recording.history_import import check_json, parse_json, read_history
from vitalsd.recording.run_files import MAGIC, open_regular
from vitalsd.recording.run_reader import Run, State, UnreadableRunError, read_run
from vitalsd.recording.series import Record

__all__ = ["Card", "RecordedRun", "ReplayFile", "ReportCardJson", "read_replay_file"]

MAX_REPORT_BYTES = 64 << 20
"""Limit of a report, bytes. The attachments of one that vitalsd writes take at most half of that."""
MAX_MEMBER_BYTES = 16 << 20
"""Limit of one unpacked member that is read, bytes. A history that vitalsd writes has at most 8 MiB."""
MAX_FILES = 20_000
"""Limit of the files in the zip, attachments included."""
CENTRAL_HEADER = b"PK\1\2"
"""Signature of each file in the directory of a zip (APPNOTE.TXT of PKWARE, section 4.3.12)."""
RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""Form of the id of a run."""
MAX_ENTRIES = 200
"""Limit of the members, and of the failures, that the card lists."""
MAX_TEXT = 10_000
"""Limit of a text in the card, characters; the rest is cut."""


class RecordedRun(NamedTuple):
    """Hold one run in the file."""

    run: Run
    record: Record


class ReportMemberJson(TypedDict):
    """A file in a report."""

    name: str
    size: Annotated[Count, Doc("Uncompressed size, bytes.")]


class ReportFailureJson(TypedDict):
    """A file that is not in a report."""

    member: str
    reason: str


class ReportMetricsJson(TypedDict):
    """The window that was measured when the report was requested."""

    sample_window_ms: Count
    process: Annotated[dict[str, Any], Lazy("vitalsd.contract.metrics:ProcessMetrics")]
    threads: Annotated[Count, Doc("Number of threads.")]


class ReportCardJson(TypedDict):
    """What a replayed report states about itself; null where it states nothing."""

    app: str | None
    app_version: str | None
    description: Annotated[str | None, Doc("Description by the user.")]
    platform: str | None
    host: HostFactsJson
    triggered_at: str | None
    submitted_at: str | None
    vitalsd_version: str | None
    members: list[ReportMemberJson]
    failures: list[ReportFailureJson]
    metrics: Annotated[ReportMetricsJson | None, Doc("null: the report has none.")]


class Card(NamedTuple):
    """Hold what a report states about itself; a field is ``None`` where it states nothing."""

    app: str | None
    app_version: str | None
    description: str | None
    platform: str | None
    host: RecordedHost
    triggered_at: str | None
    submitted_at: str | None
    vitalsd_version: str | None
    members: Sequence[tuple[str, int]]
    """Name and size in bytes of each member."""
    failures: Sequence[tuple[str, str]]
    """Name of each member that is missing, and the reason."""
    metrics: Measured | FullMetrics | None
    """The window that was measured when the report was requested."""

    def to_json(self) -> ReportCardJson:
        """Return it as ``GET /info`` shows it."""
        return {
            "app": self.app,
            "app_version": self.app_version,
            "description": self.description,
            "platform": self.platform,
            "host": self.host.to_json(),
            "triggered_at": self.triggered_at,
            "submitted_at": self.submitted_at,
            "vitalsd_version": self.vitalsd_version,
            "members": [{"name": name, "size": size} for name, size in self.members],
            "failures": [{"member": member, "reason": reason} for member, reason in self.failures],
            "metrics": None
            if self.metrics is None
            else {
                "sample_window_ms": self.metrics.sample_window_ms,
                "process": self.metrics.process.model_dump(),
                "threads": len(self.metrics.threads),
            },
        }


class ReplayFile(NamedTuple):
    """Hold the content of the file."""

    name: str
    opened: RecordedRun
    """The crashed run if there is one, or else the run in which the report was made."""
    others: Sequence[RecordedRun]
    card: Card | None
    """What the report states about itself; ``None``: the file is not a report."""
    content: bytes | None
    """The bytes of the report; ``None``: the file is not a report."""


def read_replay_file(path: Path) -> ReplayFile:
    """
    Read a report (``.zip``), its ``previous-run.json`` or ``runtime-history.json``, or a run (``.sqlite``).

    Raises:
        UnreadableRunError: the file is none of them, or damaged; ``str(error)`` names the file and the reason.
        OSError: it cannot be read.
    """
    file_path = path.resolve(strict=True)  # a link is followed only for the file that the user names
    try:
        fd = open_regular(file_path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UnreadableRunError(f"{path.name} is not a regular file") from None
        raise
    with os.fdopen(fd, "rb") as file:
        magic, size = file.read(len(MAGIC)), os.fstat(fd).st_size
        if magic == MAGIC:
            return ReplayFile(path.name, RecordedRun(*read_run(file_path)), (), None, None)
        if size > MAX_REPORT_BYTES:
            raise UnreadableRunError(f"{path.name} has {size} bytes; a report has at most {MAX_REPORT_BYTES}")
        content = magic + file.read(size)
    if content.startswith(b"PK"):
        return _read_report(path, content)
    if content.lstrip()[:1] == b"{":
        return ReplayFile(path.name, _read_member(path.name, content, RecordedHost(), {}), (), None, None)
    raise UnreadableRunError(
        f"{path.name} is not a bug report (no zip archive), not a run and not a member of a report"
    )


def _read_report(path: Path, content: bytes) -> ReplayFile:
    if content.count(CENTRAL_HEADER) > MAX_FILES:  # zipfile would make an object for each
        raise UnreadableRunError(f"{path.name} has more than {MAX_FILES} files; a report has a few")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            for name in (METADATA, MANIFEST, HISTORY, PREVIOUS_RUN):
                if names.count(name) > 1:
                    raise UnreadableRunError(
                        f"{path.name} has {names.count(name)} members named {name}; a report has one."
                        " Unpack it and replay one of the files"
                    )
            if not {METADATA, MANIFEST, METRICS, HISTORY, PREVIOUS_RUN} & set(names):
                raise UnreadableRunError(f"{path.name} is not a bug report: it has no {METADATA}")
            about = _object(archive, path, METADATA)
            card = _card(about, _object(archive, path, MANIFEST), infos, _metrics(archive, path))
            runs = [
                _read_member(path.name, _unpacked(archive, path, name), card.host, about if name == HISTORY else {})
                for name in (HISTORY, PREVIOUS_RUN)
                if name in names
            ]
    except zipfile.BadZipFile as error:
        raise UnreadableRunError(f"{path.name} is damaged or incomplete: {error}") from None
    except (zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise UnreadableRunError(f"{path.name}: {error}") from None
    if not runs:
        raise UnreadableRunError(
            f"{path.name} has neither {HISTORY} nor {PREVIOUS_RUN}: nothing was recorded, so there is nothing to replay"
        )
    crashed = [each for each in runs if each.run.state == "crashed"]
    opened = max(crashed or runs[:1], key=lambda each: each.run.last_wall_ns or 0)
    return ReplayFile(path.name, opened, [each for each in runs if each is not opened], card, content)


def _unpacked(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MAX_MEMBER_BYTES:
        raise UnreadableRunError(f"{name} in {path.name} has {info.file_size} bytes; it may have {MAX_MEMBER_BYTES}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # ZipFile.read, and other compression methods, unpack everything, whatever size the header states.
        raise UnreadableRunError(f"{name} in {path.name} is compressed as in no report")
    with archive.open(info) as member:
        return member.read(info.file_size + 1)


def _object(archive: zipfile.ZipFile, path: Path, name: str) -> Mapping[str, Any]:
    """Return a member that describes the report; empty if it is missing or, after a redact hook, not a JSON object."""
    try:
        found = parse_json(_unpacked(archive, path, name))
    except (KeyError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(archive: zipfile.ZipFile, path: Path) -> Measured | FullMetrics | None:
    try:
        body = _unpacked(archive, path, METRICS)
        check_json(body)
        found = parse_runtime_metrics(body)
    except (KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, Measured) else None


def _card(
    about: Mapping[str, Any],
    manifest: Mapping[str, Any],
    infos: Sequence[zipfile.ZipInfo],
    metrics: Measured | FullMetrics | None,
) -> Card:
    app, system, vitalsd = (_mapping(about.get(key)) for key in ("app", "os", "vitalsd"))
    failures = manifest.get("failures")
    return Card(
        app=_text(app.get("name")),
        app_version=_text(app.get("version")),
        description=_text(about.get("description")),
        platform=_text(about.get("platform")),
        host=RecordedHost.read(
            {**system, "system": system.get("name")}
            | {key: about.get(key) for key in ("cpu_count", "utc_offset_minutes")}
        ),
        triggered_at=_text(about.get("triggered_at")),
        submitted_at=_text(about.get("submitted_at")),
        vitalsd_version=_text(vitalsd.get("version")),
        members=[(info.filename[:MAX_TEXT], info.file_size) for info in infos[:MAX_ENTRIES]],
        failures=[
            (_text(each.get("member")) or "", _text(each.get("reason")) or "")
            for each in (failures if isinstance(failures, list) else [])[:MAX_ENTRIES]
            if isinstance(each, dict)
        ],
        metrics=metrics,
    )


def _read_member(file: str, body: bytes, host: RecordedHost, about: Mapping[str, Any]) -> RecordedRun:
    """
    Read ``previous-run.json``, which has the description of its run, or ``runtime-history.json``, which has none.

    Args:
        file: the name of the file that is replayed.
        body: the content of the member.
        host: the machine on which the report was made.
        about: the metadata of the report, which describe the process of ``runtime-history.json``.
    """
    try:
        if len(body) > MAX_MEMBER_BYTES:
            raise ValueError(f"{len(body)} bytes, and a history has at most {MAX_MEMBER_BYTES}")
        table = parse_json(body)
        record = read_history(table)
    except (ValueError, RecursionError) as error:
        raise UnreadableRunError(f"{file}: {error}") from None
    described = _mapping(table.get("run"))
    target, app = _mapping(about.get("target")), _mapping(about.get("app"))
    previous = bool(described)
    state = (described if previous else target).get("state")
    first = next(record.snapshots(), None)
    run_id = _text(described.get("id")) or record.identity.start_id
    identity = record.identity._replace(program=_text(described.get("program")) or "")
    record.identity = identity
    return RecordedRun(
        Run(
            id=run_id if RUN_ID.fullmatch(run_id) else f"{identity.pid}-{identity.start_key}",
            path=Path(file),
            identity=identity,
            state=_state(state, "crashed" if previous else "running"),
            ended=_text((described if previous else target).get("ended")),
            first_wall_ns=first.wall_ns if first else None,
            last_wall_ns=record.last.wall_ns if record.last else None,
            snapshots=len(record),
            reported=False,
            size_bytes=len(body),
            application=_application(described.get("app"), described.get("app_version"))
            if previous
            else _application(app.get("name"), app.get("version")),
            host=RecordedHost.read(described.get("host")) if previous and described.get("host") else host,
        ),
        record,
    )


def _state(found: Any, default: State) -> State:
    return next((state for state in get_args(State) if state == found), default)


def _application(app: Any, app_version: Any) -> Application:
    try:
        return Application.checked(_text(app), _text(app_version))
    except ValueError:
        return Application()


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


def _text(found: Any) -> str | None:
    return found[:MAX_TEXT] if isinstance(found, str) and found else None
