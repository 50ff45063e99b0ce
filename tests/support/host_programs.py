"""Run programs that use vitalsd in unusual ways, each in a process of its own that prints its findings."""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.paths import TESTS

__all__ = ["answered", "bare_environment", "run_host", "site_packages_without"]


def answered(sidecar: Any) -> list[str]:
    """Ask the sidecar of this process in every way that needs no address, and return what is wrong with the answers."""
    from vitalsd_client import BugReport, fetch, mark

    found = fetch(window_ms=50)
    wrong = [] if type(found).__name__ == "Measured" else [str(found)]
    wrong += [] if mark("by the client") and sidecar.mark("by the sidecar") else ["a mark was not recorded"]
    report = BugReport("host", window_ms=20)
    members = report.preview()
    wrong += [] if json.loads(members["runtime-metrics.json"]).get("available", True) else ["the report has no metrics"]
    wrong += [] if "runtime-history.json" in members else ["the report has no history"]
    return wrong + [f"{each.member}: {each.reason}" for each in report.failures]


def bare_environment(directory: Path) -> dict[str, str]:
    """Return an environment without the directories of a user, and with `directory` as home."""
    dropped = ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"HOME": str(directory)}


def run_host(
    code: str,
    env: Mapping[str, str],
    *,
    directory: Path,
    python: Sequence[str] = (sys.executable,),
    timeout_s: float = 60,
    succeeds: bool = True,
) -> "subprocess.CompletedProcess[str]":
    """
    Run a program to its end; it can import the modules of the tests.

    Args:
        code: source of the program.
        env: its environment; ``PYTHONPATH`` is extended.
        directory: its working directory, to which the program is written.
        python: command of the interpreter.
        succeeds: an assertion fails if its exit status is not 0.
        timeout_s: time limit, s.
    """
    program = directory / "host.py"
    program.write_text(textwrap.dedent(code))
    path = os.pathsep.join(filter(None, [env.get("PYTHONPATH", ""), str(TESTS)]))
    done = subprocess.run(
        [*python, "-P", str(program)],
        env={**env, "PYTHONPATH": path},
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert not succeeds or done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done


def site_packages_without(directory: Path, *unwanted: str) -> Path:
    """Make a directory of links to the packages of this interpreter, but for those that begin with `unwanted`."""
    directory.mkdir()
    for found in Path(sysconfig.get_path("purelib")).iterdir():
        if not found.name.startswith(unwanted) and found.suffix != ".pth":
            (directory / found.name).symlink_to(found)
    return directory
