"""Names of child processes: in a report with `children` alone, whatever the sidecar records."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from support import as_platform
from support.serving import Serving
from support.sidecars import VITALSD, environment, eventually
from support.snapshots import IDENTITY, MACHINE, SECOND, snapshot, with_extras
from vitalsd.contract.encoding import encode
from vitalsd.contract.metrics import FullMetrics, Measured, Unavailable, parse_runtime_metrics
from vitalsd.contract.report_archive import HISTORY, METRICS, PREVIOUS_RUN
from vitalsd.http.app import create_app
from vitalsd.report.builder import Collected, Heading, build
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.snapshot import Child, Part, ProcessTree, Snapshot, measure
from vitalsd.sources import open_source
from vitalsd.sources.base import Source
from vitalsd_client import BugReport, fetch

NAME = "planted-child"
CHILD = Child(pid=99, start_key=5, name=NAME, cpu_ns=SECOND, found_cpu_ns=0, rss_bytes=7 << 20, thread_count=2)
TREE = ProcessTree(cpu_ns=2 * SECOND, reaped_ns=0, rss_bytes=71 << 20, process_count=2, gaps=0, children=(CHILD,))
APPLICATION = {"cpu_percent": [50.0], "rss_kb": [70000], "process_count": [2], "complete": [True]}
RECORDED: dict[str, Any] = {
    "schema": 2,
    "platform": "linux",
    "target": {"pid": 4242, "name": "app", "started_at": "2026-03-01T09:30:00.000Z", "start_id": "4242-1-abcdef01"},
    "interval_ms": 1000,
    "time_ms": [1_772_357_405_250],
    "elapsed_ms": [1000.0],
    "cpu_percent": [12.5],
    "rss_kb": [9000],
    "vm_size_kb": [90000],
    "thread_count": [1],
    "threads": [{"tid": 4242, "name": "app \u202e", "cpu_percent": [12.5]}],
    "application": APPLICATION,
    "children": [{"pid": 99, "name": NAME, "cpu_percent": [37.5], "rss_kb": [7000]}],
    "marks": [],
    "events": [],
}
RUN = {
    "id": "4242-0-abcdef01-1",
    "state": "crashed",
    "ended": None,
    "reported": False,
    "app": "viewer",
    "recorded_to": "2026-03-01T09:30:00.000Z",
    "program": "",
    "name": "app",
    "pid": 4242,
}


def measured(*, children: bool, recorded: bool = True) -> bytes:
    """Return an answer of ``/metrics``, with a child if it is requested and recorded."""
    first, last = (with_extras(snapshot(at, [(4242, 1, at // 2)])) for at in (SECOND, 2 * SECOND))
    first.machine = last.machine = MACHINE
    first.tree, last.tree = (replace_tree(0), replace_tree(SECOND)) if recorded else (None, None)
    return encode(
        measure(first, last),
        IDENTITY,
        requested_ms=1000,
        detail="full" if children else "basic",
        children=children,
    )


def replace_tree(cpu_ns: int) -> ProcessTree:
    return TREE._replace(cpu_ns=cpu_ns, children=(CHILD._replace(cpu_ns=cpu_ns),))


class Recording:
    """A sidecar that answers as one of ``serve --children``; `requests` are what it was asked."""

    def __init__(self, *, trailing: bool = True) -> None:
        self.requests: list[tuple[str, dict[str, list[str]]]] = []
        recording = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = parse_qs(url.query)
                recording.requests.append((url.path, query))
                body = recording.answer(url.path, query, trailing=trailing)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def answer(self, path: str, query: dict[str, list[str]], *, trailing: bool) -> bytes:
        if path == "/metrics":
            has_children = trailing or query["mode"] == ["wait"]
            return measured(children=query.get("children") == ["true"], recorded=has_children)
        info = {"app": "viewer", "target": RECORDED["target"], "recorder": {"state": "running", "ended": None}}
        answers: dict[str, Any] = {"/info": info, "/marks": [], "/runs": [RUN], "/history": RECORDED}
        return json.dumps(answers.get(path, RECORDED)).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def recording() -> Iterator[Recording]:
    found = Recording()
    yield found
    found.close()


@pytest.fixture
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("VITALSD_STATE_DIR", str(short_path / "state"))
    return short_path


def test_report_by_default_names_no_child_and_keeps_the_sums(home: Path, recording: Recording) -> None:
    """Neither metrics nor history nor the crashed run has a name; the application's columns are complete."""
    members = BugReport("viewer", window_ms=10, url=recording.url).preview()
    assert {METRICS, HISTORY, PREVIOUS_RUN} <= members.keys()
    assert not any(NAME.encode() in content for content in members.values())
    assert type(parse_runtime_metrics(members[METRICS])) is Measured
    for name in (HISTORY, PREVIOUS_RUN):
        table = json.loads(members[name])
        assert (table["children"], table["application"]) == ([], APPLICATION)
        kept = {key: value for key, value in RECORDED.items() if key != "children"}
        assert {key: table[key] for key in kept} == kept


