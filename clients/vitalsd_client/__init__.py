"""
Ask a sidecar, make and send bug reports: what a client application imports.

The import itself loads next to nothing; each name loads what it needs when it is first used. A program
that wants its first report quick names it at its start: ``from vitalsd_client import BugReport``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalsd.contract.metrics import FullMetrics, Measured, RuntimeMetrics, Unavailable
    from vitalsd.contract.report_archive import Bundle, Failure
    from vitalsd.report.builder import Redact
    from vitalsd_client.crash import Crash, last_crash
    from vitalsd_client.fetch_metrics import afetch, fetch
    from vitalsd_client.marks import mark
    from vitalsd_client.report import BugReport, Content
    from vitalsd_client.spool import Outcome, Spool
    from vitalsd_client.spool_store import Entry, SpoolError
    from vitalsd_client.upload import Attempt, Failed, Receipt

__all__ = [
    "Attempt",
    "BugReport",
    "Bundle",
    "Content",
    "Crash",
    "Entry",
    "Failed",
    "Failure",
    "FullMetrics",
    "Measured",
    "Outcome",
    "Receipt",
    "Redact",
    "RuntimeMetrics",
    "Spool",
    "SpoolError",
    "Unavailable",
    "afetch",
    "fetch",
    "last_crash",
    "mark",
]

HOMES = {
    "Attempt": "vitalsd_client.upload",
    "BugReport": "vitalsd_client.report",
    "Bundle": "vitalsd.contract.report_archive",
    "Content": "vitalsd_client.report",
    "Crash": "vitalsd_client.crash",
    "Entry": "vitalsd_client.spool_store",
    "Failed": "vitalsd_client.upload",
    "Failure": "vitalsd.contract.report_archive",
    "FullMetrics": "vitalsd.contract.metrics",
    "Measured": "vitalsd.contract.metrics",
    "Outcome": "vitalsd_client.spool",
    "Receipt": "vitalsd_client.upload",
    "Redact": "vitalsd.report.builder",
    "RuntimeMetrics": "vitalsd.contract.metrics",
    "Spool": "vitalsd_client.spool",
    "SpoolError": "vitalsd_client.spool_store",
    "Unavailable": "vitalsd.contract.metrics",
    "afetch": "vitalsd_client.fetch_metrics",
    "fetch": "vitalsd_client.fetch_metrics",
    "last_crash": "vitalsd_client.crash",
    "mark": "vitalsd_client.marks",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'vitalsd_client' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
