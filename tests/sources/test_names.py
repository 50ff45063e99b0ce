"""Names that Python gave its threads, as a sidecar beside the process sees them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_process import FakeSource, Process
from support.host_programs import run_host
from support.sidecars import environment, eventually
from vitalsd.sources.names import Inherited, PythonNames, names_by_id, publish_names

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
def test_publish_names_sets_names_of_unnamed_threads(sleeper: threading.Thread) -> None:
    """Names are cut to whole characters of 15 bytes; the main thread and named threads keep their names."""
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
def test_spawned_sidecar_reads_python_thread_names(short_path: Path, call: str) -> None:
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


@linux_only
def test_names_of_threads_started_by_a_named_thread_are_their_own(short_path: Path) -> None:
    """Beside the process and in it: a thread inherits the name that its parent was given by `publish_names`."""
    code = """
        import json, threading, vitalsd
        from vitalsd_client import fetch
        go, up, end = threading.Event(), threading.Event(), threading.Event()
        def loader():
            go.wait()
            for number in range(3):
                threading.Thread(target=end.wait, name=f"decode-{number}", daemon=True).start()
            up.set()
            end.wait()
        threading.Thread(target=loader, name="loader", daemon=True).start()
        def names(sidecar):
            threads = fetch(100, "wait", url=sidecar.url).threads
            return sorted(thread.name for thread in threads if thread.name.startswith(("loader", "decode")))
        with vitalsd.spawn(port=0) as beside:
            go.set()
            up.wait()
            with vitalsd.start(port=0) as within:
                print(json.dumps([names(beside), names(within)]))
        """
    beside, within = json.loads(run_host(code, environment(short_path), directory=short_path).stdout)
    assert beside == within == ["decode-0", "decode-1", "decode-2", "loader"]


@linux_only
def test_names_in_process_after_a_publication_are_those_of_python(short_path: Path) -> None:
    """A thread that was started by a named one after it needs no second publication for the sidecar in the process."""
    code = """
        import json, threading, urllib.request, vitalsd
        from vitalsd.sources.names import publish_names
        go, up, end = threading.Event(), threading.Event(), threading.Event()
        def loader():
            go.wait()
            threading.Thread(target=end.wait, name="decode", daemon=True).start()
            up.set()
            end.wait()
        threading.Thread(target=loader, name="loader", daemon=True).start()
        publish_names()
        go.set()
        up.wait()
        with vitalsd.start(port=0) as sidecar:
            body = urllib.request.urlopen(sidecar.url + "/metrics?window_ms=50").read()
        print(json.dumps([thread["name"] for thread in json.loads(body)["threads"]]))
        """
    found = json.loads(run_host(code, environment(short_path), directory=short_path).stdout)
    assert (found.count("loader"), found.count("decode")) == (1, 1)


@linux_only
@pytest.mark.parametrize("kind", ["interpreter", "link"])
def test_names_of_threads_older_than_a_main_thread_rename_are_published(short_path: Path, kind: str) -> None:
    """The name that the process began with, be it that of a link, is not taken for one of a thread's own."""
    code = """
        import threading, vitalsd
        from pathlib import Path
        from vitalsd_client import fetch
        end = threading.Event()
        thread = threading.Thread(target=end.wait, name="loader", daemon=True)
        thread.start()
        Path("/proc/self/comm").write_text("myapp")
        with vitalsd.spawn(port=0) as sidecar:
            names = [thread.name for thread in fetch(100, "wait").threads]
        assert "loader" in names, names
        assert Path("/proc/self/comm").read_text() == "myapp\\n"
        """
    python, env = sys.executable, environment(short_path)
    if kind == "link":
        link = short_path / "a-link-to-python"
        link.symlink_to(sys.executable)
        python, env = str(link), env | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run_host(code, env, directory=short_path, python=[python])


@linux_only
def test_publish_names_of_odd_threads_does_not_raise(short_path: Path) -> None:
    """A name that is no text, a class that has none, a thread of C; one that took a name for itself keeps it."""
    code = """
        import _thread, threading, time, vitalsd
        from pathlib import Path
        from vitalsd_client import fetch, mark
        end = threading.Event()
        def comm(tid):
            return Path(f"/proc/self/task/{tid}/comm").read_text().rstrip("\\n")
        class Nameless(threading.Thread):
            @property
            def name(self):
                raise LookupError
        def begin(kind=threading.Thread, name=None):
            thread = kind(target=end.wait, daemon=True)
            if name is not None:
                thread._name = name
            thread.start()
            return thread.native_id
        odd = [begin(name=b"bytes"), begin(name=5), begin(name="\\0"), begin(name=""), begin(Nameless)]
        surrogate, named = begin(name="a\\udcffb\\0c"), begin(name="renderer")
        Path(f"/proc/self/task/{named}/comm").write_text("by itself")
        dummies = []
        def dummy():
            threading.current_thread()
            dummies.append(threading.get_native_id())
            end.wait()
        _thread.start_new_thread(dummy, ())
        while not dummies:
            time.sleep(0.01)
        main = comm(threading.get_native_id())
        with vitalsd.spawn(port=0) as beside, vitalsd.start(port=0) as within:
            for sidecar in beside, within:
                assert mark("x", url=sidecar.url) and sidecar.mark("y")
                threads = {thread.tid: thread.name for thread in fetch(50, "wait", url=sidecar.url).threads}
                assert threads[named] == "by itself"
                assert threads[dummies[0]] == main, threads
        assert [comm(tid) for tid in (*odd, *dummies)] == [main] * 6
        assert comm(surrogate) == "a?b"
        """
    run_host(code, environment(short_path), directory=short_path)


def test_look_at_a_thread_passes_through_its_names() -> None:
    """What a thread does has nothing to do with its name."""
    source = FakeSource(Process())
    look = PythonNames(source).look_at(1, closely=True)
    assert look is not None
    assert look.wait_channel == "epoll"
    assert PythonNames(source).look_at(2) is None


def test_inherited_names_beyond_the_limit_evict_the_oldest() -> None:
    """A program that names each of its threads anew does not grow by that."""
    inherited = Inherited(limit=2)
    for name in ("a", "b", "a", "c"):
        inherited.add(name)
    assert ["a" in inherited, "b" in inherited, "c" in inherited] == [True, False, True]
    assert "" in inherited
