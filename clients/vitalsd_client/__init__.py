"""
Provide the public names of the client library: ask a sidecar, make and send bug reports.

The import itself loads no other module of the library; each name loads its module at its first use (PEP 562). A
program that must not wait at its first report imports the name at its start: ``from vitalsd_client import BugReport``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalsd.contract.metrics import FullMetrics, Measured, RuntimeMetrics, Unavailable
    from vitalsd.contract.report_archive import Bundle, Failure
    from vitalsd.report.builder import Redact
    from vitalsd_client.attachments import Content
    from vitalsd_client.crash import Crash, last_crash
    from vitalsd_client.fetch_metrics import afetch, fetch
    from vitalsd_client.marks import mark
    from vitalsd_client.report import BugReport
    from vitalsd_client.signals import gauge, heartbeat
    from vitalsd_client.spool import Spool
    from vitalsd_client.spool_lock import SpoolError
    from vitalsd_client.spool_sender import Outcome
    from vitalsd_client.spool_store import Entry
    from vitalsd_client.upload import UploadFailure, UploadReceipt, UploadResult

__all__ = [
    "BugReport",
    "Bundle",
    "Content",
    "Crash",
    "Entry",
    "Failure",
    "FullMetrics",
    "Measured",
    "Outcome",
    "Redact",
    "RuntimeMetrics",
    "Spool",
    "SpoolError",
    "Unavailable",
    "UploadFailure",
    "UploadReceipt",
    "UploadResult",
    "afetch",
    "fetch",
    "gauge",
    "heartbeat",
    "last_crash",
    "mark",
]

HOMES = {
    "BugReport": "vitalsd_client.report.BugReport",
    "Bundle": "vitalsd.contract.report_archive.Bundle",
    "Content": "vitalsd_client.attachments.Content",
    "Crash": "vitalsd_client.crash.Crash",
    "Entry": "vitalsd_client.spool_store.Entry",
    "Failure": "vitalsd.contract.report_archive.Failure",
    "FullMetrics": "vitalsd.contract.metrics.FullMetrics",
    "Measured": "vitalsd.contract.metrics.Measured",
    "Outcome": "vitalsd_client.spool_sender.Outcome",
    "Redact": "vitalsd.report.builder.Redact",
    "RuntimeMetrics": "vitalsd.contract.metrics.RuntimeMetrics",
    "Spool": "vitalsd_client.spool.Spool",
    "SpoolError": "vitalsd_client.spool_lock.SpoolError",
    "Unavailable": "vitalsd.contract.metrics.Unavailable",
    "UploadFailure": "vitalsd_client.upload.UploadFailure",
    "UploadReceipt": "vitalsd_client.upload.UploadReceipt",
    "UploadResult": "vitalsd_client.upload.UploadResult",
    "afetch": "vitalsd_client.fetch_metrics.afetch",
    "fetch": "vitalsd_client.fetch_metrics.fetch",
    "gauge": "vitalsd_client.signals.gauge",
    "heartbeat": "vitalsd_client.signals.heartbeat",
    "last_crash": "vitalsd_client.crash.last_crash",
    "mark": "vitalsd_client.marks.mark",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'vitalsd_client' has no attribute {name!r}")
    module, _, attribute = HOMES[name].rpartition(".")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
