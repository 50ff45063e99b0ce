"""The part of the suite that is meant for a Mac, run as on one: under `support.as_darwin.plugin`."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.as_darwin.emulation import COUNTED, SIMULATOR
from support.paths import TESTS

GROUPS = {
    "kernel": (
        "sources/darwin/test_mac.py",
        "sources/darwin/test_emulated.py",
        "sources/test_source_contract.py",
        "sidecar/test_process_exit.py",
    ),
    "supervisor": ("sidecar/test_socket_activation.py", "discovery/test_directories.py", "http/test_peer.py"),
    "service": ("http/test_recordings_routes.py",),
}
"""Files with a branch for macOS, or that only a kernel of their own can prove; all others run there, too."""


LIMIT_S = 300
"""For one group of files, on a busy machine; it takes less than a minute on an idle one."""
PORTABLE = "bad_body or chunked or beyond_eight or slow_reader or replay"
"""Tests of the service that read nothing of the platform: as on a Mac they run with ``make torture`` alone."""


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    ("group", "chosen"),
    [
        pytest.param("kernel", "", id="kernel"),
        pytest.param("supervisor", "", id="supervisor"),
        pytest.param("service", f"not ({PORTABLE})", id="service"),
        pytest.param("service", PORTABLE, id="service, portable", marks=pytest.mark.torture),
    ],
)
def test_files_under_the_darwin_emulation_pass(
    group: str, chosen: str, simulated_libsystem: Path, record_property: Callable[[str, object], None]
) -> None:
    """All tests of the group pass or say why they are skipped; none of them runs into its timeout."""
    env = os.environ | {"PYTHONPATH": str(TESTS), SIMULATOR: str(simulated_libsystem)}
    files = [str(TESTS / name) for name in GROUPS[group]]
    command = [
        sys.executable,
        *("-m", "pytest", "-p", "support.as_darwin.plugin"),
        *("-n", "0", "-q", "--timeout", "60", "-k", chosen),
        *files,
    ]
    ran = subprocess.run(command, env=env, cwd=TESTS.parent, capture_output=True, text=True, timeout=LIMIT_S - 5)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]
    passed = re.search(r"^([0-9]+) passed", ran.stdout, re.MULTILINE)
    assert passed is not None
    record_property(COUNTED, int(passed[1]))
