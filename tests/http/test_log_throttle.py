"""What a service says on stderr, in both forms."""

import json
import logging
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support.sidecars import environment
from vitalsd.cli import main
from vitalsd.cli.logging_setup import logging_as

HOSTILE = "a\x1b[2J\u202eb\nvitalsd: c"


def said(directory: Path, *arguments: str, until: str | None = None, **env: str) -> tuple[list[str], int]:
    """The lines of stderr of a ``vitalsd``, ended with SIGTERM after the first one with `until` in it; its status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vitalsd", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(directory) | env,
    )
    assert process.stderr is not None
    with process.stderr:
        lines = []
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if until is not None and until in line:
                process.send_signal(signal.SIGTERM)
        return lines, process.wait(20)


def parsed(lines: list[str]) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    return entries


@pytest.mark.live
def test_log_of_a_healthy_service_is_one_line(tmp_path: Path) -> None:
    """Readiness is one line in either form; the end is not logged."""
    (line,), status = said(tmp_path, "serve", "--port", "0", until="serving")
    assert line.startswith("vitalsd: serving itself on http://127.0.0.1:")
    assert status == 0
    lines, status = said(tmp_path, "serve", "--port", "0", "--log-format", "json", until="serving")
    (entry,) = parsed(lines)
    assert (entry["level"], entry["logger"], status) == ("info", "vitalsd", 0)
    assert entry["message"].startswith("serving itself on http://127.0.0.1:")


@pytest.mark.live
def test_log_warnings_of_every_part_have_the_chosen_format(tmp_path: Path) -> None:
    """Warnings of the recorder and notes of the start are lines of the same format as all others."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "runs").write_text("in the way", encoding="ascii")
    lines, _ = said(
        tmp_path, "serve", "--port", "0", "--log-format", "json", until="serving", VITALSD_RUNTIME_DIR="/dev/null/x"
    )
    entries = parsed(lines)
    assert {entry["level"] for entry in entries} == {"warning", "info"}
    assert {"vitalsd", "vitalsd.recording.black_box"} == {entry["logger"] for entry in entries}
    assert any("no Unix socket and no runtime file" in entry["message"] for entry in entries)


@pytest.mark.live
def test_log_line_with_a_hostile_name_is_escaped(tmp_path: Path) -> None:
    """A name with escapes and a line end is spelled out in text and escaped in JSON."""
    arguments = ("serve", "--port", "0", "--name", HOSTILE)
    lines, _ = said(tmp_path, *arguments, until="serving")
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "a\\x1b[2J\\u202eb\\nvitalsd: c" in lines[0]
    lines, _ = said(tmp_path, *arguments, "--log-format", "json", until="serving")
    assert lines[0].isascii()
    assert HOSTILE in parsed(lines)[0]["message"]


@pytest.mark.live
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["serve", "--port", "0", "--pid", "2147483647"], 1, "no process has pid 2147483647"),
        (["serve", "--host", "0.0.0.0"], 2, "0.0.0.0 can be reached from other machines"),
        (["serve", "--pid", "1", "--name", "x"], 2, "--pid and --name exclude each other"),
        (["serve", "--port", "99999"], 2, "Invalid value for '--port': 99999 is not in the range"),
        (["replay"], 2, "Missing argument 'FILE'"),
        (["replay", "pyproject.toml", "--prot", "1"], 2, "--prot"),
        (["replay", "pyproject.toml"], 1, "pyproject.toml"),
    ],
)
def test_log_of_a_start_error_is_one_line_with_its_status(arguments: list[str], status: int, message: str) -> None:
    """An error at the start has its status, and with JSON its line."""
    out = CliRunner().invoke(main, [*arguments, "--log-format", "json"])
    (entry,) = parsed(out.stderr.splitlines())
    assert (entry["level"], out.exit_code) == ("error", status)
    assert message in entry["message"]
    out = CliRunner().invoke(main, arguments)
    assert message in out.stderr.splitlines()[-1]
    assert out.exit_code == status


def test_log_of_an_internal_error_in_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An unexpected exception is logged on one line with its traceback, and the exit status is 1."""
    with pytest.raises(SystemExit) as ended, logging_as("json"):
        raise RuntimeError(HOSTILE)
    assert ended.value.code == 1
    (entry,) = parsed(capsys.readouterr().err.splitlines())
    assert entry["level"] == "critical"
    assert "RuntimeError: a" in entry["exception"]
    assert "Traceback" in entry["exception"]


def test_log_traceback_in_text_escapes_each_line(capsys: pytest.CaptureFixture[str]) -> None:
    """In text a traceback keeps its lines, and control characters in them are escaped."""
    with logging_as("text"):
        try:
            raise RuntimeError("x\x1b[2Jy")
        except RuntimeError:
            logging.getLogger("asyncio").exception("a callback failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "vitalsd: a callback failed"
    assert lines[-1] == "RuntimeError: x\\x1b[2Jy"
    assert all(line.isprintable() for line in lines)


def test_logging_configuration_is_restored_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Afterwards handlers, levels and warnings are those of before; inside, warnings are lines too."""
    root, ours, shown = logging.getLogger(), logging.getLogger("vitalsd"), warnings.showwarning
    before = (list(root.handlers), root.level, ours.level)
    with logging_as("text") as log:
        assert len(root.handlers) == len(before[0]) + 1
        log.debug("not to be logged")
    assert (list(root.handlers), root.level, ours.level) == before
    assert warnings.showwarning is shown
    assert "not to be logged" not in capsys.readouterr().err
