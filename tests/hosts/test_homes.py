"""Homes on a real file system without sockets, and system clocks that are wrong by decades."""

import glob
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support.host_programs import bare_environment, run_host
from support.receivers import receiving
from support.sidecars import environment, eventually, serving

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="FUSE and libfaketime as Linux has them"),
]

HERE = Path(__file__).parent

# A file system without sockets


@pytest.fixture
def home(short_path: Path) -> Iterator[Path]:
    """A home on a mounted FUSE file system where mknod and link are EPERM."""
    pytest.importorskip("mfusepy", reason="mfusepy is not installed: run make test-hosts")
    if not os.access("/dev/fuse", os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("needs /dev/fuse and fusermount3: apt-get install fuse3")
    store, mount = short_path / "store", short_path / "home"
    store.mkdir(0o700)
    mount.mkdir()
    command = [sys.executable, str(HERE / "programs" / "no_sockets.py"), str(store), str(mount)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: os.path.ismount(mount) or process.poll() is not None, 20)
            if process.poll() is not None:
                pytest.skip(f"FUSE cannot be mounted here: {process.stderr and process.stderr.read()}")
            with pytest.raises(PermissionError):
                os.mkfifo(mount / "no")
            yield mount
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(mount)], check=False)
            process.terminate()


def has_login_directory() -> bool:
    """Return whether this user has a runtime directory outside the home, in which a socket can be made."""
    return Path(f"/run/user/{os.geteuid()}").exists()


def test_home_on_a_file_system_without_sockets_is_served_over_tcp_with_a_runtime_file(home: Path) -> None:
    """`start` and `spawn`: fetch, marks and reports; a report is saved there, and sent from a spool there."""
    host = """
        import json, vitalsd
        from support.host_programs import answered
        from vitalsd_client import BugReport, Spool
        for begin in vitalsd.start, vitalsd.spawn:
            with begin(port=0) as sidecar:
                wrong = answered(sidecar)
                assert wrong == [], wrong
                runtime_file = getattr(sidecar, "runtime_file", None) or sidecar._service.runtime_file
                print(json.dumps([sidecar.socket, str(runtime_file), list(getattr(sidecar, "notes", []))]))
        BugReport("host", window_ms=20).save()
        spool = Spool("spool", "http://127.0.0.1:9/")
        kept = BugReport("host", window_ms=20).submit(spool)
        spool.send()
        assert [each.attempts for each in spool.entries()] == [1]
        assert spool.drop(kept)
        """
    said = run_host(host, bare_environment(home), directory=home).stdout
    of_start, of_spawn = map(json.loads, said.splitlines())
    if has_login_directory():
        pytest.skip("this user has a runtime directory apart from the home")
    assert of_start[0] is of_spawn[0] is None
    for _, runtime_file, _ in of_start, of_spawn:
        assert Path(runtime_file).is_relative_to(home)
    assert [note for note in of_start[2] if note.startswith("no Unix socket: ")]
    assert [note for note in of_start[2] if "Operation not permitted" in note]


def test_serve_with_a_home_without_sockets_has_a_note_and_is_found(home: Path) -> None:
    """Status 2 before; now it is ready, and `vitalsd endpoints` lists it."""
    env = bare_environment(home)
    with serving(home, env=env) as (process, ready):
        assert ready["url"]
        assert Path(ready["runtime_file"]).exists()
        found = subprocess.run(
            [sys.executable, "-P", "-m", "vitalsd", "endpoints", "--json"], env=env, capture_output=True, text=True
        )
        assert [each["pid"] for each in json.loads(found.stdout)] == [process.pid]


# Clocks

CLOCKS = ["1970-01-01 00:10:00", "1979-12-31 23:58:00", "2107-12-31 23:58:00", "2108-01-01 00:00:10"]


@pytest.fixture(scope="module")
def moved_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that moves the wall clock alone, for programs that measure CPU time and sleep."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler: apt-get install build-essential")
    library = tmp_path_factory.mktemp("clock") / "wall_clock.so"
    source = HERE / "programs" / "wall_clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", str(library), str(source)], check=True, timeout=60)
    return library


def offset_of(clock: str) -> str:
    """Return the seconds from the real clock to `clock`."""
    wanted = datetime.fromisoformat(clock).replace(tzinfo=UTC)
    return str(round((wanted - datetime.now(UTC)).total_seconds()))


