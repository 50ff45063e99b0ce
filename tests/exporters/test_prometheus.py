"""What a scraper gets from /metrics: which numbers, and a real Prometheus that reads them."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from support.serving import Serving
from support.snapshots import FIGURES, IDENTITY, MACHINE, SECOND, snapshot
from support.stopwatch import Stopwatch
from support.target import Target
from support.tools import program
from vitalsd.exporters.counters import SignalsReading
from vitalsd.exporters.prometheus import Form, Scrape, expose
from vitalsd.recording.hangs import HeartbeatStatus

pytestmark = pytest.mark.live

Start = Callable[..., Target]

HOSTILE = 'a"\\\n\x1b[2J\u202e<b>'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for the tests that leave it as it was."""
    with Serving(tmp_path_factory.mktemp("state")) as serving:
        yield serving


def scrape(serving: Serving, accept: str = "text/plain", **parameters: int) -> dict[str, list[Sample]]:
    answer = serving.client.get("/metrics", headers={"Accept": accept}, params=parameters)
    assert answer.status_code == 200, answer.text
    parse = parse_openmetrics if "openmetrics" in answer.headers["content-type"] else parse_text
    found: dict[str, list[Sample]] = {}
    for family in parse(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


@pytest.mark.parametrize("accept", ["text/plain", "text/plain;version=1.0.0", "application/openmetrics-text"])
def test_scrape_in_every_format_has_the_standard_names(served: Serving, start: Start, accept: str) -> None:
    """Each format has the standard process_* names with the figures of the target, without a wait."""
    target = start("--idle", "3", "--burn", "30")
    watch = Stopwatch()
    found = scrape(served, accept, pid=target.pid)
    assert watch.elapsed_s < watch.allowed_s(0.9)
    threads = found["vitalsd_thread_cpu_seconds_total"]
    assert {sample.labels["tid"] for sample in threads} == {str(tid) for tid in target.tids.values()}
    assert "burn-0" in {sample.labels["thread"] for sample in threads}
    assert found["process_threads"][0].value == 5
    assert found["process_start_time_seconds"][0].value == pytest.approx(time.time(), abs=20)
    assert found["process_open_fds"][0].value >= 3
    assert found["vitalsd_target_up"][0].value == 1
    measured = served.get("/metrics", pid=target.pid, window_ms=10)["process"]
    assert found["process_resident_memory_bytes"][0].value == pytest.approx(measured["rss_kb"] * 1024, rel=0.05)
    assert found["process_virtual_memory_bytes"][0].value == pytest.approx(measured["vm_size_kb"] * 1024, rel=0.05)
    assert (
        found["process_cpu_seconds_total"][0].value
        <= scrape(served, pid=target.pid)["process_cpu_seconds_total"][0].value
    )


def test_scrape_passes_promtool(served: Serving) -> None:
    """`promtool check metrics` passes names, types, units and help."""
    promtool = program("promtool", package="prometheus")
    text = served.client.get("/metrics", headers={"Accept": "text/plain"}).content
    out = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (out.returncode, out.stdout, out.stderr) == (0, b"", b"")


def test_scrape_of_a_dead_target_has_target_up_0(served: Serving, start: Start) -> None:
    """A scrape never fails for its target: it says vitalsd_target_up 0 and has no process_* series."""
    target = start()
    assert scrape(served, pid=target.pid)["vitalsd_target_up"][0].value == 1
    target.kill()
    time.sleep(0.05)  # longer than two callers share a snapshot
    found = scrape(served, pid=target.pid)
    assert found["vitalsd_target_up"][0].value == 0
    assert not [name for name in found if name.startswith("process_")]
    assert found["vitalsd_cpu_seconds_total"][0].value > 0


def test_scrape_threads_are_limited_and_can_be_left_out(tmp_path: Path, start: Start) -> None:
    """The threads with the most CPU time have series, up to the cap; --no-thread-metrics leaves all out."""
    target = start("--idle", "6", "--burn", "40")
    with Serving(tmp_path, "--pid", str(target.pid), "--max-thread-metrics", "2") as serving:
        time.sleep(0.5)
        found = scrape(serving)
        assert len(found["vitalsd_thread_cpu_seconds_total"]) == 2
        assert "burn-0" in {sample.labels["thread"] for sample in found["vitalsd_thread_cpu_seconds_total"]}
        assert found["vitalsd_threads_left_out"][0].value == 6
    with Serving(tmp_path, "--pid", str(target.pid), "--no-thread-metrics") as serving:
        found = scrape(serving)
        assert not [name for name in found if name.startswith("vitalsd_thread")]
        assert found["process_threads"][0].value == 8


def test_scrape_with_hostile_names_escapes_its_labels(served: Serving, start: Start) -> None:
    """Quotes, line ends, escapes and bidi marks in a thread's name neither break the text nor reach a terminal."""
    target = start()
    target.ask(f"name {HOSTILE.encode()[:15].hex()}")
    for accept in ("text/plain", "application/openmetrics-text"):
        text = served.client.get("/metrics", headers={"Accept": accept}, params={"pid": target.pid}).text
        assert all(line.isprintable() for line in text.splitlines())
        names = {
            sample.labels["thread"]
            for sample in scrape(served, accept, pid=target.pid)["vitalsd_thread_cpu_seconds_total"]
        }
        assert 'a"\\\\n\\x1b[2J\\u202e<b>' in names


def test_accept_header_without_a_known_format_is_406(served: Serving) -> None:
    """An Accept that takes none of the forms is refused with a list of them."""
    answer = served.client.get("/metrics", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.json()["reason"]) == (406, "not_acceptable")
    assert "text/plain" in answer.json()["detail"]


def test_sidecar_without_scrapes_loads_no_exporter() -> None:
    """A sidecar that is not scraped never imports prometheus-client, nor rich, nor OpenTelemetry."""
    code = "import sys, vitalsd.http.app, vitalsd.cli, vitalsd.exporters.otlp; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"prometheus_client", "rich", "opentelemetry.sdk"} & set(out.stdout.split())


def test_scrape_without_target_values_ends_as_the_format_demands() -> None:
    """Without a value of a target the text still ends as the format requires."""
    body, content_type = expose(Scrape(None, 10, 0, None), "application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")


EXPLAINED = snapshot(
    SECOND,
    [(1, 1, SECOND), (2, 1, 0)],
    thread_wait_ns=[250_000_000, 1_500_000_000],
    wait_ns=1_750_000_000,
    figures=FIGURES,
    machine=MACHINE,
)
"""A snapshot with every figure that explains another."""
REASONS = {
    "vitalsd_process_wait_seconds_total": 1.75,
    "vitalsd_children_cpu_seconds_total": 4.5,
    "vitalsd_process_anonymous_memory_bytes": 50 << 20,
    "vitalsd_process_memory_footprint_bytes": 80 << 20,
    "vitalsd_process_swap_bytes": 3 << 20,
    "vitalsd_process_major_faults_total": 7,
    "vitalsd_process_idle_wakeups_total": 40,
    "vitalsd_process_interrupt_wakeups_total": 50,
    "vitalsd_process_energy_joules_total": 2.5,
    "vitalsd_machine_in_container": 0,
    "vitalsd_machine_cpu_seconds_total": 90,
    "vitalsd_machine_load1": 1.25,
    "vitalsd_machine_memory_available_bytes": 4 << 30,
    "vitalsd_machine_swap_used_bytes": 1 << 30,
    "vitalsd_machine_cpu_pressure_seconds_total": 5,
    "vitalsd_machine_memory_pressure_seconds_total": 6,
    "vitalsd_machine_io_pressure_seconds_total": 7,
    "vitalsd_machine_memory_pressure_level": 1,
    "vitalsd_machine_quota_throttled_seconds_total": 8,
    "vitalsd_machine_thermal_level": 5,
}


def exposed(scraped: Scrape) -> dict[str, list[Sample]]:
    text = expose(scraped, "text/plain;version=0.0.4")[0].decode()
    found: dict[str, list[Sample]] = {}
    for family in parse_text(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_scrape_of_all_figures_has_them_in_base_units() -> None:
    """Seconds, bytes and joules; the wait of each thread; and promtool passes all names and help texts."""
    scraped = Scrape((IDENTITY, EXPLAINED), 10, 0, None)
    found = exposed(scraped)
    assert {name: found[name][0].value for name in REASONS} == REASONS
    waits = {sample.labels["tid"]: sample.value for sample in found["vitalsd_thread_wait_seconds_total"]}
    assert waits == {"1": 0.25, "2": 1.5}
    promtool = program("promtool", package="prometheus")
    text = expose(scraped, "text/plain;version=0.0.4")[0]
    out = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (out.returncode, out.stdout, out.stderr) == (0, b"", b"")


def test_scrape_without_figures_leaves_their_counters_out() -> None:
    """What the platform does not give has no series; none of them is 0."""
    for each in (
        snapshot(SECOND, [(1, 1, SECOND)]),
        snapshot(SECOND, [(1, 1, SECOND)], figures=FIGURES._replace(**dict.fromkeys(FIGURES._fields))),
    ):
        found = exposed(Scrape((IDENTITY, each), 10, 0, None))
        assert not (REASONS.keys() | {"vitalsd_thread_wait_seconds_total"}) & found.keys()
        assert len(found["vitalsd_thread_cpu_seconds_total"]) == 1


def test_scrape_by_another_user_lacks_what_the_kernel_hides() -> None:
    """Descriptors, footprint, wake-ups and energy are for the user of the target."""
    every = exposed(Scrape((IDENTITY, EXPLAINED), 10, 0, None)).keys()
    public = exposed(Scrape((IDENTITY, EXPLAINED), 10, 0, None, private=False)).keys()
    assert every - public == {
        "process_open_fds",
        "vitalsd_process_memory_footprint_bytes",
        "vitalsd_process_idle_wakeups_total",
        "vitalsd_process_interrupt_wakeups_total",
        "vitalsd_process_energy_joules_total",
    }


SIGNALS = SignalsReading(
    [
        HeartbeatStatus("ui", 1, 10**9, "silent", 4_200_000_000, "blocked", "futex"),
        HeartbeatStatus("ui", 0, 10**9, "beating", 100_000_000, None, ""),
        HeartbeatStatus("io", 2, 10**9, "paused", 0, None, ""),
    ],
    {"fps": 58.0, "queue.length": -0.5},
    {("ui", "blocked"): 3, ("closed", "busy"): 1},
)


def test_scrape_of_signals_has_a_series_for_each_name() -> None:
    """Of two heartbeats with one name the longer silence; an open one has all causes; nothing for another user."""
    forms: tuple[Form, ...] = ("text/plain;version=0.0.4", "application/openmetrics-text")
    for form in forms:
        assert b"vitalsd_gauges{name=" in expose(Scrape((IDENTITY, EXPLAINED), 10, 0, None, signals=SIGNALS), form)[0]
    found = exposed(Scrape((IDENTITY, EXPLAINED), 10, 0, None, signals=SIGNALS))
    assert {tuple(each.labels.items()): each.value for each in found["vitalsd_gauges"]} == {
        (("name", "fps"),): 58,
        (("name", "queue.length"),): -0.5,
    }
    silent = {each.labels["name"]: each.value for each in found["vitalsd_heartbeat_silent_seconds"]}
    assert silent == {"ui": 4.2, "io": 0}
    hangs = {(each.labels["name"], each.labels["cause"]): each.value for each in found["vitalsd_hangs_total"]}
    assert {key: count for key, count in hangs.items() if count} == SIGNALS.hang_counts
    assert len(hangs) == 2 * 8 + 1
    names = {"vitalsd_gauges", "vitalsd_heartbeat_silent_seconds", "vitalsd_hangs_total"}
    for other in (
        Scrape((IDENTITY, EXPLAINED), 10, 0, None, private=False, signals=SIGNALS),
        Scrape(None, 10, 0, None, signals=SIGNALS),
        Scrape((IDENTITY, EXPLAINED), 10, 0, None),
    ):
        assert not names & exposed(other).keys()


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_prometheus_rate_agrees_with_cpu_percent(tmp_path: Path, start: Start) -> None:
    """rate(process_cpu_seconds_total) of a real Prometheus is within 2 points of cpu_percent over the same time."""
    prometheus = program("prometheus", package="prometheus")
    target = start("--burn", "35", "--idle", "2")
    with Serving(tmp_path, "--pid", str(target.pid), "--record-interval", "0.25") as serving:
        config = tmp_path / "prometheus.yml"
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms"},
                    "scrape_configs": [
                        {"job_name": "vitalsd", "static_configs": [{"targets": [serving.url.removeprefix("http://")]}]}
                    ],
                }
            )
        )
        url = f"http://127.0.0.1:{free_port()}"
        database = subprocess.Popen(
            [
                prometheus,
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address={url.removeprefix('http://')}",
                "--log.level=error",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=5) as client:

                def query(text: str) -> list[float]:
                    try:
                        answer = client.get("/api/v1/query", params={"query": text}).json()
                    except (httpx.TransportError, ValueError):
                        return []
                    return (
                        [float(series["value"][1]) for series in answer["data"]["result"]] if "data" in answer else []
                    )

                deadline = time.monotonic() + 40
                while not query("count_over_time(process_cpu_seconds_total[30s]) > 16"):
                    assert time.monotonic() < deadline, "Prometheus never had enough samples"
                    time.sleep(0.2)
                (rate,) = query("100 * rate(process_cpu_seconds_total[7s])")
                measured = serving.get("/metrics", mode="trailing", window_ms=7000)["process"]["cpu_percent"]
                assert rate == pytest.approx(measured, abs=2)
                busiest = query('100 * rate(vitalsd_thread_cpu_seconds_total{thread="burn-0"}[7s])')
                assert busiest == [pytest.approx(measured, abs=5)]
                assert query("up") == [1]
        finally:
            database.kill()
            database.wait()
