"""
Redact, describe and seal the members of a bug report, which a client, the command line or a sidecar collected.

The members are collected before, by the program that can request them. This module redacts, describes and seals them,
so it runs in the program with the redact hooks. It also removes the names of child processes, for all programs alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from vitalsd import __version__
from vitalsd.contract.application import Application
from vitalsd.contract.host import RecordedHost
from vitalsd.contract.report_archive import (
    HISTORY,
    METADATA,
    METRICS,
    PREVIOUS_RUN,
    Bundle,
    Failure,
    metadata,
    new_report_id,
    seal,
)

__all__ = ["Collected", "Heading", "Redact", "build"]

Redact = Callable[[str, bytes], bytes | None]
"""Gets the name and the content of a member, returns what may leave the program; ``None``: nothing."""


@dataclass(slots=True)
class Collected:
    """Hold the members of a report before redaction."""

    platform: str
    members: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    application: Application = Application()
    """The application as the client named it to the sidecar, or as the run on disk has it."""
    host: RecordedHost | None = None
    """The machine of a file that is replayed; ``None``: this machine."""
    target: Mapping[str, Any] | None = None
    """State of the recorded process: ``{"state": …, "ended": …}``; ``None``: not known."""
    runs: dict[str, str] = field(default_factory=dict)
    """Member that contains a crashed run, by id of the run: an earlier run, or that of the target itself."""


@dataclass(frozen=True, slots=True)
class Heading:
    """Hold what the client states about a report."""

    app: str | None
    """Application id; ``None``: that of `Collected.application`."""
    app_version: str | None = None
    description: str = ""
    children: bool = False
    """Whether the members may name child processes; the sums of the application are there in any case."""
    triggered: datetime = field(default_factory=lambda: datetime.now(UTC))
    report_id: str = field(default_factory=new_report_id)


def build(heading: Heading, collected: Collected, redact: Sequence[Redact] = (), *, created: datetime) -> Bundle:
    """
    Return the sealed report.

    Args:
        heading: what the client states.
        collected: the members; they are not changed.
        redact: hooks, each of which is called with every member; a member for which a hook fails is left out.
        created: the time at which the report is submitted.
    """
    known = collected.application
    app = heading.app or known.app
    app_version = (
        heading.app_version if heading.app_version is not None else known.app_version if app == known.app else None
    )
    about = metadata(
        app=app,
        app_version=app_version,
        vitalsd_version=__version__,
        report_id=heading.report_id,
        triggered=heading.triggered,
        submitted=created,
        description=heading.description,
        platform=collected.platform,
        host=collected.host or RecordedHost.this(),
        target=collected.target,
    )
    members: dict[str, bytes] = {}
    failures = list(collected.failures)
    for name, content in {METADATA: about, **collected.members}.items():
        kept = content if heading.children else _nameless(name, content)
        if isinstance(kept, bytes):
            kept = _redacted(name, kept, redact)
        if isinstance(kept, Failure):
            failures.append(kept)
        else:
            members[name] = kept
    return seal(app, heading.report_id, created, members, failures)


def _nameless(name: str, content: bytes) -> bytes | Failure:
    """Return a member without the list of child processes; if that cannot be removed, the reason why it is left out."""
    if name not in (METRICS, HISTORY, PREVIOUS_RUN):
        return content
    try:
        body = json.loads(content)
        if not body.get("children"):
            return content
    except (ValueError, AttributeError, RecursionError):
        return Failure(name, "left out: it may name child processes, and is not understood")
    if name == METRICS:
        del body["children"]
    else:
        body["children"] = []
    return json.dumps(body, separators=(",", ":")).encode()


def _redacted(name: str, content: bytes, redact: Sequence[Redact]) -> bytes | Failure:
    for hook in redact:
        try:
            kept = hook(name, content)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a member that a hook cannot read stays in the program
            return Failure(name, f"left out: a redact hook raised {type(error).__name__}")
        if kept is None:
            return Failure(name, "left out by a redact hook")
        if not isinstance(kept, bytes):
            return Failure(name, f"left out: a redact hook returned {type(kept).__name__}")
        content = kept
    return content
