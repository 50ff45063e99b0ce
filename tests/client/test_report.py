"""Bug reports: `vitalsd_client.report`, `past` and `archive`, ``vitalsd report`` and ``GET /report.zip``."""

import asyncio
import hashlib
import io
import json
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from support import as_platform
from support.misbehaving import FAULTS, Misbehaving
from support.serving import Serving
from support.sidecars import VITALSD, environment, eventually, serving
from support.stopwatch import Stopwatch
from vitalsd.contract.application import check_app
from vitalsd.contract.metrics import Measured, Unavailable, parse_runtime_metrics
from vitalsd.contract.report_archive import Bundle, Failure, new_report_id, seal
from vitalsd.http.app import create_app
from vitalsd.recording.recorder import RecorderConfig
from vitalsd.recording.replay_file import read_replay_file
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources import open_source
from vitalsd.sources.base import Source
from vitalsd_client import BugReport
from vitalsd_client.attachments import Content

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directories of a user without a sidecar."""
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("VITALSD_STATE_DIR", str(short_path / "state"))
    return short_path


def strictly(body: bytes) -> dict[str, Any]:
    """
    Read `runtime-metrics.json` as its first reader does.

    An untagged union in Rust: its structs take exactly these keys, and no null, no NaN, no float where an integer is
    declared.
    """

    def keys(found: Any, kinds: dict[str, tuple[type, ...]]) -> None:
        assert isinstance(found, dict)
        assert list(found) == list(kinds)
        for key, kind in kinds.items():
            assert type(found[key]) in kind, f"{key} is {found[key]!r}"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    whole = json.loads(body, parse_constant=refuse)
    if "available" in whole:
        keys(whole, {"platform": (str,), "available": (bool,), "reason": (str,)})
        assert whole["available"] is False
        return dict(whole)
    keys(whole, {"sample_window_ms": (int,), "process": (dict,), "threads": (list,), "platform": (str,)})
    number = (int, float)
    keys(whole["process"], {"cpu_percent": number, "rss_kb": (int,), "vm_size_kb": (int,), "uptime_secs": number})
    for thread in whole["threads"]:
        keys(thread, {"tid": (int,), "name": (str,), "cpu_percent": number})
    tids = [thread["tid"] for thread in whole["threads"]]
    assert tids == sorted(set(tids))
    return dict(whole)


def opened(path: Path) -> dict[str, bytes]:
    """The members of a report, after everything that can be checked about it has been."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    unzip = shutil.which("unzip")
    if unzip is not None:
        assert "No errors detected" in subprocess.run([unzip, "-t", path], capture_output=True, text=True).stdout
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members["manifest.json"])
    assert [each["name"] for each in manifest["members"]] == [name for name in members if name != "manifest.json"]
    for each in manifest["members"]:
        content = members[each["name"]]
        assert (each["size"], each["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    strictly(members["runtime-metrics.json"])
    return members


def failures(members: dict[str, bytes]) -> dict[str, str]:
    return {each["member"]: each["reason"] for each in json.loads(members["manifest.json"])["failures"]}


def vitalsd(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VITALSD, *arguments], capture_output=True, text=True, timeout=40, env=environment(home), cwd=home
    )


# What is in it


def test_report_contains_metrics_history_marks_attachments_and_manifest(home: Path) -> None:
    """Metrics of this process, its history and marks, user and time, the attachments, and a correct manifest."""
    with serving(home, "--pid", str(os.getpid()), "--record-interval", "0.05") as (_, ready):
        with httpx.Client(trust_env=False) as client:
            assert client.post(f"{ready['url']}/marks", json={"label": "F12 pressed"}).status_code == 201
            eventually(lambda: client.get(f"{ready['url']}/info").json()["recorder"]["snapshots"] > 12)
        report = BugReport("ryll", app_version="1.2", description="it hangs", window_ms=300)
        report.attach("log.txt", "text ä")
        report.attach("../../etc/pass wd", b"\0\1")
        report.attach("state", lambda: b"called")
        (home / "a.log").write_text("from a file")
        report.attach("a.log", home / "a.log")
        path = report.save(home)
    assert path.name.startswith("ryll-bugreport-20")
    assert path.name == f"{report.bundle().stem}.zip"
    datetime.strptime(path.name, "ryll-bugreport-%Y-%m-%dT%H-%M-%SZ.zip")
    members = opened(path)
    assert list(members) == [
        "metadata.json",
        "runtime-metrics.json",
        "runtime-history.json",
        "marks.json",
        "attachments/01-log.txt",
        "attachments/02-_.._etc_pass_wd",
        "attachments/03-state",
        "attachments/04-a.log",
        "manifest.json",
    ]
    assert failures(members) == {}
    metrics = parse_runtime_metrics(members["runtime-metrics.json"])
    assert isinstance(metrics, Measured)
    assert threading.get_native_id() in [thread.tid for thread in metrics.threads]
    about = json.loads(members["metadata.json"])
    assert about["app"] == {"name": "ryll", "version": "1.2"}
    assert about["description"] == "it hangs"
    assert about["triggered_at"] <= about["submitted_at"]
    assert about["report_id"] == report.report_id == json.loads(members["manifest.json"])["report_id"]
    history = json.loads(members["runtime-history.json"])
    assert history["target"]["pid"] == os.getpid()
    assert [mark["label"] for mark in json.loads(members["marks.json"])] == ["F12 pressed"]
    assert [members[name] for name in list(members)[4:8]] == ["text ä".encode(), b"\0\1", b"called", b"from a file"]
    assert read_replay_file(path).opened.record.identity.pid == os.getpid(), "and the zip can be replayed"


def test_report_without_a_sidecar_states_the_reason(home: Path) -> None:
    """It says why there are no numbers; with direct=True it has those of this process."""
    members = opened(BugReport("ryll").save(home))
    metrics = parse_runtime_metrics(members["runtime-metrics.json"])
    assert isinstance(metrics, Unavailable)
    assert failures(members) == {
        "runtime-metrics.json": metrics.reason,
        "runtime-history.json": metrics.reason,
    }
    members = opened(BugReport("ryll", window_ms=50, direct=True).save(home))
    assert isinstance(parse_runtime_metrics(members["runtime-metrics.json"]), Measured)


def test_report_with_a_sidecar_of_another_process_has_no_history(home: Path) -> None:
    """The report asks a sidecar of another process for the numbers of this one, and for nothing else."""
    with serving(home, "--record-interval", "0.05"):
        members = opened(BugReport("ryll", window_ms=50).save(home))
    assert isinstance(parse_runtime_metrics(members["runtime-metrics.json"]), Measured)
    assert set(members) == {"metadata.json", "runtime-metrics.json", "manifest.json"}
    assert "watches another process" in failures(members)["runtime-history.json"]


def test_report_with_bad_attachments_lists_the_reasons(home: Path) -> None:
    """Too large, missing, a directory, a pipe, raising, of a wrong type or not returning: each is a reason."""
    os.mkfifo(home / "pipe")
    (home / "large").write_bytes(b"x" * 1001)

    def raises() -> bytes:
        raise RuntimeError("secret in a message")

    def leaves() -> bytes:
        raise SystemExit(3)

    def hangs() -> bytes:
        time.sleep(3)
        return b"late"

    wrong: Any = lambda: 7  # noqa: E731
    attachments: dict[str, tuple[Content, str]] = {
        "large": (b"x" * 1001, "it has 1001 bytes, and the limit is 1000"),
        "large-file": (home / "large", "it has 1001 bytes, and the limit is 1000"),
        "missing": (home / "nowhere", "it cannot be read: No such file or directory"),
        "directory": (home, "it cannot be read: Is a directory"),
        "pipe": (home / "pipe", "it cannot be read: not a regular file"),
        "raises": (raises, "it raised RuntimeError"),
        "leaves": (leaves, "it raised SystemExit"),
        "wrong": (wrong, "it raised TypeError"),
        "hangs": (hangs, "it did not come in time"),
        "fine": ("fine", ""),
    }
    report = BugReport("ryll", window_ms=10)
    for name, (content, _) in attachments.items():
        report.attach(name, content, limit=1000)
    watch = Stopwatch()
    members = opened(report.save(home))
    assert watch.elapsed_s < watch.allowed_s(2.5)
    found = failures(members)
    for number, (name, (_, expected)) in enumerate(attachments.items(), 1):
        assert found.get(f"attachments/{number:02}-{name}", "") == expected
    assert b"secret" not in b"".join(members.values())
    assert b"late" not in b"".join(members.values())
    assert members["attachments/10-fine"] == b"fine"


def test_attach_refuses_text_that_is_the_path_of_a_file(home: Path) -> None:
    """A program that passes a path means the file: `attach_file`, with its end if it is too large."""
    log = home / "app.log"
    log.write_text("first line\nlast line\n")
    report = BugReport("ryll", window_ms=10)
    with pytest.raises(ValueError, match=r"call attach_file\(path\)"):
        report.attach("app.log", str(log))
    with log.open() as file, pytest.raises(ValueError, match=r"not TextIOWrapper; to attach a file"):
        report.attach("app.log", file)  # type: ignore[arg-type]
    report.attach("note", f"it is in {log}")
    report.attach("lines", f"{log}\n")
    report.attach("odd", "nul\0")
    report.attach_file(log)
    report.attach_file(str(log), name="end.log", limit=10, tail=True)
    report.attach_file(log, limit=10)
    members = report.preview()
    assert members["attachments/04-app.log"] == log.read_bytes()
    assert members["attachments/05-end.log"] == b"last line\n"
    assert [each.member for each in report.failures if "attachments" in each.member] == ["attachments/06-app.log"]


def test_report_with_a_hung_sidecar_is_made_within_the_budget(home: Path) -> None:
    """Whatever hangs, the report is there within the window and 2 s."""
    with Misbehaving(FAULTS["endless drip"][0]) as server:
        watch = Stopwatch()
        report = BugReport("ryll", window_ms=10, url=server.url)
        report.collect()
        assert watch.elapsed_s < watch.allowed_s(2.2)
        assert "had not sent all of its answer" in failures(dict(report.preview()))["runtime-history.json"]


def test_attachments_beyond_50_or_32_mib_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 51st is refused, and so is one after the report was collected; beyond 32 MiB they are left out."""
    report = BugReport("ryll", window_ms=10)
    for _ in range(50):
        report.attach("a", lambda: b"\0" * (3 << 20))
    with pytest.raises(ValueError, match="at most 50"):
        report.attach("a", b"")
    members = report.preview()
    assert len([name for name in members if name.startswith("attachments/")]) == 10
    assert "all attachments together" in failures(dict(members))["attachments/11-a"]
    with pytest.raises(ValueError, match="collected"):
        report.attach("a", b"")


# What is not in it


def test_report_contains_nothing_of_user_host_or_environment(home: Path) -> None:
    """A program in a strange home, with secrets in its environment and arguments: none of them is in the zip."""
    code = (
        "import sys; from pathlib import Path; from vitalsd_client import BugReport\n"
        "r = BugReport('ryll', window_ms=100, history_s=60, direct=True)\n"
        "r.attach('x', Path.home() / 'private' / 'gone')\n"
        "print(r.save(sys.argv[2]))\n"
    )
    inside = home / "zaphod-home"
    (inside / "private").mkdir(parents=True)
    env = environment(inside) | {"HOME": str(inside), "MY_SECRET": "s3cr3t-value", "USER": "zaphod-user"}
    for with_sidecar in (False, True):
        if with_sidecar:
            with serving(inside, "--record-interval", "0.05", env=env) as (_, ready):
                made = json.loads(
                    subprocess.run(
                        [*VITALSD, "report", "--json", "--url", ready["url"], "--out", str(home)],
                        env=env,
                        capture_output=True,
                        text=True,
                        check=True,
                        cwd=home,
                    ).stdout
                )["file"]
        else:
            argv = [sys.executable, "-c", code, "argument-s3cr3t", str(home)]
            made = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.strip()
        everything = b"\n".join(opened(Path(made)).values()).decode()
        for secret in ("s3cr3t", "zaphod", str(home), "private"):
            assert secret not in everything, secret
        names = {socket.gethostname(), pwd.getpwuid(os.geteuid()).pw_name} - {"root", "localhost"}
        for name in names:
            assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", everything), name


def test_redact_hooks_change_and_drop_members_before_writing(home: Path) -> None:
    """A hook changes a member, drops one, and loses the one it fails on; preview shows what is left."""

    def hook(name: str, content: bytes) -> Any:
        if name == "metadata.json":
            return content.replace(b"4711", b"****")
        if name.endswith("drop"):
            return None
        if name.endswith("bad"):
            raise ValueError("cannot parse 4711")
        if name.endswith("text"):
            return content.decode()
        return content

    report = BugReport("ryll", description="card 4711", window_ms=10, redact=[hook, lambda _, content: content])
    report.attach("drop", b"4711")
    report.attach("bad", b"4711")
    report.attach("good", b"good")
    report.attach("text", b"4711")
    members = opened(report.save(home))
    assert b"4711" not in b"".join(members.values())
    assert b"card ****" in members["metadata.json"]
    assert failures(members)["attachments/01-drop"] == "left out by a redact hook"
    assert failures(members)["attachments/02-bad"] == "left out: a redact hook raised ValueError"
    assert failures(members)["attachments/04-text"] == "left out: a redact hook returned str"
    assert members["attachments/03-good"] == b"good"


def test_redact_accepts_a_single_function(home: Path) -> None:
    """It need not be in a list."""

    def hook(_: str, content: bytes) -> bytes:
        return content.replace(b"4711", b"*")

    report = BugReport("ryll", description="card 4711", window_ms=10, redact=hook)
    assert b"card *" in report.preview()["metadata.json"]


def test_preview_equals_the_written_report(home: Path) -> None:
    """They are equal to the byte; a description set later makes a new preview of the same report."""
    report = BugReport("ryll", window_ms=10)
    first = dict(report.preview())
    report.description = "now I know"
    second = dict(report.preview())
    assert first != second
    assert {name for name in first if first[name] != second[name]} <= {"metadata.json", "manifest.json"}
    assert second == opened(report.save(home))
    assert report.bundle().zip() == next(home.glob("*.zip")).read_bytes()


# The file


def a_bundle(app: str = "ryll") -> Bundle:
    return seal(app, new_report_id(), MOMENT, {"a": b"a" * 1000}, [Failure("b", "gone")])


def test_reports_saved_in_the_same_second_have_distinct_names(tmp_path: Path) -> None:
    """However many threads write at once, each gets a name of its own, and nothing is left besides."""
    threads = [threading.Thread(target=lambda: a_bundle().write(tmp_path)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = sorted(os.listdir(tmp_path))
    stem = "ryll-bugreport-2026-01-02T03-04-05Z"
    assert names == sorted([f"{stem}.zip", *(f"{stem}-{i}.zip" for i in range(2, 13))])
    assert len({(tmp_path / name).read_bytes() for name in names}) == 12


def test_report_save_never_replaces_a_file_or_link(tmp_path: Path) -> None:
    """It replaces neither a file nor a link with the name of the report."""
    stem = a_bundle().stem
    (tmp_path / f"{stem}.zip").write_text("mine")
    (tmp_path / f"{stem}-2.zip").symlink_to(tmp_path / "elsewhere")
    assert a_bundle().write(tmp_path).name == f"{stem}-3.zip"
    assert (tmp_path / f"{stem}.zip").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_report_save_on_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A write that fails in the middle is an OSError, no file, and the report can be saved elsewhere."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    bundle = seal("ryll", new_report_id(), MOMENT, {"a": os.urandom(100_000)}, [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            bundle.write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(tmp_path) == []
    assert bundle.write(tmp_path).exists()


def test_report_save_creates_a_missing_directory_but_no_parents(tmp_path: Path) -> None:
    """The directory is created; a missing parent is more likely a mistake, and an error."""
    assert a_bundle().write(tmp_path / "reports").parent == tmp_path / "reports"
    with pytest.raises(FileNotFoundError):
        a_bundle().write(tmp_path / "nowhere" / "at" / "all")


@pytest.mark.parametrize("app", ["", ".", "../x", "a/b", "-rf", "a b", "ä", "a\n", "a" * 65, "\0"])
def test_report_name_that_is_no_file_name_is_refused(app: str) -> None:
    """The constructor refuses it, and not a later call when the user has something to report."""
    with pytest.raises(ValueError, match="application"):
        check_app(app)
    with pytest.raises(ValueError, match="application"):
        BugReport(app)


@pytest.mark.parametrize(
    ("name", "values"),
    [("window_ms", ["x", None, 9, 60_001, 100.0]), ("history_s", ["x", None, 0, 86_401, float("nan")])],
)
def test_report_argument_out_of_range_is_refused(name: str, values: list[Any]) -> None:
    """The constructor refuses it by its name; the limits themselves are accepted."""
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is a whole number from 1"):
            BugReport("ryll", **{name: value})
    for window_ms, history_s in ((10, 1), (60_000, 86_400)):
        BugReport("ryll", window_ms=window_ms, history_s=history_s)


# The run before


SLEEPER = "import time; time.sleep(60)"


def crash_one(home: Path, marks: str, code: str = SLEEPER, program: Sequence[str] = VITALSD) -> None:
    """Record a run of a script, and kill its sidecar and its target at once."""
    options = ("--record-interval", "0.05")
    with (
        subprocess.Popen([sys.executable, "-c", code]) as target,
        serving(home, "--pid", str(target.pid), *options, program=program) as (process, ready),
    ):
        with httpx.Client(trust_env=False, base_url=ready["url"]) as client:
            eventually(lambda: client.get("/info").json()["recorder"]["snapshots"] > 4)
            client.post("/marks", json={"label": marks})
            eventually(lambda: client.get("/info").json()["recorder"]["snapshots"] > 8)
        process.kill()
        target.kill()


def get_json(url: str, path: str) -> Any:
    answer = httpx.get(f"{url}{path}", trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def recorded(url: str) -> None:
    """Wait until there is something in its record."""
    eventually(lambda: get_json(url, "/info")["recorder"]["snapshots"] > 4)


@pytest.fixture(scope="module")
def idle(module_path: Path) -> Iterator[str]:
    """The URL of a sidecar that watches itself."""
    with serving(module_path) as (_, ready):
        yield ready["url"]


@contextmanager
def next_run(home: Path, *options: str, program: Sequence[str] = VITALSD) -> Iterator[tuple[int, dict[str, Any]]]:
    """The script again, and its sidecar: its pid, and what the sidecar said."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as target:
        try:
            options = ("--record-interval", "0.05", "--pid", str(target.pid), *options)
            with serving(home, *options, program=program) as (_, ready):
                yield target.pid, ready
        finally:
            target.kill()


def test_report_contains_a_crashed_run_once(home: Path) -> None:
    """The next report of the same program has previous-run.json, and the one after it has not."""
    crash_one(home, "just before")
    with next_run(home) as (pid, _):
        report = BugReport("ryll", window_ms=50, pid=pid)
        report.preview()
        saved = BugReport("ryll", window_ms=50, pid=pid)
        members = opened(saved.save(home))
        previous = json.loads(members["previous-run.json"])
        assert previous["run"]["state"] == "crashed"
        assert [mark["label"] for mark in previous["marks"]] == ["just before"]
        assert previous["target"]["pid"] != pid
        assert "previous-run.json" in report.preview(), "previewed, which does not reserve the run for another report"
        assert "previous-run.json" not in BugReport("ryll", window_ms=50, pid=pid).preview()


def test_report_while_the_sidecar_lingers_contains_the_crash(home: Path) -> None:
    """A program that starts again at once need not wait for it; the lingering sidecar does not report its own run."""
    with (
        subprocess.Popen([sys.executable, "-c", SLEEPER]) as target,
        serving(home, "--pid", str(target.pid), "--record-interval", "0.05") as (_, lingering),
    ):

        def runs() -> list[dict[str, Any]]:
            return list(httpx.get(f"{lingering['url']}/runs", trust_env=False).json())

        eventually(lambda: runs()[0]["snapshots"] > 4)
        assert runs()[0]["state"] == "running"
        target.kill()
        run = eventually(lambda: (run := runs()[0])["state"] == "crashed" and run)
        assert "SIGKILL" in run["ended"]
        httpx.post(f"{lingering['url']}/marks", json={"label": "after the end"}, trust_env=False)
        for own in (
            httpx.get(f"{lingering['url']}/report.zip", params={"window_ms": 50}, trust_env=False).content,
            BugReport("ryll", window_ms=50, url=lingering["url"]).bundle().zip(),
        ):
            (home / "own.zip").write_bytes(own)
            (home / "own.zip").chmod(0o600)
            assert "previous-run.json" not in opened(home / "own.zip")
        with next_run(home) as (pid, _):
            members = BugReport("ryll", window_ms=50, pid=pid).preview()
            previous = json.loads(members["previous-run.json"])
            assert previous["run"]["id"] == run["id"]
            assert [mark["label"] for mark in previous["marks"]] == ["after the end"]


def test_killed_sidecar_of_a_living_target_is_no_crash(home: Path) -> None:
    """The run continues in another sidecar; without one, the run states that its end is not known."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as target:
        try:
            options = ("--pid", str(target.pid), "--record-interval", "0.05")
            for black_box in ("--no-black-box", "--black-box"):
                with serving(home, *options) as (process, ready):
                    recorded(ready["url"])
                    process.kill()
                with serving(home, *options, black_box) as (process, ready):
                    assert "previous-run.json" not in BugReport("ryll", window_ms=50, pid=target.pid).preview()
                    runs = get_json(ready["url"], "/runs")
                    process.kill()
            ended = {run["ended"] for run in runs if run["state"] != "running"}
            assert ended == {"the process went on without it"}
        finally:
            target.kill()
    with next_run(home) as (pid, ready):
        (crashed,) = (run for run in get_json(ready["url"], "/runs") if run["state"] == "crashed")
        assert "how the process ended is not known" in crashed["ended"]
        assert "previous-run.json" in BugReport("ryll", window_ms=50, pid=pid).preview()


def test_crash_recorded_by_two_sidecars_is_reported_once(home: Path) -> None:
    """Two sidecars record it, such as one in a launcher and the agent."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as target:
        options = ("--pid", str(target.pid), "--record-interval", "0.05", "--linger", "0")
        with serving(home, *options) as (_, one), serving(home, *options) as (_, other):
            for ready in (one, other):
                recorded(ready["url"])
            target.kill()
    with next_run(home) as (pid, _):
        contained = []
        for _ in range(3):
            report = BugReport("ryll", window_ms=50, pid=pid)
            contained.append("previous-run.json" in report.preview())
            report.save(home)
        assert contained == [True, False, False]


def test_report_of_a_sidecar_without_a_black_box_contains_the_crash(home: Path) -> None:
    """The sidecar finds the crash by the program that it watches, without a record of its own on disk."""
    crash_one(home, "just before")
    with next_run(home, "--no-black-box") as (pid, _):
        assert "previous-run.json" in BugReport("ryll", window_ms=50, pid=pid).preview()


def test_replay_of_a_run_leaves_the_crash_unreported(home: Path) -> None:
    """A run's file is no report, so there is none to download; the next report contains the crash."""
    crash_one(home, "just before")
    (run,) = (home / "state" / "runs").glob("*.sqlite")
    with Serving(home / "state", str(run), command="replay") as replay:
        for answer in (replay.client.get("/report.zip"), replay.client.post("/report.zip", json={})):
            assert (answer.status_code, answer.json()["reason"]) == (409, "no_report")
    with next_run(home) as (pid, _):
        assert "previous-run.json" in BugReport("ryll", window_ms=50, pid=pid).preview()


@pytest.mark.parametrize("kernel", as_platform.KERNELS)
def test_report_excludes_the_crash_of_another_script(kernel: str, home: Path, request: pytest.FixtureRequest) -> None:
    """Both are called python; what the other one did is none of this one's business."""
    program: Sequence[str] = VITALSD
    if kernel == "simulated":
        program = as_platform.program(request.getfixturevalue("simulated_libsystem"))
    crash_one(home, "secret", code=f"{SLEEPER}  # another program", program=program)
    with next_run(home, program=program) as (pid, ready):
        assert "previous-run.json" not in BugReport("ryll", window_ms=50, pid=pid).preview()
        answer = httpx.get(f"{ready['url']}/report.zip", params={"window_ms": 50}, trust_env=False)
        (home / "curl.zip").write_bytes(answer.content)
        (home / "curl.zip").chmod(0o600)
        assert "previous-run.json" not in opened(home / "curl.zip")
        assert [run["reported"] for run in httpx.get(f"{ready['url']}/runs", trust_env=False).json()] == [False, False]


def test_post_report_has_the_same_members_and_the_crashed_run_once(home: Path) -> None:
    """POST /report.zip: application, version and message are in it; the next one leaves the crashed run out."""
    crash_one(home, "just before")
    with next_run(home) as (_, ready):
        url, said = f"{ready['url']}/report.zip", {"app": "ryll", "app_version": "1.2", "message": "it hangs"}
        with httpx.Client(trust_env=False, timeout=10) as client:
            recorded(ready["url"])
            for path, has_crash in ((home / "1.zip", True), (home / "2.zip", False)):
                answer = client.post(url, params={"window_ms": 100}, json=said)
                assert answer.headers["content-type"] == "application/zip"
                assert answer.headers["content-disposition"].startswith('attachment; filename="ryll-bugreport-20')
                path.write_bytes(answer.content)
                path.chmod(0o600)
                members = opened(path)
                assert ("previous-run.json" in members) == has_crash
                assert {"metadata.json", "runtime-metrics.json", "runtime-history.json", "marks.json"} <= set(members)
                assert failures(members) == {}
                about = json.loads(members["metadata.json"])
                assert about["app"] == {"name": "ryll", "version": "1.2"}
                assert about["description"] == "it hangs"
                if has_crash:
                    eventually(lambda: any(run["reported"] for run in get_json(ready["url"], "/runs")))
            for bad in ({"window_ms": "5"}, {"seconds": "0"}, {"x": "1"}):
                assert client.get(url, params=bad).status_code == 422
                assert client.post(url, params=bad, json={}).status_code == 422
            assert client.post(f"{ready['url']}/runs/nope/reported").json()["reason"] == "no_such_run"
            none = client.post(url, params={"run": "nope"}, json={})
            assert (none.status_code, none.json()["reason"]) == (404, "no_such_run")


@pytest.mark.parametrize(
    ("content", "headers", "status", "reason"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 422, "bad_body"),
        (b"", {}, 422, "bad_body"),
        (b"[]", {}, 422, "bad_body"),
        (b'{"app": "a/b"}', {}, 422, "bad_body"),
        (b'{"app": "' + b"x" * 65 + b'"}', {}, 422, "bad_body"),
        (b'{"app_version": "a\\nb"}', {}, 422, "bad_body"),
        (b'{"message": 7}', {}, 422, "bad_body"),
        (b'{"mesage": "x"}', {}, 422, "bad_body"),
        (b'{"message": "' + b"x" * (16 * 1024) + b'"}', {}, 413, "body_too_large"),
        (b"{}", {"Origin": "http://example.org"}, 403, "cross_site"),
        (b"{}", {"Sec-Fetch-Site": "cross-site"}, 403, "cross_site"),
        (b'{"message": "' + b"x" * (16 * 1024 - 20) + b'"}', {}, 200, None),
        (b'{"message": "two\\nlines"}', {}, 200, None),
    ],
)
def test_post_report_with_a_bad_type_size_or_origin_is_refused(
    idle: str, content: bytes, headers: dict[str, str], status: int, reason: str | None
) -> None:
    """JSON alone, of 16 KiB, from no other site; what is wrong is a problem that says so."""
    headers = {"Content-Type": "application/json"} | headers
    answer = httpx.post(f"{idle}/report.zip?window_ms=10", content=content, headers=headers, trust_env=False)
    assert answer.status_code == status
    if reason is not None:
        assert answer.json()["reason"] == reason


