"""Gauges of a real client: recorded by a real sidecar, kept after a crash, scraped and pushed."""

import json
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from support.serving import Serving
from support.sidecars import VITALSD, ask, environment, eventually, serving
from support.tools import program
from vitalsd.recording.hang_causes import HangCause

pytestmark = pytest.mark.live

CLIENT = """
import json, sys, threading, time
import vitalsd

HOW = {"start": {"record_interval_s": 0.1}, "spawn": {"options": ["--record-interval", "0.1"]}}
sidecar = getattr(vitalsd, sys.argv[1])(port=0, **HOW[sys.argv[1]])
every, logs = sidecar.gauge("every"), [[] for _ in range(8)]

def update(own, log):
    for number in range(3750):
        own.set(number)
        log.append(time.time_ns())
        every.set(number * (2**26 + 1))
        time.sleep(0.0008)

threads = [threading.Thread(target=update, args=(sidecar.gauge(f"t{i}"), log)) for i, log in enumerate(logs)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({"url": sidecar.url, "logs": logs}), flush=True)
sys.stdin.read()
"""


@contextmanager
def client(code: str, directory: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(directory),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def gauges_of(table: dict[str, Any]) -> dict[str, list[float | None]]:
    return {gauge["name"]: gauge["value"] for gauge in table["gauges"]}


@pytest.mark.parametrize("how", ["start", "spawn"])
def test_gauges_that_8_threads_set_at_10_khz_have_the_last_value_in_each_row(how: str, short_path: Path) -> None:
    """The value of a row is the last one set before the page was read; none is torn, and the last one is kept."""
    with client(CLIENT, short_path, how) as process:
        found = said(process)
        ended_ms = time.time() * 1000

        def settled() -> Any:
            table = ask(found["url"], "/history?seconds=3600")[1]
            return table if table["time_ms"][-1] > ended_ms else None

        table = eventually(settled, 30)
    gauges, times = gauges_of(table), table["time_ms"]
    assert gauges.keys() == {"every", *(f"t{i}" for i in range(8))}
    assert all(value is None or value % (2**26 + 1) == 0 for value in gauges["every"])
    for i, log in enumerate(found["logs"]):
        values = gauges[f"t{i}"]
        assert values[-1] == len(log) - 1
        assert len({value for value in values if value is not None}) > 3
        for value, begin_ms, end_ms in zip(values, times, [*times[1:], times[-1] + 10**6], strict=True):
            least = bisect_right(log, begin_ms * 1_000_000) - 1
            assert (-1 if value is None else value) >= least, "an update before the row is missing"
            assert not value or log[int(value) - 1] < (end_ms + 1) * 1_000_000, "an update from after the row"


def test_gauges_of_a_client_killed_by_sigkill_are_in_its_run(short_path: Path) -> None:
    """`vitalsd runs` lists it, and a replay shows them."""
    code = """
import json, vitalsd
sidecar = vitalsd.start(port=0, record_interval_s=0.1)
sidecar.gauge("fps").set(0.1)
sidecar.gauge("queue").set(-7)
print(json.dumps(sidecar.url), flush=True)
input()
"""
    with client(code, short_path) as process:
        url = said(process)
        eventually(lambda: len(ask(url, "/history")[1]["time_ms"]) > 4, 20)
        process.kill()
    env = environment(short_path)
    out = subprocess.run([*VITALSD, "runs", "--json"], env=env, capture_output=True, text=True, check=True, timeout=30)
    (run,) = json.loads(out.stdout)
    assert run["state"] == "crashed"
    (path,) = (short_path / "state" / "runs").glob("*.sqlite")
    with Serving(short_path / "reader", str(path), command="replay") as replay:
        gauges = gauges_of(replay.get("/history", seconds=86_400))
        assert set(gauges) == {"fps", "queue"}
        assert (gauges["fps"][-1], gauges["queue"][-1]) == (0.1, -7.0)
        text = replay.client.get("/metrics", headers={"Accept": "text/plain"}).text
        assert "vitalsd_gauges{" not in text


def test_gauges_that_are_posted_are_recorded_up_to_32(short_path: Path) -> None:
    """The 33rd is refused; names that a spreadsheet would execute are, too."""
    options = ("--pid", str(os.getpid()), "--record-interval", "0.1")
    with serving(short_path, *options) as (_, ready), httpx.Client(base_url=ready["url"], trust_env=False) as http:
        values = {f"g{i}": i + 0.5 for i in range(32)}
        assert http.post("/gauges", json=values).status_code == 204
        refused = http.post("/gauges", json={"more": 1})
        assert (refused.status_code, refused.json()["reason"]) == (409, "too_many")
        for name in ("=1+1", "+1", "-1", "@a", "\tx", "a;=1", "a b", 'a"', ""):
            bad = http.post("/gauges", json={name: 1})
            assert (bad.status_code, bad.json()["reason"]) == (422, "bad_body"), name
        for number in (b"NaN", b"Infinity", b"1e999", b'"5"', b"true"):
            assert http.post("/gauges", content=b'{"g0": %s}' % number, headers=JSON).status_code in (400, 422)
        gauges = eventually(lambda: gauges_of(http.get("/history").json()), 20)
        assert {name: found[-1] for name, found in gauges.items()} == values
        lines = http.get("/history", headers={"Accept": "text/csv"}).text.splitlines()
        assert [cell for cell in lines[0].split(",") if cell.startswith("gauge ")] == [f"gauge {n}" for n in gauges]


JSON = {"Content-Type": "application/json"}


def test_scrape_has_gauges_and_heartbeats_and_passes_promtool(short_path: Path) -> None:
    """The current values; a hang that lasts shows in its silence, and counts once, however often it is reported."""
    code = """
import json, sys, vitalsd
sidecar = vitalsd.spawn(port=0, options=["--record-interval", "0.1"])
gauge = sidecar.gauge("fps")
heartbeat = sidecar.heartbeat("ui", 0.5)
heartbeat.beat()
gauge.set(58)
print(json.dumps(sidecar.url), flush=True)
for line in sys.stdin:
    heartbeat.beat()
    gauge.set(float(line))
    print("0", flush=True)
"""
    with client(code, short_path) as process:
        url = said(process)

        def scraped() -> dict[str, dict[str, float]]:
            text = httpx.get(f"{url}/metrics", headers={"Accept": "text/plain"}, trust_env=False).text
            samples = [sample for family in parse_text(text) for sample in family.samples]
            return {
                name: {" ".join(sorted(each.labels.values())): each.value for each in samples if each.name == name}
                for name in ("vitalsd_gauges", "vitalsd_heartbeat_silent_seconds", "vitalsd_hangs_total")
            }

        assert scraped()["vitalsd_gauges"] == {"fps": 58}
        eventually(lambda: sum(scraped()["vitalsd_hangs_total"].values()) == 1, 20)
        first = scraped()
        assert first["vitalsd_heartbeat_silent_seconds"]["ui"] > 0.5
        assert first["vitalsd_hangs_total"].keys() == {" ".join(sorted(("ui", cause))) for cause in get_args(HangCause)}
        assert process.stdin is not None
        print("-1.5", file=process.stdin, flush=True)
        said(process)
        assert scraped()["vitalsd_gauges"] == {"fps": -1.5}
        eventually(lambda: [e for e in ask(url, "/history")[1]["events"] if e.get("ongoing") is False], 20)
        after = scraped()["vitalsd_hangs_total"]
        assert all(after[key] >= count for key, count in first["vitalsd_hangs_total"].items())
        promtool = program("promtool", package="prometheus")
        text = httpx.get(f"{url}/metrics", headers={"Accept": "text/plain"}, trust_env=False).content
        out = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
        assert (out.returncode, out.stdout, out.stderr) == (0, b"", b"")
        process.send_signal(signal.SIGKILL)
