"""
Run tests as on a Mac: ``PYTHONPATH=tests python -m pytest -p support.as_darwin.plugin FILES``.

All tests and the programs that they start run in an interpreter that `as_darwin.emulation` has changed, over the
simulated libSystem, with a home too long for a socket in it and a private TMPDIR, as a Mac has.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil  # it examines the platform when it is imported; on macOS its numbers are the judge as well

from support.as_darwin import emulation

assert psutil.LINUX, "this emulates Darwin on Linux"

_directory = tempfile.TemporaryDirectory(prefix="v", dir="/tmp")
_root = Path(_directory.name)


def _library() -> str:
    if built := os.environ.get(emulation.SIMULATOR):
        return built
    code = (
        "import sys; from pathlib import Path; from support.darwin.simulator import build;"
        " print(build(Path(sys.argv[1])))"
    )
    return subprocess.check_output([sys.executable, "-c", code, _root], text=True).strip()


def _make(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True)
    return path


_home = _make(_root / "Users" / ("a-name-of-a-user-that-leaves-no-room-for-" + "a-socket"))
os.environ["TMPDIR"] = str(_make(_root / "folders" / "zz" / "zyxvpxvq6csfxvn_n0000000000000" / "T"))
tempfile.tempdir = None
for _name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
    os.environ.pop(_name, None)
emulation.enable(_library(), _home)
