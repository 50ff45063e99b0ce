"""
What goes wrong around the service: reads that hang, no descriptors, no disk, stopped processes, storms of threads.

Each by its real cause, on a real service. What takes minutes is marked ``torture``.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from edge import Edge, dial, get, read_reply
from serving import Serving
from sidecars import eventually
from vitalsd.http.app import create_app
from vitalsd.sampler import Sampler, Targets
from vitalsd.sources import list_processes, open_source

pytestmark = [pytest.mark.live, pytest.mark.skipif(sys.platform != "linux", reason="/proc, prlimit(2) and signals")]

CAPTURE = Path(__file__).parent / "data" / "proc"


def asked(where: str, path: str) -> tuple[int, Any]:
    answer = get(where, path)
    return answer.status, json.loads(answer.body)


# A read that hangs


class Blocked:
    """A file that has become a pipe nobody writes to: whoever opens it waits in the kernel, until it is `freed`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = path.read_bytes()
        pipe = path.with_suffix(".pipe")
        os.mkfifo(pipe)
        pipe.replace(path)

    def freed(self) -> None:
        whole = self._path.with_suffix(".whole")
        whole.write_bytes(self._content)
        with self._path.open("wb") as pipe:  # opens as soon as somebody reads
            whole.replace(self._path)
            pipe.write(self._content)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A procfs of two processes."""
    root = tmp_path / "proc"
    shutil.copytree(CAPTURE, root)
    shutil.copytree(root / "4242", root / "4343")
    (root / "4343" / "task" / "4242").rename(root / "4343" / "task" / "4343")
    return root


@pytest.fixture
def served(tree: Path, tmp_path: Path) -> Iterator[Serving]:
    with Serving(tmp_path, "--pid", "4242", "--proc-root", str(tree), "--record-interval", "0.2") as serving:
        yield serving


def test_a_read_that_hangs_fails_that_process_alone(served: Serving, tree: Path) -> None:
    """
    Who asks for the process is told after some seconds, then at once; /healthz is 503; all else goes on, and so does
    the process when the read returns.
    """
    assert asked(served.url, "/healthz") == (200, {"status": "ok"})
    assert get(served.url, "/metrics?pid=4343&window_ms=10").status == 200
    begun = time.monotonic()
    blocked = Blocked(tree / "4242" / "status")
    with ExitStack() as stack:
        waiting = [stack.enter_context(dial(served.url)) for _ in range(20)]
        for connection in waiting:
            connection.sendall(
                f"GET /metrics?detail=full&window_ms=10 HTTP/1.1\r\nHost: {served.url[7:]}\r\n\r\n".encode()
            )
        for _ in range(3):
            assert get(served.url, "/metrics?pid=4343&window_ms=10").status == 200
        told = [read_reply(connection) for connection in waiting]
    assert 4.5 < time.monotonic() - begun < 15
    assert {reply.status for reply in told} == {503}
    assert {reply.body for reply in told} == {
        b'{"platform":"linux","available":false,"reason":"process 4242: a read has not returned for 5 s"}'
    }
    unwell = get(served.url, "/healthz")
    assert unwell.status == 503
    assert unwell.header("content-type") == "application/problem+json"
    assert json.loads(unwell.body)["reason"] == "hung"
    begun = time.monotonic()
    assert asked(served.url, "/metrics?window_ms=60000")[0] == 503
    assert time.monotonic() - begun < 3
    assert get(served.url, "/metrics?pid=4343&window_ms=10").status == 200
    assert get(served.url, "/history").status == 200
    assert get(served.url, "/report.zip?window_ms=10").status == 200
    assert b"event: unavailable" in get(served.url, "/stream?interval_ms=10").body
    blocked.freed()
    assert eventually(lambda: get(served.url, "/metrics?detail=full&window_ms=10").status == 200)
    assert asked(served.url, "/healthz") == (200, {"status": "ok"})
    assert served.stop() == 0
    assert served.process.stderr is not None
    assert served.process.stderr.read() == ""


def test_who_asks_again_and_again_for_what_hangs_costs_no_thread_more(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process than the target, and the list of all: each has one thread, also after a while."""
    monkeypatch.setattr("vitalsd.worker.PATIENCE_NS", 300_000_000)
    root = str(tree)
    there = set(threading.enumerate())
    targets = Targets(Sampler(open_source), lambda pid: open_source(pid, proc_root=root), idle_s=0.1)
    with Edge(create_app(targets, lambda: list_processes(proc_root=root))) as edge:
        blocked = Blocked(tree / "4343" / "stat")
        paths = ["/metrics?pid=4343&window_ms=10", "/processes"]
        for _ in range(3):
            with ThreadPoolExecutor(12) as callers:
                statuses = list(callers.map(lambda path: get(edge.url, path).status, paths * 6))
            assert set(statuses) == {503}
            eventually(lambda: targets._guests[4343].users == 0)
            time.sleep(0.3)  # longer than an idle process is kept
        names = [thread.name for thread in set(threading.enumerate()) - there]
        assert (names.count("vitalsd-4343"), names.count("vitalsd-lister")) == (1, 1)
        assert get(edge.url, "/healthz").status == 503
        assert get(edge.url, "/metrics?window_ms=10").status == 200
        blocked.freed()
        eventually(lambda: get(edge.url, "/metrics?pid=4343&window_ms=10").status == 200)
        eventually(lambda: get(edge.url, "/healthz").status == 200)
    assert not any(thread.name == "vitalsd-4343" for thread in threading.enumerate())
