"""No window over targets that do at random what threads can do contradicts what must hold: `oracle.py` judges."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import tools
from support.paths import SUPPORT

WINDOWS = int(os.environ.get("VITALSD_WINDOWS", "6000"))
"""``make torture`` takes a million."""


@pytest.mark.live
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_windows_over_random_targets_violate_no_invariant(short_path: Path) -> None:
    """
    The target starts and ends threads, executes programs from any thread, renames threads and stops.

    No thread used more than its process, not all were idle while it ran, the CPU accounting balances, and while the
    target rested, its own clocks agree within the stated errors.
    """
    program = short_path / "random_target"
    source = SUPPORT / "programs" / "random_target.c"
    subprocess.run([tools.program("cc", package="gcc"), "-O1", "-pthread", "-o", program, source], check=True)
    taking = [sys.executable, str(SUPPORT / "random_windows.py"), str(program), str(WINDOWS), "7"]
    with subprocess.Popen(taking, stdout=subprocess.PIPE) as windows:
        oracle = subprocess.run(
            [sys.executable, "-I", str(SUPPORT / "oracle.py")],
            stdin=windows.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert windows.wait() == 0
    found = json.loads(oracle.stdout)
    print(found)
    assert found["violations"] == []
    assert found["windows"] == WINDOWS
    assert min(found["compared"], found["names"], found["execs"], found["cells"]) > WINDOWS // 20


def violations_in(*lines: str) -> list[str]:
    """Return the violations that the oracle finds in `lines`."""
    done = subprocess.run(
        [sys.executable, "-I", str(SUPPORT / "oracle.py")],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    violations: list[str] = json.loads(done.stdout)["violations"]
    assert done.returncode == bool(violations)
    return violations


def window(cpu: float, *threads: float | None, exited: float = 0.0) -> str:
    living = sum(each or 0 for each in threads)
    return json.dumps(
        [
            1,
            2,
            True,
            {
                "process": {"cpu_percent": cpu, "cpu_percent_error": 0.5},
                "threads": [
                    {
                        "tid": tid,
                        "name": "n",
                        "cpu_percent": each,
                        "cpu_percent_error": None if each is None else 0.5,
                        "born_in_window": False,
                    }
                    for tid, each in enumerate(threads, 1)
                ],
                "accounting": {
                    "process_percent": cpu,
                    "living_percent": living,
                    "exited_percent": exited,
                    "unattributed_percent": cpu - living - exited,
                },
                "window": {"measured_ms": 1000.0},
                "resolution": {"lag_ns": 4_000_000},
            },
            None,
        ]
    )


@pytest.mark.parametrize(
    ("cpu", "threads", "words"),
    [
        (10.0, (10.0, 0.0), None),
        (10.0, (None, None), None),
        (10.0, (12.0, 0.0), "thread 1 used 12.0"),
        (10.0, (0.0, 0.0), "all threads idle"),
        (10.0, (0.0, 10.0), "thread 2 10.0 %, and it used 0"),
        (30.0, (10.0, 0.0), "process 30.0 %, and it used 100000000"),
    ],
)
def test_oracle_of_a_wrong_figure_reports_it(cpu: float, threads: tuple[float | None, ...], words: str | None) -> None:
    """The first thread of a target used 100 ms in a second, as its own clocks said."""
    truths = [
        f"T {json.dumps([number, number * 10**9, cpu_ns, 0, {1: [cpu_ns, 'n'], 2: [0, 'n']}])}"
        for number, cpu_ns in ((1, 0), (2, 10**8))
    ]
    found = violations_in(*truths, f"W {window(cpu, *threads)}")
    assert (found == []) if words is None else any(words in each for each in found)
