"""Where the system gives no more threads: a pids cgroup at its limit, as of a container or a systemd unit."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.sidecars import VITALSD, ask, environment, eventually, listing, serving
from support.target import Target

pytestmark = pytest.mark.live
Start = Callable[..., Target]
ROOTS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
"""Of version 1 and 2."""
SENTENCE = "the system gives no more threads; raise its limit (ulimit -u, pids.max, TasksMax)"


class Group:
    """A cgroup with a limit of threads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, pid: int) -> None:
        (self._path / "cgroup.procs").write_text(str(pid))

    def limit(self, threads: int | None) -> None:
        (self._path / "pids.max").write_text("max" if threads is None else str(threads))

    def close(self) -> None:
        """Give no more threads than there are."""
        self.limit(int((self._path / "pids.current").read_text()))


@pytest.fixture
def group() -> Iterator[Group]:
    for root in ROOTS:
        path = root / f"vitalsd-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if (path / "pids.max").exists():
                yield Group(path)
                return
        finally:
            for pid in (path / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

            def is_removed(path: Path = path) -> bool:
                with suppress(OSError):
                    path.rmdir()
                return not path.exists()

            eventually(is_removed)
    pytest.skip("no cgroup with a limit of threads can be made: root and the pids controller are needed")


def request(url: str, path: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    try:
        return answer.status, answer.headers["Content-Type"], json.loads(answer.read())
    finally:
        connection.close()


def test_pid_without_a_thread_is_503_with_the_reason(short_path: Path, group: Group, start: Start) -> None:
    """Another process needs a thread; each route that takes a pid says why not, and works again."""
    other = start()
    with serving(short_path) as (process, ready):
        group.add(process.pid)
        assert ask(ready["url"], "/metrics?window_ms=10")[0] == 200
        group.close()
        for path in ("/metrics?window_ms=10", "/stream?interval_ms=100", "/metrics?window_ms=10&mode=trailing"):
            status, kind, body = request(ready["url"], f"{path}&pid={other.pid}")
            assert (status, kind) == (503, "application/problem+json"), (path, body)
            assert (body["reason"], body["detail"]) == ("no_thread", SENTENCE)
        for path in ("/metrics?window_ms=10", "/history", "/runs", "/processes", "/healthz"):
            assert ask(ready["url"], path)[0] == 200, path
        group.limit(None)
        assert ask(ready["url"], f"/metrics?window_ms=10&pid={other.pid}")[0] == 200
        process.terminate()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("form", ["text", "json"])
def test_serve_without_a_thread_is_one_line_and_leaves_nothing(short_path: Path, group: Group, form: str) -> None:
    """Whichever of its threads is missing: a reason, exit status 1, and neither a socket nor a file."""
    program = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
    procs = next(root for root in ROOTS if (root / f"vitalsd-test-{os.getpid()}").exists())
    join = str(procs / f"vitalsd-test-{os.getpid()}" / "cgroup.procs")
    said: list[str] = []
    for threads in range(1, 20):
        group.limit(threads)
        process = subprocess.Popen(
            [sys.executable, "-c", program, join, *VITALSD, "serve", "--port", "0", "--log-format", form],
            env=environment(short_path),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        with process.stderr:
            line = process.stderr.readline()
            if "serving itself" in line:
                process.terminate()
                assert process.wait(20) == 0
                break
            rest = process.stderr.read()
        assert process.wait(20) == 1
        said.append(line)
        assert SENTENCE in line + rest, (threads, line, rest)
        assert "Traceback" not in line or "application did not start" in rest, (threads, line, rest)
        assert listing(short_path / "run") == [], threads
    else:
        pytest.fail("it never started")
    assert len(said) >= 3


def test_follow_without_a_thread_continues_when_one_is_available(short_path: Path, group: Group, start: Start) -> None:
    """With --name the next process is measured as soon as the system gives the thread for it."""
    name = f"vitals{os.getpid()}"
    with serving(short_path, "--name", name) as (process, ready):
        first = start()
        first.ask(f"name {name.encode().hex()}")
        eventually(lambda: ask(ready["url"], "/metrics?window_ms=10")[0] == 200, 10)
        group.add(process.pid)
        group.close()
        # The threads of the first run end with it, so that the system has some again: the limit goes down with them.
        first.kill()
        for _ in range(30):
            group.close()
            status, _, body = request(ready["url"], "/metrics?window_ms=10")
            assert status in (404, 410, 503), body
        second = start()
        second.ask(f"name {name.encode().hex()}")
        group.close()
        group.limit(None)
        eventually(lambda: ask(ready["url"], "/metrics?window_ms=10")[0] == 200, 10)
        assert ask(ready["url"], "/info")[1]["target"]["pid"] == second.pid


CLIENT = """
import asyncio, os, sys, tempfile
import vitalsd_client
from vitalsd_client import BugReport, Spool, afetch, fetch, last_crash, mark
from vitalsd_client.attachments import Content
import vitalsd_client.direct, vitalsd_client.crash, vitalsd_client.upload, httpx
group = sys.argv[1]
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
open(group + "/pids.max", "w").write("1")
print(type(fetch(10)).__name__)
print(type(asyncio.run(afetch(10))).__name__)
print(mark("a"), last_crash("a"))
report = BugReport("a", window_ms=10, history_s=1)
report.attach("note", "text")
with tempfile.TemporaryDirectory() as directory:
    spool = Spool(directory + "/spool", "http://127.0.0.1:9/")
    report.submit(spool)
    (outcome,) = spool.send()
    print(outcome.attempt.reason)
print([failure.member for failure in report.failures])
"""


def test_client_without_a_thread_gets_answers_with_reasons(short_path: Path, group: Group) -> None:
    """No call of the client raises; what could not be had is missing with its reason."""
    root = next(root for root in ROOTS if (root / f"vitalsd-test-{os.getpid()}").exists())
    path = root / f"vitalsd-test-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLIENT), str(path)],
        env=environment(short_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["Unavailable", "Unavailable", "False None"]
    assert SENTENCE in lines[3]
    assert "runtime-metrics.json" in lines[4]
    assert not re.search("Traceback", done.stderr)


def test_top_without_a_thread_is_one_line(short_path: Path, group: Group, start: Start) -> None:
    """The full screen needs two threads."""
    import pty

    target = start()
    root = next(root for root in ROOTS if (root / f"vitalsd-test-{os.getpid()}").exists())
    join = str(root / f"vitalsd-test-{os.getpid()}" / "cgroup.procs")
    for threads in (1, 2):
        group.limit(threads)
        master, slave = pty.openpty()
        program = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
        with subprocess.Popen(
            [sys.executable, "-c", program, join, *VITALSD, "top", "--pid", str(target.pid)],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            env=environment(short_path) | {"TERM": "xterm"},
            text=True,
        ) as process:
            os.close(slave)
            _, said = process.communicate(timeout=30)
        os.close(master)
        assert (process.returncode, said) == (1, f"vitalsd: {SENTENCE}\n"), threads
