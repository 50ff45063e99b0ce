"""The hosted workflow: what it says, and its steps for a Mac, run here as on a Mac. It proves nothing about a Mac."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.as_darwin.emulation import LIBRARY
from support.paths import ROOT, SUPPORT
from support.sidecars import VITALSD, environment

if sys.platform == "darwin":
    pytest.skip("a Mac runs the workflow itself", allow_module_level=True)


@pytest.fixture(scope="module")
def mac() -> dict[str, Any]:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    job: dict[str, Any] = workflow["jobs"]["mac"]
    return job


def steps(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"][0]: step for step in job["steps"] if re.match("[0-9]: ", step.get("name", ""))}


@pytest.fixture
def on_a_mac(simulated_libsystem: Path, short_path: Path) -> dict[str, str]:
    """An environment in which Python runs as on Darwin, and ``launchctl`` is the stub."""
    programs, state = short_path / "bin", short_path / "launchd"
    programs.mkdir()
    state.mkdir()
    launchctl = programs / "launchctl"
    launchctl.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{SUPPORT}/launchd_stub.py" "{state}" "$@"\n', encoding="utf-8"
    )
    launchctl.chmod(0o755)
    vitalsd = programs / "vitalsd"
    vitalsd.write_text(f'#!/bin/sh\nexec {" ".join(VITALSD)} "$@"\n', encoding="utf-8")
    vitalsd.chmod(0o755)
    return environment(short_path) | {
        LIBRARY: str(simulated_libsystem),
        "PYTHONPATH": str(SUPPORT / "as_darwin"),
        "HOME": str(short_path),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }


def test_workflow_mac_steps_have_their_own_time_limits(mac: dict[str, Any]) -> None:
    """The three systems, three numbered steps, and together less than the limit of the job."""
    assert mac["strategy"]["matrix"]["os"] == ["macos-15", "macos-15-intel", "macos-26"]
    assert list(steps(mac)) == ["1", "2", "3"]
    limits = [step["timeout-minutes"] for step in mac["steps"] if "uses" not in step or "name" in step]
    assert sum(limits) < mac["timeout-minutes"]
    assert all(step["if"] == "${{ !cancelled() }}" for number, step in steps(mac).items() if number != "1")


def test_workflow_kernel_step_runs_existing_tests_and_options(mac: dict[str, Any], on_a_mac: dict[str, str]) -> None:
    """Its tests have the marker `mac`, and doctor has the option; the tests themselves run in `test_as_on_a_mac`."""
    first, second = steps(mac)["1"]["run"].splitlines()
    assert first.startswith('make test ARGS="-m mac ')
    (options,) = re.findall(r'^make doctor ARGS="(.*)"$', second)
    tape = Path(on_a_mac["HOME"], "doctor.tape")
    command = [*VITALSD, "doctor", *options.replace("doctor.tape", str(tape)).split()]
    done = subprocess.run(command, env=on_a_mac, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tape.stat().st_size > 10_000


def test_workflow_agent_step_passes_over_a_stub(mac: dict[str, Any], on_a_mac: dict[str, str]) -> None:
    """Install, curl, update and uninstall, with sockets that the stub passes to the agent as launchd does."""
    script, vitalsd = steps(mac)["2"]["run"].split()
    assert vitalsd == ".venv/bin/vitalsd"
    done = subprocess.run(
        [ROOT / script, Path(on_a_mac["HOME"], "bin/vitalsd")],
        env=on_a_mac,
        capture_output=True,
        text=True,
        timeout=100,
    )
    log = Path(on_a_mac["HOME"], "Library/Logs/vitalsd/agent.log")
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text("utf-8") if log.exists() else "")
    assert done.stdout.splitlines()[-1] == "the agent starts, answers, is updated and removed"
    assert not Path(on_a_mac["HOME"], "launchd/supervisor").exists()
