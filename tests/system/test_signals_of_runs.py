"""Heartbeats and gauges belong to one run of one program: targets that end, execute, or change their sidecar."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.sidecars import ask, environment, eventually, serving

pytestmark = [pytest.mark.live, pytest.mark.skipif(sys.platform != "linux", reason="names by prctl, pages in /proc")]


class Client:
    """A Python program that prints lines of JSON and proceeds at each line of its standard input."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client has ended"
        return json.loads(line)

    def proceed(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def client(directory: Path, code: str, *arguments: str) -> Iterator[Client]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(directory),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Client(process)
        finally:
            process.kill()


def get(url: str, path: str) -> Any:
    status, body = ask(url, path)
    assert status == 200, body
    return body


def names(url: str) -> list[str]:
    return [each["name"] for each in get(url, "/heartbeats")]


def hangs(url: str) -> list[dict[str, Any]]:
    return [each for each in get(url, "/history")["events"] if each["kind"] == "hang"]


NAMED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
import vitalsd_client
print(0, flush=True)
for line in sys.stdin:
    vitalsd_client.heartbeat("of_a", 60).beat()
    vitalsd_client.gauge("of_a").set(1)
    print(0, flush=True)
"""


def test_signals_of_a_target_that_ended_are_not_those_of_the_next(short_path: Path) -> None:
    """`serve --name` goes on to the next process of the name, which has opened no heartbeat and no gauge."""
    name = f"vsd{os.getpid()}"
    with serving(short_path, "--name", name, "--record-interval", "0.25") as (_, ready):
        url = ready["url"]

        def watched() -> int | None:
            status, body = ask(url, "/history")
            return body["target"]["pid"] if status == 200 and len(body["time_ms"]) > 2 else None

        with client(short_path, NAMED, name) as first:
            first.read()
            eventually(lambda: watched() == first.pid, 30)

            def signalled() -> bool:
                first.proceed()
                first.read()
                return names(url) == ["of_a"] and bool(get(url, "/history")["gauges"])

            eventually(signalled, 30)
            first.kill()
        with client(short_path, NAMED, name) as second:
            second.read()
            eventually(lambda: watched() == second.pid, 30)
            assert names(url) == []
            assert get(url, "/history")["gauges"] == []


EXECUTES = """
import json, os, sys, vitalsd
sidecar = vitalsd.spawn(port=0, options=["--record-interval", "0.25"])
sidecar.heartbeat("old", 0.5).beat()
sidecar.gauge("old").set(1)
print(json.dumps(sidecar.url), flush=True)
sys.stdin.readline()
os.execv("/bin/sleep", ["sleep", "60"])
"""


def test_signals_of_a_program_that_was_replaced_by_exec_are_ended(short_path: Path) -> None:
    """The pid is the same, and the sidecar too; the hang that lasted ends with the program that hung."""
    with client(short_path, EXECUTES) as target:
        url = target.read()
        eventually(lambda: [hang for hang in hangs(url) if hang["ongoing"]], 30)
        assert get(url, "/history")["gauges"][0]["value"][-1] == 1
        target.proceed()
        eventually(lambda: names(url) == [], 30)
        (hang,) = eventually(lambda: [hang for hang in hangs(url) if not hang["ongoing"]], 30)
        assert hang["heartbeat"] == "old"
        eventually(lambda: get(url, "/history")["gauges"][0]["value"][-1] is None, 30)


FINDS = """
import sys, vitalsd_client
print(0, flush=True)
for line in sys.stdin:
    vitalsd_client.heartbeat("ui", 60).beat()
    print(0, flush=True)
"""


def test_heartbeat_called_again_after_the_sidecar_restarted_is_in_the_new_page(short_path: Path) -> None:
    """The client has not started the sidecar, so it learns of the new one at the next call."""
    with client(short_path, FINDS) as target:
        target.read()
        for _ in range(2):
            with serving(short_path, "--pid", str(target.pid), "--record-interval", "0.25") as (_, ready):
                target.proceed()
                target.read()
                eventually(lambda: names(ready["url"]) == ["ui"], 30)


BOTH = """
import json, sys, vitalsd
spawned = vitalsd.spawn(port=0, options=["--record-interval", "0.25"])
inside = vitalsd.start(port=0)
inside.heartbeat("old", 60).beat()
inside.stop()
spawned.heartbeat("new", 60).beat()
print(json.dumps(spawned.url), flush=True)
sys.stdin.readline()
"""


def test_heartbeat_of_a_spawned_sidecar_after_another_one_ended_is_in_its_page(short_path: Path) -> None:
    """The sidecar inside had the signals of the process; the spawned one gets them, those of before included."""
    with client(short_path, BOTH) as target:
        url = target.read()
        eventually(lambda: names(url), 30)
        eventually(lambda: sorted(names(url)) == ["new", "old"], 30)


CYCLES = """
import gc, json, os, time, urllib.request, vitalsd

def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))

counts, kept = [], None
for number in range(6):
    sidecar = vitalsd.start(port=0, record_interval_s=0.1)
    kept = sidecar.heartbeat("ui", 60)
    kept.beat()
    request = urllib.request.Request(
        sidecar.url + "/heartbeats/posted", b"{}", {"Content-Type": "application/json"}, method="POST"
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20).close()
    sidecar.stop()
    counts.append(descriptors())
print(json.dumps(counts), flush=True)
"""


def test_start_and_stop_with_an_open_heartbeat_keep_no_descriptor(short_path: Path) -> None:
    """Neither the page of a sidecar that has ended, nor a mapping of it by the client or for those that post."""
    with client(short_path, CYCLES) as host:
        counts = host.read()
    assert counts == counts[:1] * len(counts)