def test_report_with_children_names_them_in_metrics_and_history(home: Path, recording: Recording) -> None:
    """With `children=True` the metrics are the full ones, and every member is as the sidecar sent it."""
    members = BugReport("viewer", window_ms=10, url=recording.url, children=True).preview()
    metrics = parse_runtime_metrics(members[METRICS])
    assert isinstance(metrics, FullMetrics)
    assert metrics.children is not None
    assert [(child.pid, child.name) for child in metrics.children] == [(99, NAME)]
    assert json.loads(members[HISTORY]) == RECORDED
    assert json.loads(members[PREVIOUS_RUN])["children"] == RECORDED["children"]


@pytest.mark.parametrize("children", [False, True])
def test_report_command_names_children_with_its_option_alone(home: Path, recording: Recording, children: bool) -> None:
    """`vitalsd report` has the names with --children, and shows them in --preview."""
    more = ["--children"] if children else []
    out = subprocess.run(
        [*VITALSD, "report", "--app", "viewer", "--url", recording.url, "--preview", *more],
        capture_output=True,
        text=True,
        timeout=40,
        env=environment(home),
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert (NAME in out.stdout) == children


def test_fetch_with_children_waits_if_the_record_has_none(home: Path) -> None:
    """A sidecar that does not record children is asked for the coming window."""
    recording = Recording(trailing=False)
    try:
        found = fetch(1000, url=recording.url, detail="full", children=True)
    finally:
        recording.close()
    assert isinstance(found, FullMetrics)
    assert found.children is not None
    assert [child.name for child in found.children] == [NAME]
    assert [query["mode"] for _, query in recording.requests] == [["trailing"], ["wait"]]


def test_fetch_with_children_and_basic_detail_is_unavailable(home: Path, recording: Recording) -> None:
    """The reason names the argument; nothing is sent."""
    found = fetch(10, url=recording.url, children=True)
    assert isinstance(found, Unavailable)
    assert 'detail="full"' in found.reason
    assert recording.requests == []


def test_member_that_may_name_children_and_cannot_be_read_is_left_out() -> None:
    """What is not understood does not leave the program: the manifest has the reason."""
    collected = Collected("linux", {HISTORY: b"[" * 100_000, METRICS: b"[1]", "marks.json": b"no JSON"})
    bundle = build(Heading("viewer"), collected, created=datetime.now(UTC))
    assert {failure.member for failure in bundle.failures} == {HISTORY, METRICS}
    assert bundle.members["marks.json"] == b"no JSON"
    allowed = build(Heading("viewer", children=True), collected, created=datetime.now(UTC))
    assert allowed.members[METRICS] == b"[1]"


def test_member_without_children_is_not_changed() -> None:
    """Byte for byte, spaces included."""
    content = b'{"children": [],  "threads": []}'
    collected = Collected("linux", {HISTORY: content})
    assert build(Heading("viewer"), collected, created=datetime.now(UTC)).members[HISTORY] == content


@pytest.mark.skipif(sys.platform != "linux", reason="the planted process tree is of Linux")
def test_report_over_a_record_of_children_names_them_with_consent_alone(home: Path) -> None:
    """A sidecar that records a child names it to its owner; the report of client and sidecar alike does not."""
    program = as_platform.program("linux", as_platform.EXPLAINED)
    planted = json.dumps(as_platform.CHILD)[1:-1].encode()
    with Serving(home, "--pid", str(os.getpid()), "--children", "--record-interval", "0.1", python=program) as serving:
        eventually(lambda: serving.get("/history", seconds=60)["children"], 20)
        for children in (False, True):
            report = BugReport("viewer", window_ms=100, url=serving.url, children=children).preview()
            answer = serving.client.post(f"/report.zip?window_ms=100&children={str(children).lower()}", json={})
            with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
                posted = {name: archive.read(name) for name in archive.namelist()}
            for members in (report, posted):
                assert json.loads(members[HISTORY])["application"]["process_count"].count(2) > 0
                named = {name for name, content in members.items() if planted in content}
                assert named == ({METRICS, HISTORY} if children else set())


class WithChild:
    """This process as a source whose tree has one child."""

    def __init__(self) -> None:
        self._source = open_source()
        self.identity, self.restart, self.close = self._source.identity, self._source.restart, self._source.close
        self.look_at = self._source.look_at

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        taken = self._source.snapshot(parts=parts & ~Part.CHILDREN, names=names)
        return replace(taken, tree=TREE) if Part.CHILDREN in parts else taken


def downloaded(**query: str) -> dict[str, bytes]:
    """Return the members of ``POST /report.zip``."""

    def source() -> Source:
        return WithChild()

    async def run() -> bytes:
        targets = Targets(Sampler(source), lambda _: source())
        await targets.start()
        try:
            transport = httpx.ASGITransport(create_app(targets, list))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                answer = await client.post("/report.zip", params={"window_ms": "50", **query}, json={})
                assert answer.status_code == 200, answer.text
                return answer.content
        finally:
            await targets.close()

    with zipfile.ZipFile(io.BytesIO(asyncio.run(run()))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_post_report_names_children_with_its_parameter_alone() -> None:
    """`children=true` names them in the full metrics; without it the metrics are the basic ones."""
    members = downloaded(children="true")
    metrics = parse_runtime_metrics(members[METRICS])
    assert isinstance(metrics, FullMetrics)
    assert metrics.children is not None
    assert [child.name for child in metrics.children] == [NAME]
    for query in ({}, {"children": "false"}):
        members = downloaded(**query)
        assert type(parse_runtime_metrics(members[METRICS])) is Measured
        assert not any(NAME.encode() in content for content in members.values())
