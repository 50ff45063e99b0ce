"""A viewer with a window of Qt, without a display, that gets frozen; see `test_frozen.py`."""

import json
import os
import sys

with open(os.environ["CLIENT_LOG"], "a+", encoding="utf-8") as log:
    log.write(json.dumps([os.getpid(), sys.argv[1:]]) + "\n")
    log.flush()
    log.seek(0)
    if sum("--vitalsd-sidecar" not in line for line in log) > 8:
        sys.exit("too many copies")

import vitalsd

vitalsd.freeze_support()

from PySide6.QtCore import QTimer  # type: ignore[import-not-found]  # noqa: E402
from PySide6.QtWidgets import QApplication, QLabel  # type: ignore[import-not-found]  # noqa: E402

from vitalsd_client import BugReport  # noqa: E402

application = QApplication(sys.argv[:1])
window = QLabel("viewer")
window.show()
sidecar = vitalsd.spawn(port=0, app="viewer", app_version="3.1", options=["--record-interval", "0.1"], timeout_s=60)


def work() -> None:
    """Note from the event loop what is being done, then let the test know."""
    marked = sidecar.mark("export started")
    found: dict[str, int | str] = {"pid": os.getpid(), "sidecar": sidecar.pid, "marked": marked}
    if (directory := os.environ.get("CLIENT_REPORTS")) is not None:
        found["report"] = str(BugReport("viewer", window_ms=100).save(directory))
    print(json.dumps(found), flush=True)


QTimer.singleShot(500, work)
sys.exit(application.exec())
