"""Names that Python gave its threads, as a sidecar beside the process sees them."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecars import environment, eventually
from vitalsd.sources.python_names import names_by_id, publish_names

pytestmark = pytest.mark.live

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS lets a thread name itself alone")


@pytest.fixture
def sleeper() -> Iterator[threading.Thread]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="renderer-of-ünïcödé", daemon=True)
    thread.start()
    eventually(lambda: thread.native_id)
    yield thread
    end.set()
    thread.join()


def comm(thread: threading.Thread) -> str:
    return Path(f"/proc/self/task/{thread.native_id}/comm").read_text().strip()


@linux_only
def test_publish_names_names_threads_that_have_none(sleeper: threading.Thread) -> None:
    """In whole characters of 15 bytes; the main thread and a thread that was named keep their names."""
    main = comm(threading.main_thread())
    publish_names()
    assert comm(sleeper) == "renderer-of-ün"
    assert comm(threading.main_thread()) == main
    Path(f"/proc/self/task/{sleeper.native_id}/comm").write_text("by itself")
    publish_names()
    assert comm(sleeper) == "by itself"
    assert names_by_id()[sleeper.native_id or 0] == "renderer-of-ünïcödé"
    assert threading.main_thread().native_id not in names_by_id()


@linux_only
@pytest.mark.parametrize("call", ["vitalsd.spawn(port=0)", "sidecar.mark('x')", "mark('x')", "fetch(50)", "report()"])
def test_sidecar_beside_a_program_sees_the_names_of_its_threads(short_path: Path, call: str) -> None:
    """`spawn`, `mark`, `fetch` and `BugReport` give them to the kernel; `threading` is not patched."""
    code = (
        "import json, threading, time, vitalsd\n"
        "from vitalsd_client import BugReport, fetch, mark\n"
        "start = threading.Thread.start\n"
        "def report(): return BugReport('viewer', window_ms=20).preview()\n"
        "end = threading.Event()\n"
        "def begin(): threading.Thread(target=end.wait, name='renderer', daemon=True).start()\n"
        f"first = {call.startswith('vitalsd')}\n"
        "if first: begin()\n"
        "sidecar = vitalsd.spawn(port=0, options=['--linger', '0'])\n"
        "if not first: begin()\n"
        f"if not first: {call}\n"
        "import urllib.request\n"
        "body = urllib.request.urlopen(sidecar.url + '/metrics?window_ms=50').read()\n"
        "print(json.dumps([thread['name'] for thread in json.loads(body)['threads']]))\n"
        "assert threading.Thread.start is start\n"
        "sidecar.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(short_path), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "renderer" in json.loads(done.stdout)
