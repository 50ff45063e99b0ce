"""Looking back over a real socket: trailing windows, history, marks, streams, dead runs, replay."""

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import httpx
import pytest

from support.serving import Serving
from vitalsd.contract.metrics import FullMetrics, Measured, parse_runtime_metrics
from vitalsd.recording.replay_file import read_replay_file
from vitalsd.recording.run_reader import UnreadableRunError
from vitalsd.sources import list_processes

BUSY = """
import threading, time
def burn():
    while True:
        end = time.thread_time() + 0.01
        while time.thread_time() < end: pass
        time.sleep(0.01)
threading.Thread(target=burn, name="burner").start()
time.sleep(60)
"""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process with one thread at about half a core."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        yield process
        process.kill()


def wait_until(true: Callable[[], bool], seconds: float = 15) -> None:
    """Poll until something is so; fail if it never is."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def snapshots(serving: Serving) -> int:
    return int(serving.get("/info")["recorder"]["snapshots"])


def test_trailing_window_answers_at_once_without_a_snapshot(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """mode=trailing covers the asked past, agrees with a waited window, and takes no snapshot of its own."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 15)
        begun = time.monotonic()
        trailing = parse_runtime_metrics(json.dumps(serving.get("/metrics", mode="trailing", window_ms=1000)))
        took = time.monotonic() - begun
        assert isinstance(trailing, Measured)
        assert 900 <= trailing.sample_window_ms <= 1500
        assert took < trailing.sample_window_ms / 1000
        full = parse_runtime_metrics(
            json.dumps(serving.get("/metrics", mode="trailing", window_ms=1000, detail="full"))
        )
        assert isinstance(full, FullMetrics)
        assert full.window.mode == "trailing"
        assert full.process.user_percent is None
        assert full.accounting.process_percent == full.process.cpu_percent
        waited = serving.get("/metrics", window_ms=1000)
        assert trailing.process.cpu_percent == pytest.approx(waited["process"]["cpu_percent"], abs=25)
        young = serving.get("/metrics", mode="trailing", window_ms=60000, detail="full")
        assert young["sample_window_ms"] < 60000
        assert any("reaches back only" in warning for warning in young["warnings"])


def test_trailing_window_without_a_recording_waits(tmp_path: Path) -> None:
    """Without a recording, a trailing window is measured like any other, and the history gives the reason."""
    with Serving(tmp_path, "--record-interval", "0") as serving:
        answer = serving.get("/metrics", mode="trailing", window_ms=100, detail="full")
        assert answer["window"]["mode"] == "wait"
        assert serving.get("/info")["recorder"] is None
        refused = serving.client.get("/history")
        assert (refused.status_code, refused.json()["reason"]) == (409, "not_recording")
        assert serving.client.post("/marks", json={"label": "x"}).status_code == 409
        assert serving.get("/marks") == []