def under(library: Path, directory: Path, clock: str) -> dict[str, str]:
    """Return the environment of a program with its clock at `clock`, until another offset is in the file ``clock``."""
    offset = directory / "clock"
    offset.write_text(offset_of(clock))
    return environment(directory) | {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": str(offset), "TZ": "UTC"}


def check_dates(paths: list[Path]) -> None:
    """Assert that each is a whole report, and that its members have a date that a zip can have."""
    for path in paths:
        with zipfile.ZipFile(path) as report:
            assert report.testzip() is None
            assert "metadata.json" in report.namelist()
            assert {member.date_time[0] for member in report.infolist()} <= {1980, 2107}


@pytest.mark.parametrize("clock", CLOCKS)
def test_reports_at_a_wrong_clock_are_saved_sent_and_served(short_path: Path, moved_clock: Path, clock: str) -> None:
    """`save`, `submit` and `send`, GET and POST /report.zip of `start` and `spawn`: none fails, each zip is whole."""
    with receiving(short_path / "store") as url:
        host = f"""
            import datetime, httpx, vitalsd
            from support.host_programs import answered
            from vitalsd_client import BugReport, Spool
            assert str(datetime.datetime.now(datetime.UTC)).startswith({clock[:4]!r})
            for begin in vitalsd.start, vitalsd.spawn:
                with begin(port=0) as sidecar:
                    wrong = answered(sidecar)
                    assert wrong == [], wrong
                    with httpx.Client(base_url=sidecar.url, trust_env=False) as client:
                        for answer in client.get("/report.zip"), client.post("/report.zip", json={{"app": "host"}}):
                            assert answer.status_code == 200, answer.text
                            with open(f"{{begin.__name__}}-{{answer.request.method}}.zip", "wb") as file:
                                file.write(answer.content)
            BugReport("host", window_ms=20).save()
            spool = Spool("spool", {url!r})
            BugReport("host", window_ms=20).submit(spool)
            assert [type(each.attempt).__name__ for each in spool.send()] == ["UploadReceipt"]
            """
        run_host(host, under(moved_clock, short_path, clock), directory=short_path)
    reports = [*short_path.glob("*.zip"), *(short_path / "store").rglob("*.zip")]
    assert len(reports) == 6
    check_dates(reports)


def test_clock_set_by_years_loses_no_report_and_no_window(short_path: Path, moved_clock: Path) -> None:
    """An empty battery, then NTP, then years ahead: windows go on, and all three reports are sent."""
    year = datetime.now(UTC).year
    steps = [f"{year + years}-06-01 00:00:00" for years in (-3, 0, 5)]
    with receiving(short_path / "store") as url:
        host = f"""
            import datetime, vitalsd
            from support.host_programs import answered
            from vitalsd_client import BugReport, Spool
            def spool():
                return Spool("spool", {url!r})
            with vitalsd.start(port=0, record_interval_s=0.05) as inside, vitalsd.spawn(port=0) as beside:
                for clock, offset in {[(step, offset_of(step)) for step in steps]!r}:
                    with open("clock", "w") as file:
                        file.write(offset)
                    assert str(datetime.datetime.now(datetime.UTC)).startswith(clock[:4])
                    for sidecar in inside, beside:
                        wrong = answered(sidecar)
                        assert wrong == [], wrong
                    BugReport("host", window_ms=20).submit(spool())
                assert [type(each.attempt).__name__ for each in spool().send()] == ["UploadReceipt"] * 3
            """
        run_host(host, under(moved_clock, short_path, steps[0]), directory=short_path)
    assert len(list((short_path / "store").rglob("*.zip"))) == 3


LIBFAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)


@pytest.mark.skipif(LIBFAKETIME is None, reason="needs libfaketime: apt-get install faketime")
@pytest.mark.parametrize("clock", CLOCKS)
def test_commands_at_a_wrong_clock_write_and_send_a_report(short_path: Path, clock: str) -> None:
    """`vitalsd report`, with --upload to a server that is not there, and `vitalsd spool send` once it is."""
    faked = {"LD_PRELOAD": str(LIBFAKETIME), "FAKETIME": f"@{clock}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    def vitalsd(*arguments: str) -> int:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vitalsd", *arguments],
            env=environment(short_path) | faked | {"TZ": "UTC"},
            cwd=short_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    assert vitalsd("report", "--app", "host", "--direct") == 0
    assert vitalsd("report", "--app", "host", "--direct", "--upload", "http://127.0.0.1:9/") == 1
    with receiving(short_path / "store") as url:
        [waiting] = (short_path / "state").rglob("pending/*.zip")
        assert vitalsd("spool", "send", waiting.stem, "--url", url) == 0
    reports = [*short_path.glob("host-*.zip"), *(short_path / "store").rglob("*.zip")]
    assert len(reports) == 2
    check_dates(reports)
