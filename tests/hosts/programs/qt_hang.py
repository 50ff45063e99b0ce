"""A viewer whose event loop of Qt beats; its thread of the user interface waits for a lock, or idles; no display."""

import json
import sys
import threading
import time

from PySide6.QtCore import QTimer  # type: ignore[import-not-found]
from PySide6.QtWidgets import QApplication, QLabel  # type: ignore[import-not-found]

import vitalsd
from vitalsd_client import BugReport

directory, mode = sys.argv[1:]
application = QApplication(sys.argv[:1])
window = QLabel("viewer")
window.show()
sidecar = vitalsd.spawn(port=0, app="viewer", options=["--record-interval", "0.25"], timeout_s=60)
heartbeat = sidecar.heartbeat("ui", 1.0)
timer = QTimer()
heartbeat.beat_on_qt(timer)
lock = threading.Lock()


def say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def report(event: str) -> None:
    say(event, path=str(BugReport("viewer", window_ms=100).save(f"{directory}/{event}")))


def work() -> None:
    """Hold the lock for which the user interface waits until a line comes, and report meanwhile and afterwards."""
    with lock:
        QTimer.singleShot(0, application, wait)
        time.sleep(3)
        report("during")
        sys.stdin.readline()
    time.sleep(1.0)  # the next looks of the sidecar find the beats after it
    report("after")
    say("done")


def wait() -> None:
    with lock:
        pass


def begin() -> None:
    threading.Thread(target=work, daemon=True).start()


say("started", url=sidecar.url, pid=sidecar.pid)
if mode == "hang":
    QTimer.singleShot(3000, begin)
sys.exit(application.exec())
