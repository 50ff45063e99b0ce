"""Run a real `vitalsd` server in a process of its own, on a real socket."""

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

PYTHON = (sys.executable, "-m", "vitalsd")


class Serving:
    """Run ``vitalsd COMMAND ...`` on a free port; a context manager that ends it. `client` sends requests to it."""

    def __init__(self, state: Path, *arguments: str, command: str = "serve", python: Sequence[str] = PYTHON) -> None:
        self.process = subprocess.Popen(
            [*python, command, "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(state), "VITALSD_STATE_DIR": str(state)},
        )
        assert self.process.stderr is not None
        self.said = ""
        while (found := re.search(r"http://[^/\s]+", self.said)) is None:
            line = self.process.stderr.readline()
            assert line, f"vitalsd ended: {self.said}"
            self.said += line
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=10)

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON of a GET, which must succeed."""
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(10)

    def __enter__(self) -> "Serving":
        """Return the running server."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Kill the server."""
        self.client.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
