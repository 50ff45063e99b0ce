"""A runtime directory that is there and cannot be written: read-only, without inodes, without blocks."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from support.sidecars import environment

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts file systems: needs root on Linux"),
]

MOUNTS = {
    "read-only": "mount -t tmpfs t run; mkdir -m 700 run/vitalsd; mount -o remount,ro run",
    "no inodes": "mount -t tmpfs -o nr_inodes=2 t run; mkdir -m 700 run/vitalsd; ! touch run/a 2>/dev/null",
    "no blocks": "mount -t tmpfs -o size=4k t run; mkdir -m 700 run/vitalsd; ! head -c 9999 /dev/zero >run/a",
}

PROGRAM = """
import json, os, subprocess, sys, urllib.request
import vitalsd
from vitalsd_client import fetch

def shown(url, notes):
    # Without a runtime file a client needs the address; a sidecar that this process started is known to it.
    found = [type(fetch(10, url=url)).__name__, type(fetch(10)).__name__]
    print(json.dumps([url, found, list(notes)]))

with vitalsd.start(port=0) as sidecar:
    shown(sidecar.url, sidecar.notes)
with vitalsd.spawn(port=0) as sidecar:
    shown(sidecar.url, sidecar.notes)
reader, writer = os.pipe()
options = ["--pid", str(os.getpid()), "--port", "0", "--ready-fd", str(writer)]
command = [sys.executable, "-m", "vitalsd", "serve", *options]
process = subprocess.Popen(command, pass_fds=(writer,), stderr=subprocess.PIPE, text=True)
os.close(writer)
ready = json.loads(os.fdopen(reader).readline())
shown(ready["url"], ready["notes"])
process.terminate()
print(json.dumps(process.communicate()[1]))
"""


def run(directory: Path, mount: str, env: dict[str, str]) -> list[Any]:
    """Return what `PROGRAM` prints in a mount namespace with a file system at `run` below `directory`."""
    (directory / "run").mkdir()
    (directory / "program.py").write_text(textwrap.dedent(PROGRAM))
    script = f"set -e; cd {directory}; {mount}; exec {sys.executable} program.py"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env=env, capture_output=True, text=True, check=False, timeout=90
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", MOUNTS)
def test_sidecar_without_a_writable_runtime_directory_serves_over_tcp_with_a_note(short_path: Path, case: str) -> None:
    """start(), spawn() and serve answer, and say why there is no runtime file."""
    env = environment(short_path) | {"VITALSD_RUNTIME_DIR": str(short_path / "run" / "vitalsd")}
    started, spawned, served, stderr = run(short_path, MOUNTS[case], env)
    for url, found, notes in (started, spawned, served):
        assert url.startswith("http://127.0.0.1:")
        assert found[0] == "Measured", notes
        assert any("no runtime file, so clients need the address" in note for note in notes), notes
    assert started[1][1] == spawned[1][1] == "Measured"
    assert served[1][1] == "Unavailable"
    assert "no runtime file, so clients need the address of this sidecar: cannot write to" in stderr


def test_runtime_file_is_written_where_clients_look_next(short_path: Path) -> None:
    """A read-only XDG_RUNTIME_DIR: socket and runtime file are in the next directory, where a client finds them."""
    env = environment(short_path) | {"XDG_RUNTIME_DIR": str(short_path / "run"), "HOME": str(short_path / "home")}
    del env["VITALSD_RUNTIME_DIR"]
    (short_path / "home").mkdir()
    for url, found, notes in run(short_path, MOUNTS["read-only"], env)[:3]:
        assert found == ["Measured", "Measured"], (url, notes)
