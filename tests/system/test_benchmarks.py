"""The suite of benchmarks runs in its quick form, and its figures can be compared with the recorded ones."""

import json
import subprocess
import sys

import pytest

from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
RECORDED = ROOT / "docs" / "performance.json"


def test_performance_page_holds_the_recorded_figures() -> None:
    """docs/performance.md and its plots are what the suite writes from docs/performance.json."""
    done = subprocess.run([sys.executable, BENCHMARKS / "suite.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.torture
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks measure Linux")
def test_benchmark_guard_compares_every_recorded_line() -> None:
    lines = sum(map(len, json.loads(RECORDED.read_text())["results"].values()))
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "guard.py", "--slack", "4"], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"{lines} lines compared, none worse by more than 4 times"], done.stderr
