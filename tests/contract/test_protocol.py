"""The program in docs/protocol.md, compiled and run against the page of a sidecar."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import tools
from support.paths import ROOT
from vitalsd.contract import signals_page
from vitalsd.contract.signals_page import SignalsPage, heartbeat_slots

TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the example uses a memfd")


def test_c_program_beats_into_the_page(tmp_path: Path) -> None:
    """With its own name, thread and limit, and without a gap."""
    (program,) = re.findall(r"^```c\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    source, binary = tmp_path / "heartbeat.c", tmp_path / "heartbeat"
    source.write_text(program)
    subprocess.run(
        [tools.program("cc", package="build-essential"), "-Wall", "-Wextra", "-Werror", "-o", binary, source],
        check=True,
        timeout=120,
    )
    page = SignalsPage()
    with subprocess.Popen([binary, page.reference["path"]]) as process:
        beats: set[int] = set()
        deadline = time.monotonic() + 30
        while len(beats) < 10:
            assert time.monotonic() < deadline
            for slot in heartbeat_slots(page.read()):
                if slot.beat:
                    beats.add(slot.beat)
                    assert (slot.name, slot.limit_ns) == ("ui", 2_000_000_000)
                    assert (slot.pid, slot.tid) == (process.pid, process.pid)
            time.sleep(0.005)
    assert process.returncode == 0
    page.close()


def test_c_program_without_a_page_says_so(tmp_path: Path) -> None:
    """A file that could shrink is refused before it is mapped."""
    (program,) = re.findall(r"^```c\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    source, binary, file = tmp_path / "heartbeat.c", tmp_path / "heartbeat", tmp_path / "page"
    source.write_text(program)
    file.write_bytes(b"\0" * signals_page.PAGE_BYTES)
    subprocess.run([tools.program("cc", package="build-essential"), "-o", binary, source], check=True, timeout=120)
    assert subprocess.run([binary, file], stderr=subprocess.PIPE, timeout=30).stderr == b"no heartbeat\n"


def test_layout_on_the_page_is_that_of_the_code() -> None:
    """Magic number, version, places and size."""
    assert f"0x{signals_page.MAGIC:X}" in TEXT
    assert f"version of this layout: {signals_page.VERSION}" in TEXT
    assert f"`mmap` of {signals_page.PAGE_BYTES} bytes" in TEXT
    gauges = signals_page.HEADER_WORDS + signals_page.HEARTBEATS * signals_page.SLOT_WORDS
    assert f"| {signals_page.HEADER_WORDS} + {signals_page.SLOT_WORDS} \u00d7 *i*" in TEXT
    assert f"| {gauges} + {signals_page.GAUGE_WORDS} \u00d7 *i*" in TEXT
    assert 8 * (gauges + signals_page.GAUGES * signals_page.GAUGE_WORDS) <= signals_page.PAGE_BYTES
