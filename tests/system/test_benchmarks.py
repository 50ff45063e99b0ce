"""The suite of benchmarks runs, in its quick form, and what it measures can be compared with what is recorded."""

import json
import subprocess
import sys

import pytest

from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
RECORDED = ROOT / "docs" / "performance.json"


@pytest.mark.torture
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks measure Linux")
def test_the_guard_compares_every_recorded_line() -> None:
    lines = sum(map(len, json.loads(RECORDED.read_text())["results"].values()))
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "guard.py", "--slack", "4"], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"{lines} lines compared, none worse by more than 4 times"], done.stderr
