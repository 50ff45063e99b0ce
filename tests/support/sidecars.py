"""Run sidecars for tests: real processes, real sockets, directories of their own."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["UnixConnection", "ask", "environment", "eventually", "listing", "serving"]

VITALSD = (sys.executable, "-P", "-m", "vitalsd")


def environment(directory: Path) -> dict[str, str]:
    """Return the environment with runtime and state directories below `directory`."""
    return os.environ | {"VITALSD_RUNTIME_DIR": str(directory / "run"), "VITALSD_STATE_DIR": str(directory / "state")}


class UnixConnection(http.client.HTTPConnection):
    """Send HTTP requests over the Unix socket at `path`."""

    def __init__(self, path: str, timeout: float = 10) -> None:
        super().__init__("vitalsd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(where: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Return status and JSON of one GET; `where` is a URL or the path of a Unix socket."""
    connection = (
        http.client.HTTPConnection(where.removeprefix("http://"), timeout=10)
        if where.startswith("http://")
        else UnixConnection(where)
    )
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@contextmanager
def serving(
    directory: Path,
    *options: str,
    env: dict[str, str] | None = None,
    port: str = "0",
    program: Sequence[str] = VITALSD,
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run ``vitalsd serve``, and yield it with the JSON of its ready-fd."""
    reader, writer = os.pipe()
    tcp = [] if "--no-tcp" in options else ["--port", port]
    process = subprocess.Popen(
        [*program, "serve", *tcp, "--ready-fd", str(writer), *options],
        env=env or environment(directory),
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(writer,),
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as pipe:
            line = pipe.readline()
        yield process, json.loads(line or "{}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def eventually(condition: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """Return the first true value of `condition`; an assertion fails if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
    return value


def listing(directory: Path) -> list[str]:
    """Return the names of the files below `directory`; empty if it does not exist."""
    return sorted(os.listdir(directory)) if directory.exists() else []
