"""
What a bug-report flow imports: `fetch` and `afetch`, `BugReport`, `Spool`.

The import itself loads next to nothing; each name loads what it needs when it is first used. A program
that wants its first report quick names it at its start: ``from vitalsd_client import BugReport``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalsd_client.archive import Bundle
    from vitalsd_client.client import afetch, fetch
    from vitalsd_client.report import BugReport
    from vitalsd_client.spool import Spool
    from vitalsd_client.states import SpoolError

__all__ = ["BugReport", "Bundle", "Spool", "SpoolError", "afetch", "fetch"]


def __getattr__(name: str) -> Any:
    homes = {
        "BugReport": "report",
        "Bundle": "archive",
        "Spool": "spool",
        "SpoolError": "states",
        "afetch": "client",
        "fetch": "client",
    }
    if name not in homes:
        raise AttributeError(f"module 'vitalsd_client' has no attribute {name!r}")
    return getattr(import_module(f"vitalsd_client.{homes[name]}"), name)


def __dir__() -> list[str]:
    return __all__
