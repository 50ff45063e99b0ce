"""Reports on a machine with a wrong clock: a ZIP has no date before 1980 or after 2107, and none is lost to that."""

import io
import json
import os
import subprocess
import sys
import zipfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.receivers import receiving
from support.sidecars import VITALSD, environment, serving
from support.tools import program
from vitalsd.contract.report_archive import new_report_id, seal
from vitalsd_client import BugReport, Spool
from vitalsd_client.upload import UploadReceipt

FIRST, LAST = (1980, 1, 1, 0, 0, 0), (2107, 12, 31, 23, 59, 58)
DATES = {
    datetime(1, 1, 1, tzinfo=UTC): FIRST,
    datetime(1970, 1, 1, 0, 10, tzinfo=UTC): FIRST,
    datetime(1979, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC): FIRST,
    datetime(1980, 1, 1, tzinfo=UTC): FIRST,
    datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC): (2026, 1, 2, 3, 4, 6),
    datetime(2107, 12, 31, 23, 59, 59, tzinfo=UTC): LAST,
    datetime(2108, 1, 1, tzinfo=UTC): LAST,
    datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC): LAST,
}


def check(content: bytes, moment: datetime, expected: tuple[int, ...]) -> None:
    """Fail unless every member has the expected date, and the report the true one."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {expected}
        for member, key in ("metadata.json", "submitted_at"), ("manifest.json", "created_at"):
            stated = json.loads(archive.read(member))[key]
            assert abs(datetime.fromisoformat(stated) - moment) < timedelta(minutes=2)


@pytest.mark.parametrize(("moment", "expected"), DATES.items(), ids=str)
def test_report_saved_and_submitted_at_any_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: datetime, expected: tuple[int, ...]
) -> None:
    """Write and keep the report; its name and its metadata have the date of the clock."""

    class Moved(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment

    monkeypatch.setenv("VITALSD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("vitalsd_client.report.datetime", Moved)
    report = BugReport("ryll", running=False)
    path = report.save(tmp_path)
    assert path.name == f"ryll-bugreport-{moment:%Y-%m-%dT%H-%M-%SZ}.zip"
    check(path.read_bytes(), moment, expected)
    with receiving(tmp_path / "store") as url:
        spool = Spool(tmp_path / "spool", url)
        report_id = report.submit(spool)
        (outcome,) = spool.send()
    assert isinstance(outcome.attempt, UploadReceipt)
    assert (tmp_path / "store" / f"{report_id}.zip").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "moment",
    [
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=12))),
        datetime.max,
        datetime.min,
    ],
    ids=str,
)
def test_bundle_at_the_ends_of_the_calendar_is_written(tmp_path: Path, moment: datetime) -> None:
    """Take the date as it is where UTC would be outside of the years that Python has."""
    bundle = seal("ryll", new_report_id(), moment, {"metadata.json": b"{}"}, [])
    assert zipfile.is_zipfile(bundle.write(tmp_path))


@pytest.fixture(params=[datetime(1970, 1, 1, 0, 10, tzinfo=UTC), datetime(2108, 3, 1, 12, tzinfo=UTC)], ids=str)
def moment(request: pytest.FixtureRequest) -> datetime:
    found: datetime = request.param
    return found


@pytest.fixture
def clock(moment: datetime) -> dict[str, str]:
    """
    Give the variables with which a program sees `moment` when it starts.

    Not the `faketime` command around the program: it is a process in between, which passes no signal on. The
    monotonic clock stays: waits of Python go by that.
    """
    if sys.platform != "linux":
        pytest.skip("a program of macOS cannot be given another clock")
    faketime = program("faketime", package="faketime")
    argv = [faketime, "-m", "--exclude-monotonic", "-f", f"@{moment:%Y-%m-%d %H:%M:%S}", "env"]
    out = subprocess.run(argv, env={"TZ": "UTC"}, capture_output=True, text=True, check=True).stdout
    found = dict(line.split("=", 1) for line in out.splitlines())
    found.pop("FAKETIME_SHARED", None)  # the clock of that one process
    return found


def vitalsd(home: Path, clock: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*VITALSD, *arguments], capture_output=True, text=True, timeout=40, env=environment(home) | clock, cwd=home
    )


def test_report_command_at_a_wrong_clock_writes_the_report(
    tmp_path: Path, moment: datetime, clock: dict[str, str]
) -> None:
    """Exit with 0 and no traceback; the file is named by the clock, and no second one takes its place."""
    for _ in range(2):
        out = vitalsd(tmp_path, clock, "report", "--app", "ryll")
        assert (out.returncode, "Traceback" in out.stderr) == (0, False), out.stderr
        path = tmp_path / out.stdout.strip()
        assert path.name.startswith(f"ryll-bugreport-{moment:%Y-%m-%dT%H-%M-}")
        check(path.read_bytes(), moment, FIRST if moment.year < 1980 else LAST)
    assert len(list(tmp_path.glob("*.zip"))) == 2


def test_report_upload_at_a_wrong_clock_sends_the_report(
    tmp_path: Path, moment: datetime, clock: dict[str, str]
) -> None:
    """Send it, list it, and keep what waits when the clock is put right in between."""
    with receiving(tmp_path / "store") as url:
        out = vitalsd(tmp_path, clock, "report", "--app", "ryll", "--upload", url)
        assert out.returncode == 0, out.stderr
        (stored,) = (tmp_path / "store").iterdir()
        check(stored.read_bytes(), moment, FIRST if moment.year < 1980 else LAST)
        assert f" {moment:%Y-%m-%d} " in vitalsd(tmp_path, {}, "spool", "list").stdout
        assert vitalsd(tmp_path, clock, "report", "--upload", "http://127.0.0.1:9/").returncode == 1
        for variables in {}, clock:
            assert vitalsd(tmp_path, variables, "report", "--upload", "http://127.0.0.1:9/").returncode == 1
        waiting = [entry for entry in Spool(tmp_path / "state" / "spool").entries() if entry.state == "pending"]
        assert len(waiting) == 3
        for entry in waiting:
            out = vitalsd(tmp_path, {}, "spool", "send", entry.report_id, "--url", url)
            assert out.returncode == 0, out.stderr
    assert len(list((tmp_path / "store").iterdir())) == 4


def test_report_zip_at_a_wrong_clock_is_answered(tmp_path: Path, moment: datetime, clock: dict[str, str]) -> None:
    """Answer GET and POST with the report, and not with a bug in vitalsd."""
    with serving(tmp_path, "--pid", str(os.getpid()), env=environment(tmp_path) | clock) as (_, ready):
        url = ready["url"].removesuffix("/metrics") + "/report.zip?window_ms=20"
        for answer in httpx.get(url, trust_env=False), httpx.post(url, json={}, trust_env=False):
            assert answer.status_code == 200, answer.text
            check(answer.content, moment, FIRST if moment.year < 1980 else LAST)
