"""What a Mac does rarely or not on request; `test_as_on_a_mac` runs it under `support.as_darwin.plugin`."""

import ctypes
import errno
import os
import resource
import select
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.as_darwin.emulation import LACKING, LIBRARY, TEARDOWN_MS, Kevent, Kqueue
from support.sidecars import VITALSD, environment, eventually, serving
from vitalsd.discovery.directories import MAX_SOCKET_PATH, runtime_directory
from vitalsd.sources.platform import this_platform

pytestmark = pytest.mark.skipif(LIBRARY not in os.environ, reason="a Mac's kernel does not do so on request")


@pytest.mark.parametrize(("code", "state"), [("", "clean"), ("os.kill(os.getpid(), 11)", "crashed")])
def test_run_of_a_target_with_a_slow_teardown_has_its_exit_status(short_path: Path, code: str, state: str) -> None:
    """Beats every 0.1 s fall into a teardown of 0.6 s, in which libproc has no process and kqueue no note."""
    program = f"import os, sys; sys.stdin.readline(); {code}"
    env = environment(short_path) | {TEARDOWN_MS: "600"}
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as target:
        assert target.stdin is not None
        options = ("--pid", str(target.pid), "--record-interval", "0.1", "--linger", "0")
        with serving(short_path, *options, env=env) as (sidecar, _):
            target.stdin.close()
            target.wait(10)
            sidecar.wait(20)
    listed = subprocess.run([*VITALSD, "runs"], env=env, capture_output=True, text=True, check=True, timeout=30).stdout
    assert state in listed.splitlines()[1]


def test_emulation_makes_interpreter_and_children_run_as_on_darwin(short_path: Path) -> None:
    """The platform, the names, the socket options, the paths and the units of XNU; `psutil` still judges."""
    code = "import os, sys; print(sys.platform, hasattr(os, 'waitid'), os.path.exists('/proc/self'))"
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["darwin", "False", "False"]
    assert not [name for module, names in LACKING.items() for name in names.split() if hasattr(module, name)]
    assert not os.path.exists("/proc/self/stat")
    with pytest.raises(FileNotFoundError):
        Path("/proc/self/stat").read_bytes()
    assert psutil.Process().memory_info().rss > 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 10 << 20
    assert MAX_SOCKET_PATH == 103
    with socket.socket(socket.AF_UNIX) as listener:
        with pytest.raises(OSError, match="too long"):
            listener.bind(str(short_path / ("a" * 104)))
        with pytest.raises(OSError, match="Protocol not available") as refused:
            listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert refused.value.errno == errno.ENOPROTOOPT
        with pytest.raises(OSError, match="Invalid argument"):
            os.fchmod(listener.fileno(), 0o600)
    assert ctypes.CDLL(None).pthread_setname_np(b"x" * 64) == errno.ENAMETOOLONG
    assert this_platform().name == "macos"


def test_runtime_directory_of_a_long_home_is_below_the_temporary_directory() -> None:
    """The runtime directory is below TMPDIR, as for a home of more than 42 bytes on a Mac."""
    assert str(runtime_directory()) == f"{os.environ['TMPDIR']}/vitalsd"


def test_kqueue_reports_an_exit_and_refuses_an_exited_process() -> None:
    """NOTE_EXIT of a child; ESRCH for a process that has exited."""
    queue = Kqueue()
    assert getattr(select, "kqueue") is Kqueue  # noqa: B009 - Linux has no such name
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        exits = Kevent(child.pid, -5, 1, 0x80000000)
        queue.control([exits], 0)
        assert queue.control(None, 1, 0) == []
        child.kill()
        assert eventually(lambda: queue.control(None, 1, 0.1))
        with pytest.raises(ProcessLookupError):
            queue.control([exits], 0)
    queue.close()
