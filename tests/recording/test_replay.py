"""``vitalsd replay`` of reports: what it opens at, what it says about the report, and what it hands out."""

import io
import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from support.serving import Serving
from support.sidecars import VITALSD, ask, environment, eventually, serving
from vitalsd.recording.replay_file import read_replay_file
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import UnreadableRunError
from vitalsd_client import BugReport

pytestmark = pytest.mark.live

ELSEWHERE = {"system": "Darwin", "release": "23.5.0", "version": "14.5", "arch": "arm64", "cpu_count": 10}


@pytest.fixture(scope="module")
def state(module_path: Path) -> Path:
    """The state of a user with one crashed run, of a program that was busy."""
    code = "import threading\nexec('while True: pass')"
    options = ("--record-interval", "0.05", "--app", "viewer", "--app-version", "3.0")
    with (
        subprocess.Popen([sys.executable, "-c", code]) as target,
        serving(module_path, "--pid", str(target.pid), *options) as (process, ready),
    ):
        eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 8, 10)
        target.kill()
        target.wait()
        eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["ended"])
        process.terminate()
        process.wait()
    return module_path


@pytest.fixture(scope="module")
def report(state: Path) -> Path:
    """A report of the restart, which contains the crashed run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(state).items():
            patch.setenv(name, value)
        options = ("--pid", str(os.getpid()), "--record-interval", "0.05", "--app", "viewer", "--app-version", "3.1")
        with serving(state, *options) as (_, ready):
            eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 8, 10)
            made = BugReport("viewer", app_version="3.1", description="it froze\nthen it was gone", window_ms=50)
            made.attach("log.txt", "one line")
            made.attach("missing", Path("/nowhere/at/all"))
            return made.save(state)


def changed(report: Path, name: str, **members: Any) -> Path:
    """A copy of a report with other members; ``None`` leaves one out."""
    path = report.with_name(name)
    with zipfile.ZipFile(report) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            replaced = members.get(info.filename, ...)
            if replaced is not None:
                new.writestr(info.filename, old.read(info) if replaced is ... else replaced)
    return path


def member(report: Path, name: str) -> Any:
    with zipfile.ZipFile(report) as archive:
        return json.loads(archive.read(name))


@pytest.fixture(scope="module")
def replayed(report: Path, state: Path) -> Iterator[Serving]:
    with Serving(state / "reader", str(report), command="replay") as replay:
        yield replay


def mean_of_the_last(table: Any, window_ms: float) -> float:
    """The CPU of the rows that make up the window at the end of a record, %."""
    elapsed_ms = used = 0.0
    for row_ms, percent in zip(reversed(table["elapsed_ms"]), reversed(table["cpu_percent"]), strict=True):
        elapsed_ms, used = elapsed_ms + row_ms, used + row_ms * percent
        if elapsed_ms >= window_ms * 0.99:  # see `Record.window`
            break
    return used / elapsed_ms


def test_replay_of_a_report_opens_at_the_crashed_run(replayed: Serving, report: Path) -> None:
    """History, trailing window and target are those of the crash; the run of the report is in /runs."""
    crashed, current = member(report, "previous-run.json"), member(report, "runtime-history.json")
    info = replayed.get("/info")
    assert info["target"]["start_id"] == crashed["target"]["start_id"]
    assert info["replay"]["run"]["id"] == crashed["run"]["id"]
    assert info["replay"]["run"]["state"] == info["recorder"]["state"] == "crashed"
    assert "killed by SIGKILL" in info["recorder"]["ended"]
    table = replayed.get("/history", seconds=86_400, top=50)
    assert table["time_ms"] == crashed["time_ms"]
    assert table["cpu_percent"] == pytest.approx(crashed["cpu_percent"], abs=0.02)
    past = replayed.get("/metrics", mode="trailing", window_ms=100)
    assert past["process"]["cpu_percent"] == pytest.approx(mean_of_the_last(crashed, 100), abs=0.1)
    assert sum(table["cpu_percent"]) > 0
    (other,) = replayed.get("/runs")
    assert (other["id"], other["state"]) == (current["target"]["start_id"], "running")
    assert replayed.get(f"/runs/{other['id']}/history", seconds=86_400)["time_ms"] == current["time_ms"]
    assert replayed.get(f"/runs/{crashed['run']['id']}/history")["target"] == crashed["target"]
    assert replayed.client.get("/runs/nope/history").json()["reason"] == "no_such_run"


def test_replay_shows_the_metadata_of_the_report(replayed: Serving, report: Path) -> None:
    """Description, application, system, time zone, members and failures."""
    card = replayed.get("/info")["replay"]["report"]
    assert (card["app"], card["app_version"]) == ("viewer", "3.1")
    assert card["description"] == "it froze\nthen it was gone"
    assert card["host"]["system"] == os.uname().sysname
    assert isinstance(card["host"]["utc_offset_minutes"], int)
    with zipfile.ZipFile(report) as archive:
        assert card["members"] == [{"name": info.filename, "size": info.file_size} for info in archive.infolist()]
    assert card["failures"] == [
        {"member": "attachments/02-missing", "reason": "it cannot be read: No such file or directory"}
    ]
    run = replayed.get("/info")["replay"]["run"]
    assert (run["app"], run["app_version"]) == ("viewer", "3.0")


def test_replay_report_zip_is_the_original_report(replayed: Serving, report: Path) -> None:
    """To the byte, by GET and POST, under its name: with description and attachments."""
    for answer in (replayed.client.get("/report.zip"), replayed.client.post("/report.zip", json={"message": "x"})):
        assert answer.content == report.read_bytes()
        assert report.name in answer.headers["content-disposition"]


def test_replay_states_nothing_about_the_machine_of_its_reader(report: Path, state: Path) -> None:
    """Of a report from a Mac, the system in /info and ``detail=full`` is that of the Mac."""
    about, crashed = member(report, "metadata.json"), member(report, "previous-run.json")
    about |= {"platform": "macos", "os": {"name": "Darwin", "release": "23.5.0", "version": "14.5", "arch": "arm64"}}
    about |= {"cpu_count": 10, "utc_offset_minutes": -480}
    crashed["run"]["host"] = ELSEWHERE | {"utc_offset_minutes": -480}
    crashed["platform"] = crashed["run"]["platform"] = "macos"
    members = {"metadata.json": json.dumps(about), "previous-run.json": json.dumps(crashed)}
    path = changed(report, "mac.zip", **members)
    with Serving(state / "reader", str(path), command="replay") as replay:
        info = replay.get("/info")
        assert (info["platform"], info["os_version"], info["arch"], info["cpu_count"]) == ("macos", "14.5", "arm64", 10)
        assert info["utc_offset_minutes"] == -480
        full = replay.get("/metrics", mode="trailing", window_ms=100, detail="full")
        assert full["host"] == {"cpu_count": 10, "os": "macos", "os_version": "14.5", "arch": "arm64"}
        command, env = [*VITALSD, "report", "--url", replay.url], environment(state / "reader")
        out = state / "out"
        made = subprocess.run([*command, "--out", str(out)], env=env, capture_output=True, text=True)
        assert (made.returncode, made.stderr) == (0, "")
        assert Path(made.stdout.strip()).read_bytes() == path.read_bytes()
        assert Path(made.stdout.strip()).name == "mac.zip"
        added = subprocess.run([*command, "--message", "mine"], env=env, capture_output=True, text=True)
        assert (added.returncode, "hands out the original report" in added.stderr) == (2, True)
        mine = json.loads(BugReport("x", url=replay.url, window_ms=50).preview()["metadata.json"])
        assert (mine["os"]["name"], mine["os"]["arch"], mine["cpu_count"]) == ("Darwin", "arm64", 10)
    old = changed(report, "old.zip", **{"metadata.json": None})
    assert read_replay_file(old).card is not None
    assert (
        read_replay_file(changed(report, "redacted.zip", **{"metadata.json": b"(removed)"})).opened.run.state
        == "crashed"
    )


def test_replay_of_a_report_without_a_crash_opens_at_its_own_run(report: Path) -> None:
    """And says that it ran when the report was made."""
    file = read_replay_file(changed(report, "healthy.zip", **{"previous-run.json": None}))
    assert (file.opened.run.state, list(file.others)) == ("running", [])
    assert file.opened.run.application == ("viewer", "3.1")


def test_replay_of_a_report_with_two_crashed_runs_opens_at_the_newest(report: Path) -> None:
    """As one made while the sidecar of the second crash lingered; the other one is in /runs."""
    about = member(report, "metadata.json")
    about["target"] = {"state": "crashed", "ended": "target 7 has exited: killed by SIGABRT"}
    file = read_replay_file(changed(report, "two.zip", **{"metadata.json": json.dumps(about)}))
    assert file.opened.run.id == member(report, "runtime-history.json")["target"]["start_id"]
    assert file.opened.run.ended == "target 7 has exited: killed by SIGABRT"
    (other,) = file.others
    assert (other.run.id, other.run.state) == (member(report, "previous-run.json")["run"]["id"], "crashed")


def test_replay_of_a_member_or_a_run_shows_its_record(report: Path, state: Path) -> None:
    """previous-run.json, runtime-history.json and the .sqlite file of the crashed run."""
    crashed = member(report, "previous-run.json")
    for name in ("previous-run.json", "runtime-history.json"):
        path = state / name
        path.write_text(json.dumps(member(report, name)))
        file = read_replay_file(path)
        assert file.opened.record.identity.start_id == member(report, name)["target"]["start_id"]
        assert (file.card, file.content) == (None, None)
    run = RunDirectory(state / "state" / "runs").find(crashed["run"]["id"])
    assert run is not None
    with Serving(state / "reader", str(run.path), command="replay") as replay:
        info = replay.get("/info")
        assert (info["app"], info["app_version"]) == ("viewer", "3.0")
        assert info["replay"]["report"] is None
        assert info["replay"]["run"]["state"] == "crashed"
        assert replay.client.get("/report.zip").json()["reason"] == "no_report"


def test_top_of_a_replay_shows_the_recording_and_ends(replayed: Serving, state: Path) -> None:
    """The last window, how it ended, and an end: no process can follow."""
    done = subprocess.run(
        [*VITALSD, "top", "--url", replayed.url],
        env=environment(state / "reader"),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    head, line = done.stdout.splitlines()
    assert head.startswith("TIME")
    assert "python" in line
    assert "killed by SIGKILL" in done.stderr


# Files that are something else


def archive(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, content in members.items():
            made.writestr(name.replace("_", "."), content)
    return out.getvalue()


def twice(report: Path, name: str) -> bytes:
    """A zip with two members of one name."""
    out = io.BytesIO(report.read_bytes())
    with zipfile.ZipFile(out, "a") as made, pytest.warns(UserWarning, match="Duplicate"):
        made.writestr(name, made.read(name))
    return out.getvalue()


def test_replay_of_another_file_is_one_error_line(report: Path, tmp_path: Path) -> None:
    """Not a report, no record in it, two members of one name, cut, not JSON: status 1, one line, no traceback."""
    whole = report.read_bytes()
    crashed = member(report, "previous-run.json")
    cases = {
        "letter.zip": (archive(letter_txt=b"dear"), "is not a bug report"),
        "bare.zip": (archive(metadata_json=b"{}"), "nothing to replay"),
        "twice.zip": (twice(report, "previous-run.json"), "2 members named previous-run.json"),
        "cut.zip": (whole[: len(whole) // 2], "zip"),
        "list.json": (b"[1, 2]", "is not a bug report"),
        "other.json": (b'{"a": 1}', "not a history of vitalsd"),
        "deep.json": (b'{"a":' + b"[" * 100_000, "other"),
        "photo.png": (b"\x89PNG\r\n\x1a\n", "is not a bug report (no zip archive)"),
        "empty": (b"", "is not a bug report"),
        "large.json": (b'{"a": [' + b"[]," * (6 << 20) + b"[]]}", "a history has at most"),
        "rows.json": (json.dumps(crashed | {"time_ms": [0] * 20_000}).encode(), "20000 rows"),
        "year.json": (json.dumps(crashed | {"marks": [{"time_ms": 10**18, "label": "x"}]}).encode(), "a time of"),
        "boot.json": (
            json.dumps(crashed | {"target": crashed["target"] | {"start_id": "1-2-;x"}}).encode(),
            "start_id",
        ),
        "many.zip": (archive(**{f"{number}_x": b"" for number in range(20_001)}), "more than 20000 files"),
    }
    for name, (content, sentence) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        done = subprocess.run([*VITALSD, "replay", str(path)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1, name
        assert len(done.stderr.splitlines()) == 1, done.stderr
        if sentence != "other":
            assert sentence in done.stderr, done.stderr
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableRunError, match="not a regular file"):
        read_replay_file(tmp_path / "pipe")


def test_replay_of_many_marks_outside_all_rows_is_served(report: Path, tmp_path: Path) -> None:
    """Each gets the time of a row near it, without a search through all rows."""
    crashed = member(report, "previous-run.json")
    last = crashed["time_ms"][-1]
    crashed["marks"] = [{"time_ms": last + 10_000 + number, "label": str(number)} for number in range(1000)]
    path = tmp_path / "marks.json"
    path.write_text(json.dumps(crashed))
    record = read_replay_file(path).opened.record
    assert record.last is not None
    assert {mark.monotonic_ns for mark in record.marks} == {record.last.monotonic_ns}


def test_replay_of_a_run_that_returns_to_a_segment_is_refused(state: Path, tmp_path: Path) -> None:
    """A hostile file would have one segment copied for each snapshot."""
    run = RunDirectory(state / "state" / "runs").runs()[0]
    path = tmp_path / "run.sqlite"
    with closing(sqlite3.connect(run.path)) as db, closing(sqlite3.connect(path)) as copy:
        db.backup(copy)
        first, last = copy.execute("SELECT min(id), max(id) FROM frame").fetchone()
        columns = "segment, numbers, moved, code, children, gauges"
        newest = "(SELECT max(id) FROM segment)"
        copy.execute(
            f"INSERT INTO segment SELECT id + 1, threads, cpu_ns, waits, constants FROM segment WHERE id = {newest}"
        )
        copy.execute(
            "INSERT INTO frame SELECT ? + 1, segment + 1, numbers, moved, code, children, gauges FROM frame"
            " WHERE id = ?",
            (last, last),
        )
        copy.execute(
            f"INSERT INTO frame (id, {columns}) SELECT ? + 2, {columns} FROM frame WHERE id = ?", (last, first)
        )
        copy.commit()
    with pytest.raises(UnreadableRunError, match="after those of"):
        read_replay_file(path)


def test_replay_of_a_report_with_values_of_wrong_types_is_served(report: Path, state: Path) -> None:
    """Other types than they should be are left out; the rest is shown, and text is text."""
    crashed = member(report, "previous-run.json")
    crashed["run"] |= {"app": 5, "app_version": 3.1, "state": 7, "ended": ["x"], "host": {"cpu_count": -1, "arch": 5}}
    crashed["run"]["id"] = "5'; touch x; '"
    members = {
        "metadata.json": json.dumps({"app": 5, "os": [], "description": "<script>\x1b[31m\u202e", "cpu_count": "many"}),
        "manifest.json": json.dumps({"failures": [1, {"member": 2}, {"member": "a", "reason": "b"}]}),
        "previous-run.json": json.dumps(crashed),
    }
    with Serving(state / "reader", str(changed(report, "strange.zip", **members)), command="replay") as replay:
        info = replay.get("/info")
        assert info["replay"]["report"]["description"] == "<script>\x1b[31m\u202e"
        assert info["replay"]["report"]["failures"][-1] == {"member": "a", "reason": "b"}
        assert (info["app"], info["cpu_count"], info["arch"]) == (None, None, None)
        assert info["replay"]["run"]["state"] == "crashed"
        assert info["replay"]["run"]["id"] == "-".join(crashed["target"]["start_id"].split("-")[:2])
        assert replay.get("/runs")
