"""Plant hangs in clients, watch them as a sidecar does, and collect what is told of them."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import tools
from support.paths import SUPPORT
from vitalsd.contract.signals_page import SignalsPage
from vitalsd.recording.hangs import PERIOD_NS, Hang, HangDetector
from vitalsd.sources.linux.source import LinuxSource

__all__ = ["LIMIT_MS", "Gap", "HangingClient", "build_programs", "matrix", "watch_until"]

LIMIT_MS = 1000
"""Limit of the heartbeats, ms."""
SOURCE = SUPPORT / "programs" / "hanging.c"


def build_programs(directory: Path) -> tuple[Path, Path]:
    """Compile the client, and the library whose functions a Python client calls with the interpreter lock."""
    compiler = tools.program("cc", package="gcc")
    program, library = directory / "hanging", directory / "libhanging.so"
    subprocess.run([compiler, "-O1", "-pthread", "-o", program, SOURCE], check=True)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-DLIBRARY", "-o", library, SOURCE], check=True)
    (directory / "big").write_bytes(os.urandom(1 << 20) * 64)
    os.sync()
    return program, library


@dataclass(frozen=True)
class Gap:
    """A gap between two beats, as the client itself measured it, ns."""

    length_ns: int
    cpu_ns: int


@dataclass
class HangingClient:
    """
    A client with one heartbeat, and the detector that watches it from this process.

    Args:
        command: starts it; the reference of the page is appended by `reference`.
    """

    command: Callable[[str], Sequence[str]]
    inside: bool = False
    is_python: bool | None = None
    gaps: list[Gap] = field(default_factory=list)
    hangs: dict[int, Hang] = field(default_factory=dict)
    """The last report of each hang, by its start."""
    live: dict[int, Hang] = field(default_factory=dict)
    """The first report of each hang."""
    statuses: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page = SignalsPage()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            self.command("own" if self.inside else json.dumps(dict(self.page.reference))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        self.source = LinuxSource(self.process.pid)
        self.detector = HangDetector(is_python=self.is_python)
        self._text = b""

    def order(self, *words: object) -> None:
        """Make the client hang."""
        assert self.process.stdin is not None
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())

    def look(self) -> None:
        """Look once, as the thread of the sampler does."""
        if not self.inside:
            content = self.page.read()
            self._note(self.detector.look(time.monotonic_ns(), content, self.source.look_at))

    def receive(self) -> None:
        """Take the lines that the client has printed."""
        assert self.process.stdout is not None
        self._text += os.read(self.process.stdout.fileno(), 65536)
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "gap":
                self.gaps.append(Gap(*map(int, rest.split())))
            else:
                self._note([Hang(**json.loads(rest))])

    def _note(self, hangs: Iterable[Hang]) -> None:
        for hang in hangs:
            self.live.setdefault(hang.monotonic_ns, hang)
            self.hangs[hang.monotonic_ns] = hang

    @property
    def is_beating(self) -> bool:
        """Whether its heartbeat is open and has begun to beat."""
        return any(status.state == "beating" for status in self.detector.statuses)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()
        self.source.close()
        self.page.close()


def watch_until(clients: Sequence[HangingClient], condition: Callable[[], bool], limit_s: float) -> None:
    """Look at all clients every 250 ms until a condition holds. Raise `AssertionError` after `limit_s`."""
    ends = time.monotonic() + limit_s
    due_ns = time.monotonic_ns()
    with selectors.DefaultSelector() as selector:
        for client in clients:
            assert client.process.stdout is not None
            selector.register(client.process.stdout, selectors.EVENT_READ, client)
        while True:
            now_ns = time.monotonic_ns()
            if now_ns >= due_ns:
                for client in clients:
                    client.look()
                due_ns = max(due_ns + PERIOD_NS, now_ns)
                if condition():
                    return
                assert time.monotonic() < ends, "the condition did not hold in time"
            for key, _ in selector.select(max(0, due_ns - time.monotonic_ns()) / 1e9):
                key.data.receive()


def matrix(found: Iterable[tuple[str, str]]) -> str:
    """Return a table of what was told, a line for each kind that was planted."""
    rows: dict[str, Counter[str]] = {}
    for planted, told in found:
        rows.setdefault(planted, Counter())[told] += 1
    return "\n".join(
        f"{planted:24}" + ", ".join(f"{told} {count}" for told, count in counts.most_common())
        for planted, counts in rows.items()
    )
