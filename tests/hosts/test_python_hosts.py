"""Hosts on greenlets, in a debugger, behind PySocks, and on other versions of Python: real packages, all of them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.host_programs import run_host
from support.paths import ROOT
from support.sidecars import environment, eventually, listing

pytestmark = pytest.mark.live

HOSTS = {
    "eventlet": "import eventlet; eventlet.monkey_patch()",
    "gevent": "import gevent.monkey; gevent.monkey.patch_all()",
    "debugpy": "import debugpy; debugpy.listen(('127.0.0.1', 0))",
    "socks": (
        "import socket, socks; socks.set_default_proxy(socks.SOCKS5, '127.0.0.1', 9); socket.socket = socks.socksocket"
    ),
}


@pytest.mark.parametrize("package", HOSTS)
def test_host_that_patches_python_gets_all_answers(short_path: Path, package: str) -> None:
    """`start` and `spawn` over both sockets and over TCP alone: fetch, marks, reports, and /metrics over HTTP."""
    pytest.importorskip(package, reason=f"{package} is not installed: run make test-hosts")
    host = f"""
        {HOSTS[package]}
        import time, vitalsd
        from support.host_programs import answered
        from vitalsd_client import fetch
        for begin in vitalsd.start, vitalsd.spawn:
            with begin(port=0) as sidecar:
                wrong = answered(sidecar)
                assert wrong == [], (begin, wrong)
                begun = time.monotonic()
                for where in dict(url=sidecar.url), dict(socket=sidecar.socket):
                    for mode in "wait", "trailing":
                        found = fetch(100, mode, **where)
                        assert type(found).__name__ == "Measured", (begin, where, mode, found)
                        assert found.threads
                assert time.monotonic() - begun < 8
        """
    run_host(host, environment(short_path), directory=short_path)


# Other versions

VERSIONS = ["3.12", "3.13", "3.14"]
Interpreter = Callable[[str], str]


def interpreter(version: str) -> str | None:
    """Return an interpreter of this version that can make virtual environments, from PATH or pyenv."""
    name = f"python{version}"
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))
    for found in [*map(str, reversed(pyenv)), shutil.which(name)]:
        if found is None:
            continue
        code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([found, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return found
    return None


@pytest.fixture(scope="module")
def python_of(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Makes a virtual environment with vitalsd for a version of Python, once; skips if the machine has none."""
    made: dict[str, str] = {}

    def python_of(version: str) -> str:
        if version not in made:
            if (found := interpreter(version)) is None:
                pytest.skip(f"needs Python {version} with venv on PATH or in pyenv, which pip cannot install")
            directory = tmp_path_factory.mktemp("venv") / version
            subprocess.run([found, "-m", "venv", str(directory)], check=True, timeout=120)
            python = str(directory / "bin" / "python")
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-e", str(ROOT)], check=True, timeout=400)
            made[version] = python
        return made[version]

    return python_of


@pytest.mark.optional
@pytest.mark.timeout(540)
@pytest.mark.parametrize("version", VERSIONS)
def test_other_version_of_python_starts_spawns_and_reports(
    short_path: Path, python_of: Interpreter, version: str
) -> None:
    """Warnings are errors, so vitalsd uses nothing that this version deprecates."""
    host = """
        import json, sys, threading, vitalsd
        from support.host_programs import answered
        from vitalsd_client import fetch
        end = threading.Event()
        threading.Thread(target=end.wait, name="renderer", daemon=True).start()
        for begin in vitalsd.start, vitalsd.spawn:
            with begin(port=0) as sidecar:
                wrong = answered(sidecar)
                assert wrong == [], (begin, wrong)
                names = [thread.name for thread in fetch(50, "wait").threads]
                assert "renderer" in names, names
        print(sys.version_info[:2])
        """
    python = [python_of(version), "-W", "error"]
    said = run_host(host, environment(short_path), directory=short_path, python=python).stdout
    assert said == f"({version.replace('.', ', ')})\n"


AT_EXIT = """
    import atexit, json, os, sys, vitalsd
    from vitalsd_client import BugReport, fetch
    sidecar = vitalsd.spawn(port=0, options=["--linger", "0"])

    def report(*error):
        found = {"fetch": type(fetch(window_ms=50)).__name__}
        found["saved"] = BugReport("host", window_ms=20).save().exists()
        with vitalsd.spawn(port=0) as other:
            found["spawn"] = other.running
        try:
            with vitalsd.start(port=0) as inside:
                found["start"] = inside.running
        except vitalsd.StartError as error:
            found["start"] = True  # 3.12 gives no threads any more at that time
        os.write(1, json.dumps(found).encode())

"""
ENDINGS = {
    "atexit": "    atexit.register(report)\n",
    "excepthook": "    sys.excepthook = report\n    raise ValueError\n",
}


@pytest.mark.optional
@pytest.mark.timeout(540)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("version", [f"{sys.version_info[0]}.{sys.version_info[1]}", *VERSIONS])
def test_report_at_the_end_of_the_interpreter_is_whole(
    short_path: Path, python_of: Interpreter, version: str, ending: str
) -> None:
    """In atexit and sys.excepthook, fetch, a report and spawn work; `start` raises StartError if it cannot."""
    python = sys.executable if sys.version.startswith(f"{version}.") else python_of(version)
    done = run_host(
        AT_EXIT + ENDINGS[ending],
        environment(short_path),
        directory=short_path,
        python=[python],
        succeeds=ending == "atexit",
    )
    assert json.loads(done.stdout) == {"fetch": "Measured", "saved": True, "spawn": True, "start": True}, done.stderr
    eventually(lambda: listing(short_path / "run") == [], 20)  # before its directories go
