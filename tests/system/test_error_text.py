"""Error messages, logs and exceptions that quote what a server, a file, an argument or another process wrote."""

import json
import logging
import os
import pty
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from support.misbehaving import Misbehaving, answer, says
from support.sidecars import VITALSD, environment
from vitalsd.sidecar.spawn import SpawnError, spawn
from vitalsd.text import MAX_LINE, one_line
from vitalsd_client import BugReport, fetch

pytestmark = pytest.mark.live

HOSTILE = "\x1b]0;OWNED\x07\x1b[31mred\u009b2J\u202e"
LONG = HOSTILE + "A" * (1 << 20)
MOST_BYTES = 12 * MAX_LINE
"""Of one message: each of its characters may be escaped as ten."""


def on_terminal(*arguments: str | bytes, directory: Path) -> tuple[str, int]:
    """Return what a `vitalsd` writes on a pseudo-terminal as its stdout and stderr, and its exit status."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*VITALSD, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env=environment(directory) | {"TERM": "dumb"},  # without the spinner, which moves the cursor
    ) as process:
        os.close(slave)
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        written = bytearray()
        try:
            while chunk := os.read(master, 65536):
                written += chunk
        except OSError:  # EIO: the last process that had the terminal open has ended
            pass
        finally:
            os.close(master)
        status = process.wait(30)
        watchdog.cancel()
    return written.decode(), status


def is_harmless(text: str) -> bool:
    """No control characters but line ends, nothing that hides or turns the direction round, and bounded."""
    plain = not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\r\n" for c in text)
    return plain and len(text.encode()) <= MOST_BYTES


@pytest.fixture(scope="module")
def run_file(module_path: Path) -> Path:
    """A run that has ended."""
    directory = module_path
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*VITALSD, "serve", "--port", "0", "--record-interval", "0.05", "--ready-fd", str(writer)],
        pass_fds=(writer,),
        env=environment(directory),
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            json.loads(pipe.readline())
        process.terminate()
    (found,) = (directory / "state" / "runs").glob("*.sqlite")
    return found


def with_hostile_identity(path: Path) -> None:
    with sqlite3.connect(path) as database:
        identity = json.loads(database.execute("SELECT value FROM meta WHERE key='identity'").fetchone()[0])
        identity[LONG] = 1
        database.execute("UPDATE meta SET value=? WHERE key='identity'", (json.dumps(identity),))


def with_hostile_schema(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA writable_schema=ON")
        database.execute("UPDATE sqlite_master SET sql=? WHERE name='meta'", (f"CREATE TABLE '{LONG}' (",))
        database.execute("UPDATE sqlite_master SET name=? WHERE name='meta'", (HOSTILE,))


@pytest.mark.parametrize("craft", [with_hostile_identity, with_hostile_schema])
@pytest.mark.parametrize("options", [[], ["--log-format", "json"]])
def test_replay_of_crafted_run_prints_bounded_plain_text(
    run_file: Path, tmp_path: Path, craft: Callable[[Path], None], options: list[str]
) -> None:
    """The reason quotes a key or a table name of the file, escaped and cut."""
    crafted = tmp_path / "run.sqlite"
    shutil.copy(run_file, crafted)
    craft(crafted)
    text, status = on_terminal("replay", "--port", "0", str(crafted), *options, directory=tmp_path)
    assert status == 1
    assert is_harmless(text), text[:2000]


ANSWERS = {
    "500 with a problem": answer(
        json.dumps({"detail": LONG}).encode(), status="500 No", kind="application/problem+json"
    ),
    "503 with a reason": answer(
        json.dumps({"platform": "linux", "available": False, "reason": LONG}).encode(), status="503 No"
    ),
    "410 with a reason": answer(
        json.dumps({"platform": "linux", "available": False, "reason": LONG}).encode(), status="410 Gone"
    ),
    "status line": b"HTTP/1.1 " + HOSTILE.encode() + b"\r\n\r\n",
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("command", [["top", "--count", "1"], ["report", "--preview"]])
def test_command_with_url_of_hostile_server_prints_bounded_plain_text(
    tmp_path: Path, case: str, command: list[str]
) -> None:
    """Whatever the server answers, the message is escaped and truncated."""
    with Misbehaving(says(ANSWERS[case])) as server:
        text, _ = on_terminal(*command, "--url", server.url, directory=tmp_path)
    lines = text.splitlines()
    if command[0] == "report":  # its preview has several members and failures
        lines = [line for line in lines if line.startswith("vitalsd: ")]
    assert lines
    assert all(map(is_harmless, lines)), text[:2000]
    assert "OWNED\x07" not in text


def test_top_as_json_of_hostile_server_prints_ascii(tmp_path: Path) -> None:
    """An answer may have C1 controls and line ends where JSON allows them; each is one line of ASCII."""
    info = {"recorder": None, "replay": None}
    full = json.dumps(
        {
            "sample_window_ms": 10,
            "process": {"cpu_percent": 1.0, "rss_kb": 1, "vm_size_kb": 1, "uptime_secs": 1.0},
            "threads": [{"tid": 1, "name": "\u009b2J\u202e", "cpu_percent": 0.0}],
            "platform": "linux",
        },
        ensure_ascii=False,
        indent=1,
    ).encode()

    def behave(connection: object, over: threading.Event) -> None:
        request = server.requests[-1]
        body = json.dumps(info).encode() if b"GET /info" in request else full
        if b"detail=full" in request:
            body = json.dumps({"target": {"pid": 1, "name": "x", "start_id": "1"}}).encode()
        connection.sendall(answer(body))  # type: ignore[attr-defined]

    with Misbehaving(behave) as server:
        text, status = on_terminal("top", "--json", "--count", "1", "--url", server.url, directory=tmp_path)
    assert status == 0, text
    (line,) = text.splitlines()
    assert line.isascii()
    assert json.loads(line)["threads"][0]["name"] == "\u009b2J\u202e"


ARGUMENTS: list[list[str]] = [
    [HOSTILE],
    [f"--{HOSTILE}"],
    ["serve", HOSTILE],
    ["serve", "--port", HOSTILE],
    ["serve", "--auth", HOSTILE],
    ["serve", "--host", HOSTILE],
    ["serve", "--uds", f"/proc/nowhere/{HOSTILE}", "--no-tcp"],
    ["serve", "--otlp", f"ftp://{HOSTILE}"],
    ["serve", "--log-format", "json", "--pid", HOSTILE],
    ["top", "--url", HOSTILE],
    ["top", "--name", HOSTILE],
    ["replay", f"/proc/nowhere/{HOSTILE}"],
    ["report", "--app", HOSTILE],
    ["report", "--url", HOSTILE],
    ["report", "--run", HOSTILE],
    ["report", "--upload", f"http://{HOSTILE}.example", "--direct"],
    ["spool", "drop", HOSTILE],
    ["agent", "print", "--kind", HOSTILE],
    ["agent", "install", "--", f"--{HOSTILE}"],
    ["completion", HOSTILE],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda each: ascii(" ".join(each))[:40])
def test_usage_error_that_quotes_hostile_argument_is_plain_text(tmp_path: Path, arguments: list[str]) -> None:
    """A script passes on what a stranger wrote; click quotes it in its own errors."""
    long = [each.replace(HOSTILE, HOSTILE + "A" * 100_000) for each in arguments]
    for given in (arguments, long):
        text, status = on_terminal(*given, directory=tmp_path)
        assert status != 0
        assert is_harmless(text), text[:2000]


def test_usage_error_that_quotes_bytes_that_are_no_text_is_plain_text(tmp_path: Path) -> None:
    """An argument that is not UTF-8 is quoted escaped."""
    text, status = on_terminal(b"\xff\x1b[31m", directory=tmp_path)
    assert status == 2
    assert is_harmless(text)


def test_bug_with_hostile_text_prints_plain_traceback(tmp_path: Path) -> None:
    """An exception that no code expects is a traceback with its lines escaped and cut."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, vitalsd.cli.runs as listing\n"
        "from vitalsd.cli import main\n"
        f"def broken(): raise KeyError({LONG[:200_000]!r})\n"
        "listing.runs_path = broken\n"
        "main(['runs'], prog_name='vitalsd')\n"
    )
    out = subprocess.run(
        [sys.executable, program], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert out.returncode == 1
    assert "Traceback" in out.stderr
    assert "KeyError" in out.stderr
    assert is_harmless(out.stderr), out.stderr[:2000]


def test_spawn_with_hostile_command_output_raises_bounded_plain_text(tmp_path: Path) -> None:
    """Output of another program on standard error or the ready-fd is escaped and truncated in the error."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        "text = os.environ['TEXT'] + 'A' * int(os.environ['LENGTH'])\n"
        "fd = int(sys.argv[sys.argv.index('--ready-fd') + 1])\n"
        "if os.environ['WAY'] == 'stderr': sys.stderr.write(text)\n"
        "if os.environ['WAY'] == 'error': os.write(fd, json.dumps({'error': text}).encode() + b'\\n')\n"
        "if os.environ['WAY'] == 'garbage': os.write(fd, text.encode() + b'\\n')\n"
    )
    for way, length in (("stderr", 1 << 20), ("error", 50_000), ("garbage", 50_000)):
        env = os.environ | {"TEXT": HOSTILE, "WAY": way, "LENGTH": str(length), "PYTHONIOENCODING": "utf-8"}
        with pytest.raises(SpawnError) as raised:
            spawn(command=[sys.executable, str(program)], env=env)
        assert is_harmless(str(raised.value)), way


def test_serve_with_long_argument_gives_spawn_the_reason(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason longer than the line that `spawn` reads is cut by the sidecar, so that it arrives."""
    for key, value in environment(short_path).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SpawnError, match="is not the URL of a Collector") as raised:
        spawn(options=["--otlp", f"ftp://{LONG[:100_000]}"])
    assert is_harmless(str(raised.value))


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_of_long_hostile_message_and_traceback_is_bounded(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A line of the log is escaped and cut, and so is each line of a traceback."""
    from vitalsd.cli.logging_setup import logging_as

    with logging_as(form) as log:
        try:
            raise ValueError(LONG)
        except ValueError:
            log.warning("%s", LONG, exc_info=True)
    text = capfd.readouterr().err
    assert "ValueError" in text
    assert is_harmless(text)


def test_mark_refused_by_a_hostile_server_logs_plain_text(caplog: pytest.LogCaptureFixture) -> None:
    """The log of the host program gets no control character of a server, and no megabyte of text."""
    from vitalsd_client import mark

    with (
        Misbehaving(says(answer(json.dumps({"detail": LONG}).encode(), status="500 No"))) as server,
        caplog.at_level(logging.WARNING),
    ):
        assert mark("label", url=server.url) is False
    (record,) = caplog.records
    assert is_harmless(record.getMessage())


def answers_by_path(answers: dict[bytes, object]) -> Misbehaving:
    """A server that answers with JSON by the beginning of the path."""

    def behave(connection: socket.socket, _: threading.Event) -> None:
        path = server.requests[-1].split(b" ")[1]
        found = next((body for start, body in answers.items() if path.startswith(start)), None)
        status = "404 No" if found is None else "200 OK"
        connection.sendall(answer(json.dumps(found).encode(), status=status))

    server = Misbehaving(behave)
    return server


def test_platform_of_a_hostile_server_is_bounded_plain_text() -> None:
    """`platform` is any text that a server writes; a client may show it or name a file by it."""
    body = {"platform": LONG, "available": False, "reason": LONG}
    with answers_by_path({b"/metrics": body}) as server:
        found = fetch(10, url=server.url)
    assert len(found.platform) <= 32
    assert is_harmless(found.platform)


@pytest.mark.parametrize("state", [LONG, "crashed", {"a": 1}, 7])
def test_report_with_a_hostile_server_has_bounded_metadata(state: object) -> None:
    """State, end and run of the recorded process, and the platform, are the server's words in metadata.json."""
    info = {
        "target": {"pid": 1, "name": LONG, "start_id": LONG},
        "recorder": {"state": state, "ended": LONG, "black_box": {"run": LONG}},
    }
    metrics = {"platform": LONG, "available": False, "reason": LONG}
    answers = {b"/info": info, b"/metrics": metrics, b"/history": {}, b"/marks": [], b"/runs": [{"id": LONG}]}
    with answers_by_path(answers) as server:
        report = BugReport(None, url=server.url, window_ms=10, history_s=1)
        metadata = json.loads(report.preview()["metadata.json"])
    assert metadata["target"] is None or metadata["target"]["state"] in (None, "crashed")
    assert len(json.dumps(metadata)) < 4000
    assert all(is_harmless(failure.reason) for failure in report.failures)


def test_one_line_cuts_the_middle() -> None:
    """An error message begins with what failed and ends with the remedy; both are kept."""
    assert one_line("a\x1b\n") == "a\\x1b\\n"
    text = one_line("cannot read " + "A" * 5000 + "; call B", 100)
    assert text.startswith("cannot read AAA")
    assert text.endswith("AAA; call B")
    assert " characters left out] " in text
    assert len(text) < 150
