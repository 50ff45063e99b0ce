"""
Drive a real headless Chromium over its DevTools pipe: without a driver program, a port or a library.

Commands and events are JSON, each ended by NUL, on descriptors 3 and 4 of the browser.
"""

import base64
import fcntl
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from support.tools import program

__all__ = ["Browser"]

FLAGS = (
    "--headless",
    "--no-sandbox",  # CI is root in a container, where Chromium refuses to start with one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
ONTO_3_AND_4 = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def _pipe() -> tuple[int, int]:
    """Return a pipe with descriptors other than 3 and 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Browser:
    """
    Open one page of a browser with a new profile; a context manager that ends it.

    `complaints` holds the logged errors, exceptions and violations of the content security policy of the page.
    """

    def __init__(self, *flags: str, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        executable = program("chromium", "google-chrome", "chromium-browser", package="chromium")
        self._profile = tempfile.TemporaryDirectory(prefix="vitalsd-browser-", ignore_cleanup_errors=True)
        down_read, down_write = _pipe()
        up_read, up_write = _pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-ISc", ONTO_3_AND_4, str(down_read), str(up_write), executable),
                *(*FLAGS, *flags),
                *(f"--user-data-dir={self._profile.name}", "about:blank"),
            ],
            pass_fds=(down_read, up_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self._down, self._up = down_write, up_read
        self._buffer = b""
        self._number = 0
        self._loads = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requested: list[str] = []
        """Every address that the page asked for."""
        pages = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Performance", "Audits"):
            self.call(f"{domain}.enable")
        self.resize(width, height, scale)
        self.emulate(dark=dark)

    def __enter__(self) -> "Browser":
        """Return the open browser."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the browser and remove its profile."""
        self._process.kill()
        self._process.wait()
        os.close(self._down)
        os.close(self._up)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one DevTools command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while True:
            answer = self._receive(deadline)
            assert answer is not None, f"the browser did not answer {method}"
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def listen(self, seconds: float) -> None:
        """Receive events of the page for so long, and collect its complaints."""
        deadline = time.monotonic() + seconds
        while self._receive(deadline) is not None:
            pass

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        while b"\0" not in self._buffer:
            wait_s = deadline - time.monotonic()
            if wait_s <= 0 or not select.select([self._up], [], [], wait_s)[0]:
                return None
            chunk = os.read(self._up, 1 << 16)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        content, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(content)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console: {said['args']}")
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log: {said['entry']['text']} {said['entry'].get('url', '')}")
        elif method == "Audits.issueAdded" and "contentSecurityPolicy" in json.dumps(said["issue"]):
            self.complaints.append(f"policy: {said['issue']}")
        elif method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Network.requestWillBeSent":
            self.requested.append(said["request"]["url"])

    def open(self, url: str) -> None:
        """Open a URL; return when the page and its script are loaded."""
        before = self._loads
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while self._loads == before:
            assert self._receive(deadline) is not None, f"{url} was not loaded"

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the size of the viewport, CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def emulate(self, *, dark: bool = False, still: bool = False) -> None:
        """Emulate the preferences of the user: a dark page, reduced motion."""
        self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
            ],
        )

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def eventually(self, script: str, accept: Callable[[Any], object] = bool, seconds: float = 15) -> Any:
        """Return the first value of `script` that `accept` accepts; an assertion fails if none comes in time."""
        deadline = time.monotonic() + seconds
        while not accept(value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} was still {value!r} after {seconds} s"
            self.listen(0.05)
        return value

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a position, CSS pixels."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str) -> None:
        """Type text into the focused element."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key: a character, or a name as in `KeyboardEvent.key`."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, " ": 32}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def script_seconds(self) -> float:
        """Return the time spent in the page's script, s."""
        metrics = {each["name"]: each["value"] for each in self.call("Performance.getMetrics")["metrics"]}
        return float(metrics["ScriptDuration"])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of the viewport, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