def test_history_has_json_csv_and_marks(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """The record comes as JSON and as CSV, with the busiest thread first and the marks on its clock."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 5)
        made = serving.client.post("/marks", json={"label": "F12 pressed"})
        assert made.status_code == 201
        wait_until(lambda: snapshots(serving) > 10)
        table = serving.get("/history", top=1)
        rows = len(table["time_ms"])
        assert rows >= 9
        assert all(len(table[name]) == rows for name in ("elapsed_ms", "cpu_percent", "rss_kb", "thread_count"))
        (thread,) = table["threads"]
        # How much that is depends on what else the machine does.
        assert sum(thread["cpu_percent"]) > 0.5 * sum(table["cpu_percent"]) > 0
        assert table["marks"] == [{"time_ms": made.json()["time_ms"], "label": "F12 pressed"}]
        assert serving.get("/marks") == [made.json()]
        coarse = serving.get("/history", step_ms=400)
        assert len(coarse["time_ms"]) < rows / 2
        answer = serving.client.get("/history", headers={"Accept": "text/csv"})
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        head, *lines = csv.reader(io.StringIO(answer.text))
        assert head[:6] == ["time", "elapsed_ms", "cpu_percent", "rss_kb", "vm_size_kb", "thread_count"]
        assert {len(line) for line in lines} == {len(head)}
        assert "mark: F12 pressed" in [line[-2] for line in lines]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"label": ""}', 422),
        (b'{"label": "two\\nlines"}', 422),
        (b'{"label": 7}', 422),
        (b'{"labels": "x"}', 422),
        (b"{}", 422),
        (b"[]", 422),
        (b'"x"', 422),
        (b"{", 422),
        (b"", 422),
        (json.dumps({"label": "x" * 201}).encode(), 422),
        (json.dumps({"label": "x" * 5000}).encode(), 413),
    ],
)
def test_mark_with_a_bad_body_is_refused_and_not_recorded(shared: Serving, body: bytes, status: int) -> None:
    """A bad body is a problem that says what is wrong; nothing is recorded."""
    answer = shared.client.post("/marks", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 1024
    assert shared.get("/marks") == []


def test_mark_with_a_long_chunked_body_is_413(shared: Serving) -> None:
    """A body without a declared length is refused as soon as it is too long."""
    answer = shared.client.post("/marks", content=iter([b"x" * 1000] * 6), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["reason"]) == (413, "body_too_large")


def test_history_of_another_pid_is_refused(shared: Serving) -> None:
    """pid= may name the target; for any other process the refusal names the recorded one."""
    own = shared.get("/info")["target"]["pid"]
    assert shared.get("/history", pid=own)["target"]["pid"] == own
    other = shared.client.get("/history", params={"pid": 1})
    assert (other.status_code, other.json()["reason"]) == (409, "not_recording")
    assert str(own) in other.json()["detail"]


def test_black_box_off_is_stated_in_info_and_metrics(tmp_path: Path) -> None:
    """If the disk does not take the record, metrics continue, and /info and detail=full give the reason."""
    (tmp_path / "runs").write_text("in the way")
    with Serving(tmp_path, "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 3)
        error = serving.get("/info")["recorder"]["black_box"]["error"]
        assert "the black box is off" in error
        assert error in serving.get("/metrics", window_ms=50, detail="full")["warnings"]
        assert error in serving.get("/metrics", window_ms=50, detail="full", mode="trailing")["warnings"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for tests that leave no trace in it."""
    with Serving(tmp_path_factory.mktemp("state")) as serving:
        yield serving


def events(serving: Serving, count: int, **parameters: object) -> list[dict[str, str]]:
    """The first Server-Sent Events of a stream."""
    found: list[dict[str, str]] = []
    with serving.client.stream("GET", "/stream", params=parameters) as answer:  # type: ignore[arg-type]
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                event[key] = value
            else:
                found.append(event)
                event = {}
                if len(found) == count:
                    break
    return found


def test_stream_events_are_consecutive_windows(shared: Serving) -> None:
    """Each event is an answer of /metrics; they are numbered and follow each other without a gap."""
    found = events(shared, 4, interval_ms=100)
    assert [event["id"] for event in found] == ["1", "2", "3", "4"]
    answers = [parse_runtime_metrics(event["data"]) for event in found]
    assert all(isinstance(answer, Measured) for answer in answers)
    uptimes = [answer.process.uptime_secs for answer in answers if isinstance(answer, Measured)]
    windows = [answer.sample_window_ms for answer in answers if isinstance(answer, Measured)]
    assert sum(windows[1:]) / 1000 == pytest.approx(uptimes[-1] - uptimes[0], abs=0.02)


def has_room(serving: Serving) -> bool:
    """Return whether another stream may begin: a stream ends within moments after its client disconnects."""
    with serving.client.stream("GET", "/stream") as answer:
        return answer.status_code == 200


def test_stream_beyond_eight_is_refused(shared: Serving) -> None:
    """The ninth stream is refused with a problem; when one ends there is room again."""
    with httpx.Client(base_url=shared.url, trust_env=False, timeout=10) as client:
        streams = [client.send(client.build_request("GET", "/stream"), stream=True) for _ in range(8)]
        assert {stream.status_code for stream in streams} == {200}
        refused = client.get("/stream")
        assert (refused.status_code, refused.json()["reason"]) == (429, "busy")
        for stream in streams:
            stream.close()
    wait_until(lambda: has_room(shared))


def test_stream_beyond_eight_started_together_is_refused(shared: Serving) -> None:
    """Each has its place from the first moment, though its process has yet to be opened."""
    pids = [entry.pid for entry in islice(list_processes(), 12)]

    async def main() -> list[int]:
        async with httpx.AsyncClient(base_url=shared.client.base_url, trust_env=False) as client:
            requests = [client.build_request("GET", "/stream", params={"pid": pid}) for pid in pids]
            answers = await asyncio.gather(*(client.send(request, stream=True) for request in requests))
            for answer in answers:
                await answer.aclose()
            return [answer.status_code for answer in answers]

    assert asyncio.run(main()).count(200) <= 8
    wait_until(lambda: has_room(shared))


def test_stream_of_an_exited_target_is_410(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """The refusal comes before a head with 200."""
    with Serving(tmp_path, "--pid", str(busy.pid)) as serving:
        busy.kill()
        busy.wait()
        answer = serving.client.get("/stream")
        assert (answer.status_code, answer.json()["available"]) == (410, False)


def test_stream_ends_with_the_reason_when_its_target_exits(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """The last event says why there are no more, and the connection closes."""
    with Serving(tmp_path, "--pid", str(busy.pid)) as serving:
        threading.Timer(0.5, busy.kill).start()
        with serving.client.stream("GET", "/stream", params={"interval_ms": 100}) as answer:
            text = answer.read().decode()
        last = text.strip().split("\n\n")[-1]
        assert last.startswith("event: unavailable\n")
        assert "has exited" in last


def test_stream_of_a_slow_reader_drops_its_oldest_events_only(shared: Serving) -> None:
    """A client that does not read holds up neither the sampler nor other streams."""
    with httpx.Client(base_url=shared.url, trust_env=False, timeout=10) as client:
        with client.stream("GET", "/stream", params={"interval_ms": 10}):
            time.sleep(1)
            assert len(events(shared, 3, interval_ms=50)) == 3
        assert client.get("/healthz").status_code == 200


def test_history_of_an_exited_target_is_still_served(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """After the target's death a waited window is gone, the past is still served, and the event says when."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 5)
        busy.kill()
        wait_until(lambda: serving.get("/info")["recorder"]["ended"] is not None)
        assert serving.client.get("/metrics").status_code == 410
        past = parse_runtime_metrics(json.dumps(serving.get("/metrics", mode="trailing", window_ms=300)))
        assert isinstance(past, Measured)
        assert len(past.threads) == 2
        assert serving.get("/history")["events"][-1]["kind"] == "exited"


def test_history_has_an_event_for_stop_and_continue(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """SIGSTOP and SIGCONT of the target are in the record, and its CPU is 0 in between."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 3)
        os.kill(busy.pid, signal.SIGSTOP)
        wait_until(lambda: "stopped" in [event["kind"] for event in serving.get("/history")["events"]])
        time.sleep(0.5)
        assert serving.get("/metrics", mode="trailing", window_ms=200)["process"]["cpu_percent"] == 0
        os.kill(busy.pid, signal.SIGCONT)
        wait_until(lambda: "continued" in [event["kind"] for event in serving.get("/history")["events"]])


def vitalsd(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitalsd", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "HOME": str(state), "VITALSD_STATE_DIR": str(state)},
    )


@pytest.mark.parametrize("victims", ["target", "sidecar", "both"])
def test_runs_after_sigkill_list_the_crashed_run(tmp_path: Path, busy: subprocess.Popen[bytes], victims: str) -> None:
    """Whichever process is killed, the next start lists the run as crashed, with names, marks and the last seconds."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 5)
        serving.client.post("/marks", json={"label": "just before"})
        wait_until(lambda: snapshots(serving) > 10)
        last_seen = serving.get("/history")["time_ms"][-1]
        if victims != "sidecar":
            busy.kill()
        if victims == "target":
            wait_until(lambda: serving.get("/info")["recorder"]["ended"] is not None)
            assert serving.stop() == 0
        else:
            serving.process.kill()
            serving.process.wait()
    (listed,) = json.loads(vitalsd(tmp_path, "runs", "--json").stdout)
    assert listed["state"] == "crashed"
    assert listed["id"] in vitalsd(tmp_path, "runs").stdout
    with Serving(tmp_path) as serving:
        first, second = serving.get("/runs")
        assert (first["id"], first["state"], second["state"]) == (listed["id"], "crashed", "running")
        table = serving.get(f"/runs/{listed['id']}/history", top=10)
        assert table["target"]["pid"] == busy.pid
        assert table["time_ms"][-1] >= last_seen
        assert [mark["label"] for mark in table["marks"]] == ["just before"]
        assert len(table["threads"]) == 2
        answer = serving.client.get("/runs/..%2f..%2fetc%2fpasswd/history")
        assert answer.status_code == 404
        assert serving.client.get("/runs/nope/history").json()["reason"] == "no_such_run"


def test_runs_after_a_clean_stop_list_no_crash(tmp_path: Path) -> None:
    """A sidecar that stops by a signal leaves no crashed run."""
    with Serving(tmp_path) as serving:
        assert serving.stop() == 0
    (run,) = json.loads(vitalsd(tmp_path, "runs", "--json").stdout)
    assert (run["state"], run["ended"]) == ("clean", "the sidecar was stopped")


def test_replay_serves_a_black_box_and_a_report(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """The same API answers from a black box, and from a report with the history in it."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as serving:
        wait_until(lambda: snapshots(serving) > 12)
        serving.process.kill()
    (path,) = (tmp_path / "runs").glob("*.sqlite")
    with Serving(tmp_path, str(path), command="replay") as serving:
        table = serving.get("/history", top=10)
        trailing = serving.get("/metrics", mode="trailing", window_ms=500)
        assert {thread["tid"] for thread in trailing["threads"]} == {thread["tid"] for thread in table["threads"]}
        gone = serving.client.get("/metrics")
        assert gone.status_code == 410
        assert "replay" in gone.json()["reason"]
        assert serving.client.post("/marks", json={"label": "x"}).status_code == 409
        assert serving.get("/info")["target"]["pid"] == busy.pid
        body = serving.client.get("/history", params={"top": 10}).content
    report = tmp_path / "report.zip"
    with zipfile.ZipFile(report, "w") as archive:
        archive.writestr("runtime-history.json", body)
    with Serving(tmp_path, str(report), command="replay") as serving:
        again = serving.get("/history", top=10)
        assert again["time_ms"] == table["time_ms"]
        assert again["cpu_percent"] == pytest.approx(table["cpu_percent"], abs=0.01)
        assert serving.get("/metrics", mode="trailing", window_ms=500)["process"]["rss_kb"] == table["rss_kb"][-1]
        full = serving.get("/metrics", mode="trailing", window_ms=500, detail="full")
        assert full["host"] == {"cpu_count": None, "os": full["platform"], "os_version": None, "arch": None}


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\3\4 not really"])
def test_replay_of_another_file_exits_with_1(tmp_path: Path, content: bytes) -> None:
    """A file that is no run ends with one clear line and status 1."""
    path = tmp_path / "notes.sqlite"
    path.write_bytes(content)
    done = vitalsd(tmp_path, "replay", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith("vitalsd: notes.sqlite")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "said"),
    [(zipfile.ZIP_DEFLATED, "invalid block type"), (zipfile.ZIP_LZMA, "compressed as in no report")],
)
def test_replay_of_a_damaged_report_names_the_file(tmp_path: Path, method: int, said: str) -> None:
    """The error for a file that cannot be unpacked is one line with its name."""
    path = tmp_path / "report.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("runtime-history.json", "{}")
    content = bytearray(path.read_bytes())
    content[30 + len("runtime-history.json")] = 0xFF  # the first byte after the local header
    path.write_bytes(content)
    done = vitalsd(tmp_path, "replay", str(path))
    assert done.returncode == 1
    assert "report.zip" in done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_replay_unpacks_no_more_than_the_header_says(tmp_path: Path) -> None:
    """A member that is larger than it says is refused before it fills the memory."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("runtime-history.json", b"\0" * 50_000_000)
        archive.infolist()[0].file_size = 100
    tracemalloc.start()
    with pytest.raises(UnreadableRunError, match="bomb"):
        read_replay_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_get_of_any_route_changes_no_file_and_no_mark(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """A run that crashed, with its log, is as it was, and counts as not reported."""
    with Serving(tmp_path, "--pid", str(busy.pid), "--record-interval", "0.1") as crashed:
        crashed.client.post("/marks", json={"label": "F12"}).raise_for_status()
        wait_until(lambda: snapshots(crashed) > 5)
        crashed.stop(signal.SIGKILL)
    with Serving(tmp_path, "--record-interval", "0") as serving:
        before = content_of(tmp_path / "runs")
        [run] = serving.get("/runs")
        assert {Path(name).suffix for name in before} >= {".sqlite", ".sqlite-wal"}
        paths = serving.get("/openapi.json")["paths"]
        for path in [path for path, methods in paths.items() if "get" in methods]:
            for query in ("", f"?run={run['id']}", "?seconds=5", "?window_ms=20&detail=full", "?mode=trailing"):
                for method in ("GET", "HEAD"):
                    with serving.client.stream(method, path.replace("{run_id}", run["id"]) + query) as answer:
                        assert answer.status_code < 500
        assert content_of(tmp_path / "runs") == before
        assert serving.get("/runs") == [run]
        assert run["reported"] is False


def content_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    """The time of the last change and the content of each file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}
