"""The part of the suite that is meant for a Mac, run as on one: under `as_darwin.plugin`."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from as_darwin.emulation import COUNTED, SIMULATOR

HERE = Path(__file__).parent.parent
GROUPS = {
    "kernel": ("darwin/test_mac.py", "darwin/test_emulated.py", "test_source_contract.py", "test_watch.py"),
    "supervisor": ("test_activation.py", "test_directories.py", "test_peer.py"),
    "service": ("test_past_http.py",),
}
"""Files with a branch for macOS, or that only a kernel of their own can prove; all others run there, too."""


@pytest.mark.parametrize("group", GROUPS)
def test_files_pass_as_on_a_mac(
    group: str, simulated_libsystem: Path, record_property: Callable[[str, object], None]
) -> None:
    """All tests of the group pass or say why they are skipped; none of them runs into its timeout."""
    env = os.environ | {"PYTHONPATH": str(HERE), SIMULATOR: str(simulated_libsystem)}
    files = [str(HERE / name) for name in GROUPS[group]]
    command = [sys.executable, "-m", "pytest", "-p", "as_darwin.plugin", "-n", "0", "-q", "--timeout", "60", *files]
    ran = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=115)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]
    passed = re.search(r"^([0-9]+) passed", ran.stdout, re.MULTILINE)
    assert passed is not None
    record_property(COUNTED, int(passed[1]))
