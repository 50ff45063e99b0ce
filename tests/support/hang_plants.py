"""Plant hangs in clients, watch them as a sidecar does, and collect what it reports of them."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support import tools
from support.paths import SUPPORT
from vitalsd.contract.signals_page import SignalsPage
from vitalsd.recording.hangs import PERIOD_NS, Hang, HangDetector
from vitalsd.sources.linux.source import LinuxSource

__all__ = ["LIMIT_MS", "Gap", "HangingClient", "Programs", "hogs", "in_group", "matrix", "watch_for", "watch_until"]

LIMIT_MS = 1000
"""Limit of the heartbeats, ms."""
SOURCE = SUPPORT / "programs" / "hanging.c"
BIG_BYTES = 64 << 20


class Gap(NamedTuple):
    """A gap between two beats, as the client itself measured it, ns."""

    length_ns: int
    cpu_ns: int
    wait_ns: int


class Programs:
    """The clients, compiled into a directory that lies on a disk."""

    def __init__(self, directory: Path) -> None:
        compiler = tools.program("cc", package="gcc")
        self._directory = directory
        self._program, self._library = directory / "hanging", directory / "libhanging.so"
        subprocess.run([compiler, "-O1", "-pthread", "-o", self._program, SOURCE], check=True)
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-DLIBRARY", "-o", self._library, SOURCE], check=True)
        with open(directory / "big", "wb") as file:
            file.write(os.urandom(1 << 20) * (BIG_BYTES >> 20))
            os.fsync(file.fileno())

    def start(self, where: str) -> "HangingClient":
        """
        Start a client.

        Args:
            where: ``native`` or ``cond``: in C, with a loop that waits in epoll or in a condition variable; ``beside``:
                in Python; ``inside``: in Python, and it looks for hangs itself.
        """

        def command(page: SignalsPage) -> list[str | Path]:
            limit = str(LIMIT_MS)
            if where in ("native", "cond"):
                return [self._program, page.reference["path"], "0", limit, where, self._directory]
            reference = "own" if where == "inside" else json.dumps(dict(page.reference))
            return [sys.executable, SUPPORT / "hanging.py", reference, "0", limit, self._library, where]

        return HangingClient(command, inside=where == "inside")


@dataclass
class HangingClient:
    """
    A client with one heartbeat, and the detector that watches it from this process.

    Args:
        command: returns the command that starts it, for a page.
        inside: whether the client looks for hangs itself.
    """

    command: Callable[[SignalsPage], Sequence[str | Path]]
    inside: bool = False
    gaps: list[Gap] = field(default_factory=list)
    first: dict[int, Hang] = field(default_factory=dict)
    """The first report of each hang, by its start."""
    hangs: dict[int, Hang] = field(default_factory=dict)
    """The last report of each hang, by its start."""

    def __post_init__(self) -> None:
        self.page = SignalsPage()
        self.process = subprocess.Popen(
            self.command(self.page),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        self.source = LinuxSource(self.process.pid)
        self.detector = HangDetector()
        self._text = b""
        self._begun = time.monotonic()

    def order(self, kind: str, ms: int) -> None:
        """Make the client hang."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {ms}\n".encode())

    def look(self) -> None:
        """Look once, as the thread of the sampler does."""
        if not self.inside:
            content = self.page.read()
            self._note(self.detector.look(time.monotonic_ns(), content, self.source.look_at))

    def receive(self) -> None:
        """Take the lines that the client has printed."""
        assert self.process.stdout is not None
        received = os.read(self.process.stdout.fileno(), 65536)
        assert received, f"the client ended with {self.process.wait()}"
        *lines, self._text = (self._text + received).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "gap":
                self.gaps.append(Gap(*map(int, rest.split())))
            else:
                self._note([Hang(**json.loads(rest))])

    def _note(self, hangs: Iterable[Hang]) -> None:
        for hang in hangs:
            self.first.setdefault(hang.monotonic_ns, hang)
            self.hangs[hang.monotonic_ns] = hang

    @property
    def is_ready(self) -> bool:
        """Whether it has beaten for a while, so that the detector knows where it waits."""
        beats = self.inside or any(status.state == "beating" for status in self.detector.statuses)
        return beats and time.monotonic() - self._begun > 2.5

    def hang_of(self, gap: Gap) -> tuple[Hang, Hang] | None:
        """Return the first and the last report of the hang in a gap; ``None``: it is not reported as over."""
        for start, hang in self.hangs.items():
            if hang.duration_ns == gap.length_ns and not hang.ongoing:
                return self.first[start], hang
        return None

    def hurry(self) -> None:
        """Give its threads a CPU whenever they want one, if this user may."""
        if sys.platform == "linux":
            for tid in os.listdir(f"/proc/{self.process.pid}/task"):
                with suppress(OSError):
                    os.sched_setscheduler(int(tid), os.SCHED_RR, os.sched_param(1))

    def close(self) -> None:
        """End it, also if it is stopped."""
        self.process.kill()
        self.process.communicate()
        self.source.close()
        self.page.close()


def watch_until(clients: Sequence[HangingClient], condition: Callable[[], bool], limit_s: float = 60) -> None:
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


def watch_for(clients: Sequence[HangingClient], seconds: float) -> None:
    """Look at all clients for that long."""
    ends = time.monotonic() + seconds
    watch_until(clients, lambda: time.monotonic() >= ends, seconds + 60)


@contextmanager
def in_group(pid: int, mount: str, file: str) -> Iterator[Path]:
    """Put a process into a control group of its own; yield the path of a file of it. Raise `OSError`."""
    group = Path(mount) / f"vitalsd-{pid}"
    group.mkdir()
    if not (group / file).exists():
        group.rmdir()
        raise FileNotFoundError(f"{mount} has no {file}")
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield group / file
    finally:
        with suppress(OSError):
            (Path(mount) / "cgroup.procs").write_text(str(pid))
        ends = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < ends:
            time.sleep(0.01)
        group.rmdir()


@contextmanager
def hogs(count: int, cpus: Iterable[int]) -> Iterator[None]:
    """Run processes that use all the CPU time they get, on these CPUs."""
    code = f"import os\nos.sched_setaffinity(0, {set(cpus)})\nprint(flush=True)\nwhile True: pass"
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield


def matrix(found: Iterable[tuple[str, str]]) -> str:
    """Return a table of the causes that were reported, with a line for each kind that was planted."""
    rows: dict[str, Counter[str]] = {}
    for planted, cause in found:
        rows.setdefault(planted, Counter())[cause] += 1
    return "\n".join(
        f"{planted:32}" + ", ".join(f"{cause} {count}" for cause, count in counts.most_common())
        for planted, counts in rows.items()
    )
