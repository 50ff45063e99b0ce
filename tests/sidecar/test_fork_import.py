"""A host that forks while the sidecar inside it imports a module for the first time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support.sidecars import environment

pytestmark = pytest.mark.live

PROGRAM = """
import importlib.abc, importlib.machinery, os, signal, sys, threading, time, urllib.error, urllib.request
import vitalsd

MODULE, PATH, SECONDS = sys.argv[1], sys.argv[2], float(sys.argv[3])
sidecar = vitalsd.start(port=0)
assert MODULE not in sys.modules, "the start imports it already"
importing = threading.Event()

class Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        importing.set()
        time.sleep(SECONDS)
        self.loader.exec_module(module)

class Slow(importlib.abc.MetaPathFinder):
    # Delays the execution of the module: while it is looked for, Python itself lets no fork begin.
    def find_spec(self, name, path, target=None):
        if name == MODULE and os.getpid() == parent:
            found = importlib.machinery.PathFinder.find_spec(name, path)
            found.loader = Loader(found.loader)
            return found

def ask():
    request = urllib.request.Request(sidecar.url + PATH, headers={"Accept": "text/plain", "Accept-Encoding": "gzip"})
    try:
        urllib.request.urlopen(request, timeout=20).read()
    except urllib.error.HTTPError:
        pass

parent = os.getpid()
sys.meta_path.insert(0, Slow())
client = threading.Thread(target=ask)
client.start()
assert importing.wait(10)
begun = time.monotonic()
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    __import__(MODULE)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - begun < 8)
client.join()
urllib.request.urlopen(sidecar.url + "/healthz", timeout=20)
sidecar.stop()
print("answers")
"""


@pytest.mark.parametrize(("module", "path"), [("difflib", "/typo"), ("prometheus_client.exposition", "/metrics")])
def test_child_forked_during_an_import_of_the_sidecar_imports_that_module(
    short_path: Path, module: str, path: str
) -> None:
    """The fork waits for the import to end; otherwise its lock would stay locked in the child."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), module, path, "1"],
        env=environment(short_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("7 True\nanswers\n", 0), done.stderr


def test_fork_during_an_import_without_an_end_is_held_up_for_a_bounded_time(short_path: Path) -> None:
    """After 5 s the host forks all the same."""
    program = PROGRAM.replace("    __import__(MODULE)\n", "").replace("begun < 8", "begun < 9")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), "difflib", "/typo", "12"],
        env=environment(short_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("7 True\nanswers\n", 0), done.stderr
