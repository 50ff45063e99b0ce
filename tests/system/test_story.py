"""The story of a new user: a program leaks, runs away, hangs and aborts, and the replay of its report shows it."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from support import tools
from support.browser import Browser
from support.paths import SUPPORT
from support.serving import Serving
from support.sidecars import VITALSD, environment, eventually, serving
from vitalsd.recording.run_directory import RunDirectory

pytestmark = pytest.mark.live

SOURCE = SUPPORT / "programs" / "shake_viewer.c"
UNIT_S = 1.0
ROWS = """[...document.querySelectorAll('#rows tr')].map((row) =>
    [row.querySelector('bdi').textContent, row.querySelector('.figure').textContent])"""


def mebibytes(text: str) -> float:
    number, unit = text.split()
    return float(number) / {"KiB": 1024, "MiB": 1, "GiB": 1 / 1024}[unit]


def test_replay_of_a_crash_report_shows_leak_hang_and_signal(short_path: Path) -> None:
    """In Chromium, without a click: the leak, the runaway thread, the hang and SIGABRT."""
    program = short_path / "shake-viewer"
    subprocess.run(
        [tools.program("cc", package="build-essential"), "-O1", "-pthread", str(SOURCE), "-o", str(program), "-lm"],
        check=True,
    )
    options = ("--record-interval", "0.25", "--linger", "0", "--app", "shake-viewer", "--app-version", "3.1")
    with (
        subprocess.Popen([program, str(UNIT_S)], stderr=subprocess.DEVNULL) as client,
        serving(short_path, "--pid", str(client.pid), *options) as (sidecar, _),
    ):
        assert client.wait(60) == -6
        sidecar.wait(30)
    said = "It got slow, then froze when I clicked Save, then it was gone."
    made = subprocess.run(
        [*VITALSD, "report", "--app", "shake-viewer", "--message", said],
        env=environment(short_path),
        cwd=short_path,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    report = short_path / made.stdout.strip()
    assert re.fullmatch(r"shake-viewer-bugreport-\S+\.zip", report.name)
    assert "previous-run.json" in zipfile.ZipFile(report).namelist()
    assert [run.reported for run in RunDirectory(short_path / "state" / "runs").runs()] == [True]

    with Serving(short_path / "reader", str(report), command="replay") as replay, Browser() as page:
        page.open(f"{replay.url}/")
        page.eventually("document.querySelector('#status').textContent === 'replay'")
        page.eventually(f"{ROWS}.length === 3")
        banner = page.run("document.querySelector('#banner').textContent")
        assert banner.startswith("shake-viewer 3.1 crashed: killed by SIGABRT. Last recorded at ")
        assert said in page.run("document.querySelector('#card').innerText")
        before, after = page.run("document.querySelector('#rss-note').textContent").split(" to ")
        assert mebibytes(after) > mebibytes(before) + 20, "the leak"
        rows = dict(page.run(ROWS))
        assert next(iter(rows)) == "telemetry"
        assert float(rows["telemetry"].removesuffix(" %")) > 3, "the runaway thread, on a machine that is busy"
        idle = re.fullmatch(r"idle (\d+) s", rows["shake-viewer"])
        assert idle is not None, rows
        assert 1 <= int(idle[1]) <= 4, "the hang of three units"
        assert rows["decoder"] == "idle", "which never ran"
        eventually(lambda: page.run("document.querySelectorAll('#legend li').length") >= 2)
        assert page.complaints == []
