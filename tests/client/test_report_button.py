"""Run the programs of docs/report-button.md as they stand there, with the example receiver as a real server."""

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from support import tools
from support.paths import ROOT
from support.sidecars import environment, eventually, listing, serving
from vitalsd.contract.metrics import Measured, Unavailable, parse_runtime_metrics
from vitalsd.discovery.runtime_file import discover
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import Run
from vitalsd_client import Entry, Spool

pytestmark = pytest.mark.live
TEXT = (ROOT / "docs" / "report-button.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = {re.match(r"\W+([\w.]+)", body)[1]: body for body in BLOCKS}  # type: ignore[index]

TOKENS = (b"f00dcafe", b"c0ffee")
"""The token that the program logs, and the one that these tests write into the description."""
DEADLINE_S = 60.0
"""For what takes a few seconds on an idle machine."""
QUESTION = r"It looks as if viewer ended unexpectedly at \d{4}-\d\d-\d\d \d\d:\d\d \((.*)\)\. Send a report\? \[y/n\]"
NO_VITALSD = "/nonexistent/vitalsd"


class Client:
    """
    Run the program, write its clicks and read what it shows.

    Args:
        home: directory of the program, of its data and of the sidecar's files.
        url: of the receiver.
        command: how the client is to run vitalsd.
    """

    def __init__(self, home: Path, url: str, *command: str) -> None:
        self._errors = home / "stderr"
        argv = [sys.executable, "-W", "error::ResourceWarning", "report_button.py", "data", url, *command]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                argv,
                cwd=home,
                env=environment(home),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.shown: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the match of the next line that fits `pattern`; an assertion fails if none comes in time."""
        while True:
            try:
                line = self._lines.get(timeout=DEADLINE_S)
            except queue.Empty:
                line = None
            assert line is not None, f"no line fits {pattern!r}: {self.shown}, stderr: {self._errors.read_text()}"
            self.shown.append(line)
            if found := re.fullmatch(pattern, line):
                return found

    def write(self, line: str) -> None:
        """Send one line to the client."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def report(self, description: str) -> dict[str, int]:
        """Answer the question for a description, and return the members that the preview lists, with their sizes."""
        self.wait_for(r"What happened\?")
        begin = len(self.shown)
        self.write(description)
        self.wait_for(r"Send this report\? \[y/n\]")
        rows = [re.fullmatch(r"  (\S+): (\d+) bytes", line) for line in self.shown[begin:]]
        return {row[1]: int(row[2]) for row in rows if row is not None}

    def quit(self) -> None:
        """Close the client; it exits with status 0 and reports no error on stderr."""
        self.write("quit")
        assert self.process.wait(DEADLINE_S) == 0
        assert self._errors.read_text() == ""

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def home(short_path: Path) -> Iterator[Path]:
    """Return a directory with the program; afterwards end the sidecars that outlive their clients."""
    (short_path / "report_button.py").write_text(FILES["report_button.py"], encoding="utf-8")
    (short_path / "data").mkdir()
    yield short_path
    for endpoint in discover(directories=[short_path / "run"]):
        os.kill(endpoint.pid, signal.SIGTERM)
    eventually(lambda: listing(short_path / "run") == [], DEADLINE_S)


@contextmanager
def receiving(store: Path, port: int) -> Iterator[None]:
    """Run the example receiver on a port of the loopback interface."""
    argv = [sys.executable, str(ROOT / "clients" / "examples" / "receiver.py")]
    log = store.with_suffix(".log")
    with (
        log.open("wb") as output,
        subprocess.Popen([*argv, "--store", store, "--port", str(port)], stdout=output, stderr=output) as process,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as connection:
                return connection.connect_ex(("127.0.0.1", port)) == 0

        try:
            eventually(answers, DEADLINE_S)
            yield
        finally:
            process.terminate()


def reserve_port() -> socket.socket:
    """Return a socket that keeps a port of the loopback interface and refuses connections."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    return reserved


@pytest.fixture(scope="module")
def receiver(module_path: Path) -> Iterator[tuple[str, Path]]:
    """Return the URL of a running receiver, and the directory where it stores reports."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
    with receiving(module_path / "store", port):
        yield f"http://127.0.0.1:{port}/reports", module_path / "store"


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def entries(home: Path) -> list[Entry]:
    return Spool(home / "data" / "spool").entries()


def crash(client: Client, home: Path) -> Run:
    """Kill the client by SIGSEGV, and return its run once the sidecar has recorded how it ended."""
    before = {run.id for run in crashed(home)}
    os.kill(client.process.pid, signal.SIGSEGV)
    # The client stays a zombie until then, so the sidecar can read its status on every kernel.
    (run,) = eventually(lambda: [run for run in crashed(home) if run.id not in before], DEADLINE_S)
    assert client.process.wait(DEADLINE_S) == -signal.SIGSEGV
    assert isinstance(run, Run)
    return run


def crashed(home: Path) -> list[Run]:
    return [run for run in RunDirectory(home / "state" / "runs").runs() if run.state == "crashed"]


def test_report_button_page_has_a_test_for_each_program() -> None:
    """Find no program on the page that no test runs."""
    assert sorted(FILES) == ["report.sh", "report_button.py"]
    assert len(BLOCKS) == len(FILES)


def test_report_with_consent_arrives_redacted(home: Path, receiver: tuple[str, Path]) -> None:
    """Send what the preview lists, with the log, application, description and mark, and without a token."""
    url, store = receiver
    with Client(home, url) as client:
        client.wait_for(r"Sidecar \d+ records this run\.")
        client.write("export")
        client.wait_for(r"Exported\.")
        client.write("report")
        listed = client.report("it stutters, token=c0ffee")
        client.write("y")
        sent, total = client.wait_for(r"Sending: (\d+) of (\d+) bytes").groups()
        report_id = client.wait_for(r"Report (\w{32}) was sent\. Receipt: R-\w+")[1]
        assert 0 < int(sent) <= int(total) == (store / f"{report_id}.zip").stat().st_size
        client.quit()
    found = members(store / f"{report_id}.zip")
    assert {name: len(content) for name, content in found.items()} == listed
    metadata = json.loads(found["metadata.json"])
    assert metadata["app"] == {"name": "viewer", "version": "3.1"}
    assert metadata["description"] == "it stutters, token=(removed)"
    assert TOKENS[0] in (home / "data" / "viewer.log").read_bytes()
    assert b"GET /export?token=(removed)\n" in found["attachments/01-viewer.log"]
    assert [name for name, content in found.items() if any(token in content for token in TOKENS)] == []
    assert [mark["label"] for mark in json.loads(found["marks.json"])] == ["clicked Export"]
    assert isinstance(parse_runtime_metrics(found["runtime-metrics.json"]), Measured)
    assert "previous-run.json" not in found
    assert json.loads(found["manifest.json"])["failures"] == []
    assert [(entry.state, entry.note) for entry in entries(home)] == [("done", f"R-{report_id[:12]}")]


def test_report_without_consent_is_discarded(home: Path, receiver: tuple[str, Path]) -> None:
    """Write nothing into the spool."""
    with Client(home, receiver[0], NO_VITALSD) as client:
        client.write("report")
        assert client.report("never mind")
        client.write("n")
        client.wait_for(r"Discarded\.")
        client.quit()
    assert entries(home) == []


def test_spool_receiver_down_next_start_sends(home: Path) -> None:
    """Keep the report while nothing listens at its URL; the next start sends it, before any click."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        with Client(home, f"http://127.0.0.1:{port}/reports", NO_VITALSD) as client:
            client.write("report")
            client.report("it stutters")
            client.write("y")
            report_id, why = client.wait_for(r"Report (\w{32}) was not sent\. The next start sends it: (.*)").groups()
            assert "refused" in why
            client.quit()
    assert [(entry.report_id, entry.state, entry.attempts) for entry in entries(home)] == [(report_id, "pending", 1)]
    # As after many failed attempts: the report is not due yet.
    note = home / "data" / "spool" / "pending" / f"{report_id}.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"not_before": time.time() + 600}))
    with receiving(home / "store", port), Client(home, f"http://127.0.0.1:{port}/reports", NO_VITALSD) as client:
        client.wait_for(rf"Report {report_id} was sent\. Receipt: R-\w+")
        client.quit()
    assert json.loads(members(home / "store" / f"{report_id}.zip")["metadata.json"])["description"] == "it stutters"
    assert [(entry.report_id, entry.state) for entry in entries(home)] == [(report_id, "done")]


def test_crash_by_sigsegv_next_start_reports_it(home: Path, receiver: tuple[str, Path]) -> None:
    """Ask about the crash at the next start; the report contains that run, and the start after does not ask."""
    url, store = receiver
    with Client(home, url) as client:
        client.wait_for(r"Sidecar \d+ records this run\.")
        client.write("export")
        client.wait_for(r"Exported\.")
        run = crash(client, home)
    with Client(home, url) as client:
        assert client.wait_for(QUESTION)[1].endswith("killed by SIGSEGV")
        client.wait_for(r"Sidecar \d+ records this run\.")
        client.write("y")
        assert "previous-run.json" in client.report("it closed when I exported")
        assert [each.reported for each in crashed(home)] == [False], "a preview does not count"
        client.write("y")
        report_id = client.wait_for(r"Report (\w{32}) was sent\. Receipt: R-\w+")[1]
        client.quit()
    previous: dict[str, Any] = json.loads(members(store / f"{report_id}.zip")["previous-run.json"])
    assert (previous["run"]["id"], previous["run"]["app"]) == (run.id, "viewer")
    assert [mark["label"] for mark in previous["marks"]] == ["clicked Export"]
    assert_next_start_does_not_ask(home, url)


def test_crash_answered_with_no_is_not_asked_again(home: Path, receiver: tuple[str, Path]) -> None:
    """Dismiss the crash even if the user quits at once."""
    url, _ = receiver
    with Client(home, url) as client:
        client.wait_for(r"Sidecar \d+ records this run\.")
        crash(client, home)
    with Client(home, url, NO_VITALSD) as client:
        client.wait_for(QUESTION)
        client.write("n")
        client.quit()
    assert_next_start_does_not_ask(home, url)


def assert_next_start_does_not_ask(home: Path, url: str) -> None:
    with Client(home, url, NO_VITALSD) as client:
        client.wait_for(r"No sidecar records this run: .*")  # The client looks for a crash before that.
        client.quit()
        assert [line for line in client.shown if re.fullmatch(QUESTION, line)] == []


def test_spawn_fails_report_is_made_without_metrics(home: Path, receiver: tuple[str, Path]) -> None:
    """Show why there is no sidecar, list the metrics as missing, and send the rest."""
    url, store = receiver
    with Client(home, url, NO_VITALSD) as client:
        client.wait_for(rf"No sidecar records this run: cannot run {NO_VITALSD}: No such file or directory")
        client.write("export")
        client.wait_for(r"Exported\.")
        client.write("report")
        listed = client.report("it stutters")
        assert any(line.startswith("  missing: runtime-metrics.json: no sidecar") for line in client.shown)
        client.write("y")
        report_id = client.wait_for(r"Report (\w{32}) was sent\. Receipt: R-\w+")[1]
        client.quit()
    found = members(store / f"{report_id}.zip")
    assert {name: len(content) for name, content in found.items()} == listed
    assert isinstance(parse_runtime_metrics(found["runtime-metrics.json"]), Unavailable)
    assert b"GET /export?token=(removed)\n" in found["attachments/01-viewer.log"]


def test_receiver_refuses_report_is_kept_and_not_sent_again(home: Path, receiver: tuple[str, Path]) -> None:
    """Show the refusal of a server that has no such path; the next start leaves the report alone."""
    url = f"{receiver[0]}/wrong"
    with Client(home, url, NO_VITALSD) as client:
        client.write("report")
        client.report("it stutters")
        client.write("y")
        client.wait_for(r"Report \w{32} was refused\. It is kept and not sent again: the server answered 404")
        client.quit()
    assert [(entry.state, entry.attempts) for entry in entries(home)] == [("failed", 1)]


def test_spool_unusable_report_is_saved(home: Path, receiver: tuple[str, Path]) -> None:
    """Write the report into a file where the spool cannot be a directory."""
    (home / "data" / "spool").touch()
    with Client(home, receiver[0], NO_VITALSD) as client:
        client.wait_for(r"Reports cannot be sent: .*spool is not a directory")
        client.write("report")
        listed = client.report("it stutters")
        client.write("y")
        path = client.wait_for(r"The report cannot be sent: .* is not a directory\. It is in (\S+\.zip)")[1]
        client.quit()
    assert {name: len(content) for name, content in members(home / path).items()} == listed


def test_report_from_other_languages_by_http_and_command_is_made(home: Path, receiver: tuple[str, Path]) -> None:
    """Make one report over HTTP and send another by the command."""
    tools.program("curl", package="curl")
    (home / "viewer.log").write_text("GET /\n", encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with serving(home, "--pid", str(os.getpid()), "--app", "viewer") as (_, ready):
        env = environment(home) | {"PATH": path, "URL": ready["url"], "RECEIVER": receiver[0], "NO_PROXY": "*"}
        done = subprocess.run(
            ["sh", "-e"], input=FILES["report.sh"], env=env, cwd=home, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    (downloaded,) = home.glob("viewer-bugreport-*.zip")
    sent = re.fullmatch(r"(\w{32}): sent, receipt R-\w+\n", done.stdout)
    assert sent is not None
    uploaded = members(receiver[1] / f"{sent[1]}.zip")
    assert uploaded["attachments/01-viewer.log"] == b"GET /\n"
    for metadata in (members(downloaded)["metadata.json"], uploaded["metadata.json"]):
        said = json.loads(metadata)
        assert (said["app"], said["description"]) == ({"name": "viewer", "version": "3.1"}, "it stutters")
