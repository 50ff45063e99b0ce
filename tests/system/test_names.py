"""
Hostile names of processes and threads, as a real target has them, in every form that they get out by.

In a browser: tests/http/test_page.py. On the full screen of ``top``: tests/top/test_top.py.
"""

import csv
import io
import json
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus

from support.edge import get
from support.sidecars import environment, eventually, serving
from support.target import Target
from vitalsd.cli import main
from vitalsd.text import printable

pytestmark = [pytest.mark.live, pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) names a thread by bytes")]

NAMES = {
    "escapes": b"\x1b]0;p\x07\x1b[2J\x9b",
    "markup": b"<script>&'\"",
    "no UTF-8": b"\xff\xfe\xc3(\x80",
    "bidi": "a\u202eb\u2066c".encode(),
    "line ends": "a\nb\r\u2028\u2029".encode(),
    "fields": b"a) R 1 (\t",
    "labels": b'x"} 1\n# EOF\\',
    "formula": b"=1+1,;|cmd",
    "nothing": b"",
    "C1": "\u0085\u009b1m".encode(),
    "invisible": "\u200b\u00ad\ufeff\U000e0041".encode(),
}


def is_plain_text(text: str) -> bool:
    """Return whether text has no control characters but line ends, and none that hides or reverses text."""
    return not any(c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


@dataclass(frozen=True)
class Watched:
    """A target, and where the sidecar is that records it."""

    target: Target
    where: str
    directory: Path


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with (
        tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as path,
        Target("--burn", "20") as target,
        serving(Path(path), "--pid", str(target.pid), "--record-interval", "0.05") as (_, ready),
    ):
        yield Watched(target, ready["socket"], Path(path))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_hostile_thread_name_is_escaped_in_every_format(watched: Watched, name: bytes) -> None:
    """JSON has the name itself, escaped; text for scrapers and tables have it spelled out, inside its field."""
    where, wanted = watched.where, name.decode("utf-8", "backslashreplace")
    watched.target.ask(f"name {name.hex() or '-'}")
    eventually(lambda: wanted in strings(json.loads(get(where, "/history?seconds=1").body)))
    for path in ("/metrics?window_ms=10", "/metrics?mode=trailing&detail=full", "/history", "/processes"):
        body = get(where, path).body
        assert body.isascii(), path
        assert b"\n" not in body, path
        assert wanted in strings(json.loads(body)), path

    for accept, read in (("text/plain", read_prometheus), ("application/openmetrics-text", read_openmetrics)):
        text = get(where, "/metrics", f"Accept: {accept}").body.decode()
        assert is_plain_text(text)
        families = {family.name: family.samples for family in read(text)}
        (threads,) = (samples for name, samples in families.items() if name.startswith("vitalsd_thread_cpu_seconds"))
        assert {printable(wanted), "burn-0"} == {each.labels["thread"] for each in threads}

    table = get(where, "/history", "Accept: text/csv").body.decode()
    assert is_plain_text(table)
    lines = list(csv.reader(io.StringIO(table)))
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(table.split("\n")) == len(lines) + 1
    assert any(printable(wanted).replace(";", "\\x3b") in cell for cell in lines[0])
    assert not any(cell.startswith(("=", "+", "@", "\t")) for line in lines for cell in line)


def test_hostile_process_name_is_escaped_on_a_terminal(short_path: Path, start: Callable[..., Target]) -> None:
    """Each list of processes, runs and threads escapes it; each log message is one line."""
    target, name = start("--burn", "20"), b"\x1b]0\n\xff<\xe2\x80\xae\xc2\x9b\xe2\x80\xa8"
    target.ask(f"name {name.hex()}")
    pid, wanted = str(target.pid), name.decode("utf-8", "backslashreplace")
    env = {key: value for key, value in environment(short_path).items() if key.startswith("VITALSD_")}
    with serving(short_path, "--name", wanted) as (process, ready):
        eventually(lambda: get(ready["socket"], "/metrics?window_ms=10").status == 200)
        assert wanted in strings(json.loads(get(ready["socket"], "/runs").body))
        assert json.loads(get(ready["socket"], "/info").body)["target"]["name"] == wanted
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
        assert is_plain_text(said)
        assert len(said.splitlines()) == 1
    runner = CliRunner(env=env)
    for arguments in (
        ("runs",),
        ("runs", "--json"),
        ("sample", "--pid", pid, "--window-ms", "10"),
        ("top", "--pid", pid, "--count", "1", "--interval", "0.1"),
        ("endpoints",),
    ):
        out = runner.invoke(main, arguments)
        assert out.exit_code == 0, out.output
        assert is_plain_text(out.output), (arguments, out.output)
    assert printable(wanted)[:6] in runner.invoke(main, ["runs"]).output


def strings(value: Any) -> set[str]:
    """Every string below `value`."""
    if isinstance(value, dict):
        return set().union(*map(strings, value.values()))
    if isinstance(value, list):
        return set().union(*map(strings, value))
    return {value} if isinstance(value, str) else set()