# Mac and Linux


def shape(value: Any) -> Any:
    """The keys and kinds of JSON, without its values; of a list those of its first element."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def report_over(source: Callable[[], Source]) -> dict[str, bytes]:
    """The members of ``/report.zip`` of a service over `source`."""

    async def run() -> bytes:
        sampler = Sampler(source, recording=RecorderConfig(0.05, 60.0))
        app = create_app(Targets(sampler, lambda _: source()), list)
        targets = Targets(sampler, lambda _: source())
        await targets.start()
        try:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                await client.post("/marks", json={"label": "x"})
                await asyncio.sleep(0.5)
                return (await client.get("/report.zip", params={"window_ms": 100})).content
        finally:
            await targets.close()

    with zipfile.ZipFile(io.BytesIO(asyncio.run(run()))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.skipif(sys.platform == "darwin", reason="the simulator needs Linux beneath it")
def test_report_of_macos_and_linux_differ_only_in_platform(request: pytest.FixtureRequest) -> None:
    """Same members, same keys, same kinds; only the value of `platform` tells which it was."""
    from vitalsd.sources.darwin.processes import open_process

    simulator = request.getfixturevalue("simulator")
    linux = report_over(lambda: open_source())
    mac = report_over(lambda: open_process(lib=simulator.lib))
    assert list(linux) == list(mac)
    for name in linux:
        if name.endswith(".json"):
            ours, theirs = json.loads(linux[name]), json.loads(mac[name])
            for each in (ours, theirs) if name == "runtime-history.json" else ():
                for column in (each, *each["threads"]):
                    del column["wait_percent"]  # macOS has waits of the process alone, once a second
            assert shape(ours) == shape(theirs), name
            if "platform" in ours:
                assert (ours["platform"], theirs["platform"]) == ("linux", "macos")
    assert list(strictly(linux["runtime-metrics.json"])) == list(strictly(mac["runtime-metrics.json"]))


# The command


def test_report_command_writes_a_report_and_exits_with_0(home: Path) -> None:
    """The path on stdout, what is missing on stderr; status 0 once the report is written."""
    (home / "notes.txt").write_text("notes")
    with serving(home, "--pid", str(os.getpid()), "--record-interval", "0.05", "--app", "ryll"):
        out = vitalsd(home, "report", "--message", "slow", "--attach", "notes.txt", "--app", "ryll")
        assert (out.returncode, out.stderr) == (0, "")
        members = opened(home / out.stdout.strip())
        assert json.loads(members["metadata.json"])["description"] == "slow"
        assert members["attachments/01-notes.txt"] == b"notes"
        assert str(threading.get_native_id()) in members["runtime-metrics.json"].decode()
    out = vitalsd(home, "report", "--json", "--attach", "nowhere", "--out", str(home))
    assert out.returncode == 0
    listed = json.loads(out.stdout)
    assert opened(Path(listed["file"]))
    reasons = {each["member"]: each["reason"] for each in listed["failures"]}
    assert reasons["attachments/01-nowhere"] == "it cannot be read: No such file or directory"
    assert "no sidecar to ask" in reasons["runtime-metrics.json"]
    for wrong in (["--app", "a/b"], ["--upload", "http://example.com/"], ["--upload", "ftp://127.0.0.1"]):
        assert vitalsd(home, "report", *wrong).returncode == 2
    for url in ("ftp://127.0.0.1", "localhost:9779", "http://127.0.0.1:9779/metrics"):
        out = vitalsd(home, "report", "--url", url, "--out", str(home / "none"))
        assert (out.returncode, out.stderr) == (
            2,
            f"vitalsd: {url!r} is not a sidecar's URL; one looks like http://127.0.0.1:9779\n",
        )
    assert not (home / "none").exists()
    out = vitalsd(home, "report", "--out", "/nowhere/at/all")
    assert (out.returncode, "report to /nowhere/at/all: No such file" in out.stderr) == (1, True)
    out = vitalsd(home, "spool", "send", "nosuch")
    assert (out.returncode, out.stdout, "no report nosuch" in out.stderr) == (1, "", True)
