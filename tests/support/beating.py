"""
Run a client that has a sidecar, a heartbeat and gauges, and control it.

As a program it starts a sidecar, in the process or beside it, writes a line of JSON about it, and then obeys one
command per line of stdin. Its main thread beats "ui" each 50 ms in between, so a command that takes long is a hang.
`BeatingClient` starts it.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from support.paths import TESTS
from support.sidecars import ask, environment, eventually

__all__ = ["LIMIT_S", "BeatingClient"]

LIMIT_S = 1.0
"""Limit of the heartbeat, s."""
LEARNT_S = 2.5
"""Time of the first lessons of the sidecar, s; a hang in it may have the cause ``unknown``."""


class BeatingClient:
    """
    Run this module as a program; a context manager that kills it and its sidecar.

    Args:
        directory: runtime and state directories are below it.
        begin: ``spawn``: the sidecar runs beside it; ``start``: in it.
    """

    def __init__(self, directory: Path, begin: str = "spawn") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "support.beating", begin],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment(directory), "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
        )
        self.pid = self.process.pid
        self.ready = self.read()
        self.url: str = self.ready["url"]
        self._sidecars: list[int] = [self.ready["sidecar"]]

    def read(self) -> Any:
        """Return the JSON of the next line of the program."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the client has ended"
        return json.loads(line)

    def tell(self, command: str) -> None:
        """Send a command, and do not wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> Any:
        """Send a command, and return its answer."""
        self.tell(command)
        return self.read()

    @property
    def sidecar(self) -> int:
        """The pid of the newest sidecar."""
        return self._sidecars[-1]

    def another(self) -> None:
        """End the sidecar, and have the client start another one."""
        found = self.ask("another")
        self.url = found["url"]
        self._sidecars.append(found["sidecar"])

    def heartbeats(self) -> dict[str, dict[str, Any]]:
        """Return what ``/heartbeats`` says, by name."""
        return {each["name"]: each for each in self._get("/heartbeats")}

    def hangs(self) -> list[dict[str, Any]]:
        """Return the hangs of ``/history``."""
        return [each for each in self._get("/history")["events"] if each["kind"] == "hang"]

    def beating(self) -> None:
        """Wait until the sidecar has seen "ui" beat, and has had the time to learn where its thread sleeps."""
        eventually(lambda: self.heartbeats().get("ui", {}).get("state") == "beating", 20)
        time.sleep(LEARNT_S)

    def silent(self, timeout_s: float = 30) -> dict[str, Any]:
        """Return the heartbeat "ui" when it is silent, and its silence is a hang."""

        def found() -> dict[str, Any] | None:
            beat = self.heartbeats().get("ui", {})
            return beat if beat.get("state") == "silent" and beat["cause"] else None

        beat: dict[str, Any] = eventually(found, timeout_s)
        return beat

    def over(self, timeout_s: float = 30) -> list[dict[str, Any]]:
        """Return the hangs, of which there is one at least, when none lasts any more."""

        def found() -> list[dict[str, Any]]:
            hangs = self.hangs()
            return [] if any(each["ongoing"] for each in hangs) else hangs

        hangs: list[dict[str, Any]] = eventually(found, timeout_s)
        return hangs

    def _get(self, path: str) -> Any:
        status, body = ask(self.url, path)
        assert status == 200, body
        return body

    def __enter__(self) -> "BeatingClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.process.kill()
        for pid in {*self._sidecars} - {self.pid}:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.communicate()


# The program


def main(begin: str) -> None:
    import vitalsd

    def started() -> Any:
        if begin == "start":
            return vitalsd.start(port=0, record_interval_s=0.25)
        return vitalsd.spawn(port=0, options=["--record-interval", "0.25", "--linger", "60"])

    sidecar = started()
    heartbeat = sidecar.heartbeat("ui", LIMIT_S)

    def say(about: Any) -> None:
        print(json.dumps(about), flush=True)

    def address() -> dict[str, Any]:
        return {"url": sidecar.url, "sidecar": getattr(sidecar, "pid", os.getpid())}

    say(address())
    while True:
        heartbeat.beat()
        if not select.select([0], [], [], 0.05)[0]:
            continue
        line = os.read(0, 256).decode()
        if not line:
            return
        for command in line.splitlines():
            match command.split():
                case ["block", ms]:
                    lock = threading.Lock()
                    lock.acquire()
                    lock.acquire(timeout=int(ms) / 1000)
                case ["pause", ms]:
                    heartbeat.pause()
                    time.sleep(int(ms) / 1000)
                    heartbeat.resume()
                case ["fork", ms]:
                    if not (child := os.fork()):
                        os.close(0)
                        os.close(1)  # or the parent's reader would wait for it
                        heartbeat.beat()  # into memory of its own
                        heartbeat.pause()
                        time.sleep(int(ms) / 1000)
                        os._exit(0)
                    threading.Thread(target=os.waitpid, args=(child, 0), daemon=True).start()
                case ["gauge", name, value]:
                    sidecar.gauge(name).set(float(value))
                case ["another"]:
                    sidecar.stop()
                    sidecar = started()
                    say(address())
                    continue
                case ["open", name]:
                    sidecar.heartbeat(name, 3600).beat()
                case ["close", name]:
                    sidecar.heartbeat(name).close()
                case _:
                    raise SystemExit(f"no command: {command}")
            heartbeat.beat()
            say(command)


if __name__ == "__main__":
    main(sys.argv[1])
