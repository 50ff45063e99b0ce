"""Pushing over OTLP: a real service, a real HTTP receiver that decodes what arrives."""

import gzip
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from client.test_upload_tls import Authority
from support.misbehaving import Behaviour, Misbehaving, answer, floods, says
from support.sidecars import ask, environment, eventually
from support.snapshots import FIGURES, IDENTITY, MACHINE, SECOND, snapshot
from support.target import Target
from vitalsd.cli import main
from vitalsd.exporters.counters import NO_SIGNALS, SignalsReading
from vitalsd.exporters.otlp import CREDENTIALS, endpoint_of, isolate, metrics_data
from vitalsd.recording.hangs import HeartbeatStatus
from vitalsd.snapshot import Snapshot

pytestmark = pytest.mark.live

Start = Callable[..., Target]

CUMULATIVE = 2  # AggregationTemporality of the protocol

UNITS = {
    "process.cpu.time": "s",
    "process.memory.usage": "By",
    "process.memory.virtual": "By",
    "process.thread.count": "{thread}",
    "process.unix.file_descriptor.count": "{file_descriptor}",
    "process.paging.faults": "{fault}",
    "process.uptime": "s",
    "vitalsd.target.up": "1",
    "vitalsd.cpu.time": "s",
    "vitalsd.snapshots": "{snapshot}",
    "vitalsd.thread.cpu.time": "s",
    "vitalsd.thread.left_out": "{thread}",
}
OWN = {"vitalsd.target.up", "vitalsd.cpu.time", "vitalsd.snapshots"}
COUNTERS = {
    "process.cpu.time",
    "process.paging.faults",
    "vitalsd.cpu.time",
    "vitalsd.snapshots",
    "vitalsd.thread.cpu.time",
}
GAUGES = {"process.uptime", "vitalsd.target.up", "vitalsd.thread.left_out"}
REASONS: dict[str, tuple[str, str, float]] = {
    "vitalsd.process.wait.time": ("s", "counter", 1.75),
    "vitalsd.children.cpu.time": ("s", "counter", 4.5),
    "vitalsd.process.memory.anonymous": ("By", "level", 50 << 20),
    "vitalsd.process.memory.footprint": ("By", "level", 80 << 20),
    "vitalsd.process.memory.swap": ("By", "level", 3 << 20),
    "vitalsd.process.idle_wakeups": ("{wakeup}", "counter", 40),
    "vitalsd.process.interrupt_wakeups": ("{wakeup}", "counter", 50),
    "vitalsd.process.energy": ("J", "counter", 2.5),
    "vitalsd.machine.in_container": ("1", "gauge", 0),
    "vitalsd.machine.cpu.time": ("s", "counter", 90),
    "vitalsd.machine.load_1m": ("1", "gauge", 1.25),
    "vitalsd.machine.memory.available": ("By", "level", 4 << 30),
    "vitalsd.machine.swap.used": ("By", "level", 1 << 30),
    "vitalsd.machine.cpu.pressure.time": ("s", "counter", 5),
    "vitalsd.machine.memory.pressure.time": ("s", "counter", 6),
    "vitalsd.machine.io.pressure.time": ("s", "counter", 7),
    "vitalsd.machine.memory.pressure_level": ("1", "gauge", 1),
    "vitalsd.machine.quota_throttled.time": ("s", "counter", 8),
    "vitalsd.machine.thermal_level": ("1", "gauge", 5),
}
"""Unit, kind and value of what explains other figures; a metric that the platform does not provide is left out."""
SINCE_UNKNOWN = {"vitalsd.process.wait.time"} | {
    name for name, (_, kind, _) in REASONS.items() if name.startswith("vitalsd.machine.") and kind == "counter"
}
"""Counters that did not begin at 0 when the target started."""
SIGNALS = {"vitalsd.gauge", "vitalsd.heartbeat.silent.time", "vitalsd.hangs"}
"""Metrics of heartbeats and gauges; a target without any has none of them."""


class Collector:
    """Takes what is posted to /v1/metrics. `pushes` are the requests as they were decoded."""

    def __init__(self, port: int = 0) -> None:
        self.pushes: list[ExportMetricsServiceRequest] = []
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                collector.raw.append(body)
                self.send_response(200 if self.path == "/v1/metrics" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                collector.pushes.append(ExportMetricsServiceRequest.FromString(body))

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from the next connection on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


class Service:
    """``vitalsd serve`` with `arguments`; `said` is its stderr, line by line, and `url` where it serves."""

    def __init__(self, directory: Path, *arguments: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vitalsd", "serve", "--port", "0", "--log-format", "json", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(directory) | env,
        )
        self.said: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        ready = eventually(lambda: self.lines("serving"), 30)
        self.url = re.findall(r"http://[\d.:]+", ready[0])[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                self.said.append(json.loads(line))

    def lines(self, words: str) -> list[str]:
        return [entry["message"] for entry in list(self.said) if words in entry["message"]]

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


def attributes(found: Any) -> dict[str, Any]:
    values = {}
    for pair in found:
        kind = pair.value.WhichOneof("value")
        values[pair.key] = getattr(pair.value, kind)
    return values


def metrics(push: ExportMetricsServiceRequest) -> dict[str, Any]:
    (resource,) = push.resource_metrics
    (scope,) = resource.scope_metrics
    return {metric.name: metric for metric in scope.metrics}


def values(metric: Any) -> dict[tuple[Any, ...], float]:
    points = getattr(metric, metric.WhichOneof("data")).data_points
    return {
        tuple(sorted(attributes(point.attributes).items())): point.as_double or float(point.as_int) for point in points
    }


def test_otlp_push_has_the_names_and_units_of_the_conventions(
    tmp_path: Path, start: Start, collector: Collector
) -> None:
    """Names, units, kinds and attributes are those of the conventions; rates agree with cpu_percent."""
    target = start("--burn", "35", "--idle", "2")
    target.ask("name " + b"\xff\x1b[2J".hex())
    arguments = ("--pid", str(target.pid), "--record-interval", "0.2", "--otlp", collector.url, "--otlp-interval", "1")
    with Service(tmp_path, *arguments) as service:
        eventually(lambda: len(collector.pushes) >= 4, 40)
        pushes = list(collector.pushes)[-4:]
        answer = ask(service.url, "/metrics?mode=trailing&window_ms=1000")[1]
        table = ask(service.url, "/history?seconds=60&top=0")[1]
        assert service.lines("pushing to") == [f"pushing to {collector.url}/v1/metrics every 1 s"]

        target.kill()
        eventually(lambda: values(metrics(collector.pushes[-1])["vitalsd.target.up"]) == {(): 0}, 15)
        gone = collector.pushes[-1]

    last = metrics(pushes[-1])
    always = {
        name: metric for name, metric in last.items() if name not in REASONS.keys() | {"vitalsd.thread.wait.time"}
    }
    assert {name: metric.unit for name, metric in always.items()} == UNITS
    for name, metric in always.items():
        assert metric.WhichOneof("data") == ("gauge" if name in GAUGES else "sum"), name
        assert metric.description
        if name not in GAUGES:
            assert metric.sum.aggregation_temporality == CUMULATIVE
            assert metric.sum.is_monotonic == (name in COUNTERS), name
    assert set(values(last["process.cpu.time"])) == {(("cpu.mode", "system"),), (("cpu.mode", "user"),)}
    assert set(values(last["process.paging.faults"])) == {
        (("system.paging.fault.type", "major"),),
        (("system.paging.fault.type", "minor"),),
    }
    threads = {
        dict(key)["vitalsd.thread.id"]: dict(key)["thread.name"] for key in values(last["vitalsd.thread.cpu.time"])
    }
    assert set(threads) == set(target.tids.values())
    assert threads[target.tids["burn-0"]] == "burn-0"
    assert all(name.isprintable() for name in threads.values())
    assert values(last["process.thread.count"]) == {(): 4}
    process = answer["process"]
    assert values(last["process.memory.usage"])[()] == pytest.approx(process["rss_kb"] * 1024, rel=0.2)
    assert values(last["process.uptime"])[()] == pytest.approx(process["uptime_secs"], abs=3)

    for before, after in pairwise(pushes):
        for name in COUNTERS:
            old, new = values(metrics(before)[name]), values(metrics(after)[name])
            assert all(new[key] >= value for key, value in old.items()), name

    def cpu(push: ExportMetricsServiceRequest) -> tuple[float, float]:
        metric = metrics(push)["process.cpu.time"]
        return metric.sum.data_points[0].time_unix_nano / 1e9, sum(values(metric).values())

    (t0, cpu0), (t1, cpu1) = cpu(pushes[0]), cpu(pushes[-1])
    rows = [
        (percent, elapsed_ms)
        for at_ms, percent, elapsed_ms in zip(table["time_ms"], table["cpu_percent"], table["elapsed_ms"], strict=True)
        if t0 < at_ms / 1000 <= t1
    ]
    recorded = sum(percent * elapsed_ms for percent, elapsed_ms in rows) / sum(elapsed_ms for _, elapsed_ms in rows)
    assert 100 * (cpu1 - cpu0) / (t1 - t0) == pytest.approx(recorded, abs=2)

    started = {point.start_time_unix_nano for point in last["process.cpu.time"].sum.data_points}
    assert len(started) == 1
    assert started.pop() / 1e9 == pytest.approx(time.time(), abs=60)
    resource = attributes(pushes[-1].resource_metrics[0].resource.attributes)
    assert set(resource) == {
        "service.name",
        "service.instance.id",
        "host.id",
        "host.arch",
        "os.type",
        "os.version",
        "process.pid",
        "process.creation.time",
        "process.executable.name",
    }
    assert resource["process.pid"] == target.pid
    assert resource["service.name"] == resource["process.executable.name"]
    assert all(resource == attributes(push.resource_metrics[0].resource.attributes) for push in pushes)
    assert socket.gethostname() not in resource.values()
    assert set(metrics(gone)) == OWN
    assert "process.pid" not in attributes(gone.resource_metrics[0].resource.attributes)


def pushed(target: Snapshot, signals: SignalsReading = NO_SIGNALS) -> ExportMetricsServiceRequest:
    """Return what is sent for a snapshot, encoded and decoded."""
    data = metrics_data((IDENTITY, target), threads=10, snapshots_taken=1, since_ns=7, signals=signals)
    body: bytes = encode_metrics(data).SerializeToString()
    request = ExportMetricsServiceRequest()
    request.ParseFromString(body)
    return request


def test_otlp_push_of_all_figures_has_units_kinds_and_starts() -> None:
    """Each figure with its unit and kind; a counter that began before the target or after it has no start."""
    every = snapshot(
        SECOND,
        [(1, 1, SECOND), (2, 1, 0)],
        thread_wait_ns=[250_000_000, 1_500_000_000],
        wait_ns=1_750_000_000,
        figures=FIGURES,
        machine=MACHINE,
    )
    found = metrics(pushed(every))
    assert found.keys() == UNITS.keys() | REASONS.keys() | {"vitalsd.thread.wait.time"}
    for name, (unit, kind, value) in REASONS.items():
        metric = found[name]
        assert (metric.unit, values(metric)) == (unit, {(): value}), name
        assert metric.description
        if kind == "gauge":
            assert metric.WhichOneof("data") == "gauge", name
        else:
            assert metric.sum.is_monotonic == (kind == "counter"), name
            (point,) = metric.sum.data_points
            assert point.start_time_unix_nano == (0 if name in SINCE_UNKNOWN else IDENTITY.started_unix_ns), name
    waits = {
        dict(key)["vitalsd.thread.id"]: wait_s for key, wait_s in values(found["vitalsd.thread.wait.time"]).items()
    }
    assert waits == {1: 0.25, 2: 1.5}


def test_otlp_push_of_signals_has_a_point_for_each_name() -> None:
    """Gauges and silences are gauges; hangs are counted since the sidecar started."""
    beats = [HeartbeatStatus("ui", 1, 10**9, "silent", 4_200_000_000, "blocked", "futex")]
    signals = SignalsReading(beats, {"fps": 58.0}, {("ui", "blocked"): 3})
    found = metrics(pushed(snapshot(SECOND, [(1, 1, SECOND)]), signals))
    gauge, silent, hangs = (found[f"vitalsd.{name}"] for name in ("gauge", "heartbeat.silent.time", "hangs"))
    assert (gauge.unit, gauge.WhichOneof("data"), values(gauge)) == ("1", "gauge", {(("name", "fps"),): 58.0})
    assert (silent.unit, silent.WhichOneof("data"), values(silent)) == ("s", "gauge", {(("name", "ui"),): 4.2})
    assert (hangs.unit, hangs.sum.is_monotonic) == ("{hang}", True)
    assert {point.start_time_unix_nano for point in hangs.sum.data_points} == {7}
    counts = {dict(key)["cause"]: count for key, count in values(hangs).items() if dict(key)["name"] == "ui"}
    assert (len(counts), sum(counts.values()), counts["blocked"]) == (8, 3, 3)
    assert not SIGNALS & metrics(pushed(snapshot(SECOND, [(1, 1, SECOND)]))).keys()


def test_otlp_push_without_figures_leaves_them_out() -> None:
    """What the platform does not give is no metric."""
    found = metrics(pushed(snapshot(SECOND, [(1, 1, SECOND)])))
    assert not (REASONS.keys() | {"vitalsd.thread.wait.time"}) & found.keys()
    assert values(found["vitalsd.thread.cpu.time"])


def test_otlp_collector_down_is_logged_once_and_retried(tmp_path: Path) -> None:
    """While it is down the service answers and says so once; when it is back it is sent to again; SIGTERM is obeyed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with Service(tmp_path, "--otlp", url, "--otlp-interval", "1", "--record-interval", "0.1") as service:
        eventually(lambda: service.lines("cannot push metrics"), 20)
        assert "Connection refused" in service.lines("cannot push metrics")[0]
        begun = time.monotonic()
        before = ask(service.url, "/info")[1]["recorder"]["snapshots"]
        eventually(lambda: ask(service.url, "/info")[1]["recorder"]["snapshots"] > before + 20, 20)
        assert time.monotonic() - begun < 15
        found = Collector(port)
        try:
            eventually(lambda: found.pushes, 20)
            eventually(lambda: service.lines("takes metrics again"), 10)
        finally:
            found.close()
        assert len(service.lines("cannot push metrics")) == 1
        assert len(service.said) == 4  # pushing, serving, down, back
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(10) == 0


def test_otlp_collector_hung_delays_neither_answers_nor_exit(tmp_path: Path) -> None:
    """One that accepts and never answers delays neither the answers to other clients nor the end by SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Service(tmp_path, "--otlp", url, "--otlp-interval", "30") as service:
            connection, _ = silent.accept()
            with connection:
                assert ask(service.url, "/metrics?window_ms=50")[0] == 200
                begun = time.monotonic()
                service.process.send_signal(signal.SIGTERM)
                assert service.process.wait(10) == 0
                assert time.monotonic() - begun < 5


def peak_kb(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


BOMB = gzip.compress(gzip.compress(bytes(256 << 20)))  # 256 MiB in 1 KiB, and once more
HOSTILE_ANSWERS: dict[str, Behaviour] = {
    "endless": floods(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 20)),
    "endless error": floods(b"HTTP/1.1 400 No\r\n\r\n", bytes(1 << 20)),
    "compressed": says(
        b"HTTP/1.1 400 No\r\nContent-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(BOMB), BOMB)
    ),
    "compressed though empty": says(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: 0\r\n\r\n%b" % BOMB
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
@pytest.mark.parametrize("case", HOSTILE_ANSWERS)
def test_answer_of_a_hostile_collector_takes_no_memory(tmp_path: Path, case: str) -> None:
    """The exporter uses only the status of an answer, and neither reads nor unpacks its body."""
    with (
        Misbehaving(HOSTILE_ANSWERS[case]) as server,
        Service(tmp_path, "--otlp", server.url, "--otlp-interval", "1") as service,
    ):
        eventually(lambda: len(server.requests) >= 3, 30)
        assert ask(service.url, "/healthz")[0] == 200
        assert peak_kb(service.process.pid) < 150_000
    assert b"accept-encoding: identity\r\n" in server.requests[0].lower()


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Go", "308 Go", "304 Not Modified", "503 No"])
def test_collector_that_redirects_or_fails_is_reported_once(tmp_path: Path, status: str) -> None:
    """A redirect is not followed, and is a failure like any other: nothing has arrived."""
    elsewhere = Collector()
    reply = answer(b"", status=status, extra=f"Location: {elsewhere.url}/v1/metrics\r\n")
    try:
        with (
            Misbehaving(says(reply)) as server,
            Service(tmp_path, "--otlp", server.url, "--otlp-interval", "5") as service,  # the time limit of a push, too
        ):
            (line,) = eventually(lambda: service.lines("cannot push metrics"), 30)
            assert f"it answers {status[:3]}" in line
            assert ("redirects are not followed" in line) == (status[0] == "3")
    finally:
        elsewhere.close()
    assert elsewhere.pushes == []


def test_cookies_and_phrases_of_a_collector_are_not_kept(tmp_path: Path) -> None:
    """A Collector that sets a cookie with each answer gets none back; its reason phrase is escaped and cut."""
    reply = answer(b"", status="400 \x1b[31m" + "A" * 50_000, extra="Set-Cookie: a=" + "b" * 4000 + "; Path=/\r\n")
    with (
        Misbehaving(says(reply)) as server,
        Service(tmp_path, "--otlp", server.url, "--otlp-interval", "1") as service,
    ):
        eventually(lambda: len(server.requests) >= 3, 30)
        (line,) = service.lines("cannot push metrics")
    assert len(line) < 1000
    assert "\x1b" not in line
    assert not any(b"cookie" in request.lower() for request in server.requests)


def test_keys_of_a_connection_to_a_collector_are_not_logged(tmp_path: Path, collector: Collector) -> None:
    """SSLKEYLOGFILE of the environment is ignored, and named as ignored."""
    keys = tmp_path / "keys"
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.server("collector", "IP:127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    collector.wrap(context)
    env = {"SSLKEYLOGFILE": str(keys), "OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority.file)}
    with Service(tmp_path, "--otlp", f"https://127.0.0.1:{collector.port}", **env) as service:
        eventually(lambda: collector.pushes, 20)
        (note,) = service.lines("ignored")
        assert "SSLKEYLOGFILE" in note
    assert not keys.exists()


def test_otlp_environment_sets_credentials_only(tmp_path: Path, collector: Collector) -> None:
    """Of the OTEL_ variables only headers and certificates have an effect; the others are named, proxies too."""
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_RESOURCE_ATTRIBUTES": "enduser.id=anna",
        "OTEL_SERVICE_NAME": "other",
        "OTEL_SDK_DISABLED": "true",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "deflate",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=secret",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    with Service(tmp_path, "--otlp", f"{collector.url}/", **env) as service:
        eventually(lambda: collector.pushes, 20)
        (note,) = service.lines("ignored")
        assert "OTEL_RESOURCE_ATTRIBUTES" in note
        assert "HEADERS" not in note
        assert not any("secret" in entry["message"] for entry in service.said)
    assert collector.headers[0]["x-key"] == "secret"
    assert collector.headers[0]["content-encoding"] == "gzip"
    assert b"anna" not in collector.raw[0]
    resource = attributes(collector.pushes[0].resource_metrics[0].resource.attributes)
    assert resource["service.name"] != "other"
    assert metrics(collector.pushes[0])["process.cpu.time"].sum.aggregation_temporality == CUMULATIVE


def test_otlp_without_its_option_sends_and_loads_nothing(tmp_path: Path, collector: Collector) -> None:
    """Without --otlp no variable of the environment makes it send anything, or load what sends."""
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_METRICS_EXPORTER": "otlp",
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
    }
    with Service(tmp_path, **env) as service:
        assert ask(service.url, "/metrics?window_ms=500")[0] == 200
        if sys.platform == "linux":
            maps = Path(f"/proc/{service.process.pid}/maps").read_text(encoding="utf-8")
            assert "google/_upb" not in maps  # protobuf's extension module
    assert collector.pushes == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--otlp", "ftp://127.0.0.1"], "is not the URL of a Collector"),
        (["--otlp", "http://user:secret@127.0.0.1"], "is not the URL of a Collector"),
        (["--otlp", "localhost:4318"], "is not the URL of a Collector"),
        (["--otlp", "http://127.0.0.1:99999"], "is not the URL of a Collector"),
        (["--otlp", "--otlp-interval", "0.1"], "--otlp-interval"),
    ],
)
def test_otlp_with_wrong_options_exits_with_2(arguments: list[str], said: str) -> None:
    """A URL that cannot be used is wrong usage, with one line."""
    out = CliRunner().invoke(main, ["serve", "--port", "0", *arguments])
    assert out.exit_code == 2
    assert said in out.stderr.splitlines()[-1]


def test_otlp_without_the_extra_exits_with_2_and_the_remedy(tmp_path: Path) -> None:
    """Without the packages, --otlp is one clear line and status 2, and serving without it works."""
    code = "import sys; sys.modules['opentelemetry.exporter'] = None; from vitalsd.cli import main; main(sys.argv[1:])"
    out = subprocess.run(
        [sys.executable, "-c", code, "serve", "--port", "0", "--otlp"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=30,
    )
    assert (out.returncode, out.stdout) == (2, "")
    (line,) = out.stderr.splitlines()
    assert line.startswith("vitalsd: --otlp needs more: pip install 'vitalsd[otlp]'")


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/metrics"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/metrics"),
        ("https://otlp.example.org/otlp", "https://otlp.example.org/otlp/v1/metrics"),
        ("http://[::1]:4318/v1/metrics", "http://[::1]:4318/v1/metrics"),
    ],
)
def test_otlp_endpoint_has_the_metrics_path(url: str, endpoint: str) -> None:
    """The URL is that of the Collector; its path for metrics is added unless it is there."""
    assert endpoint_of(url) == endpoint


def test_otlp_removes_all_variables_but_credentials() -> None:
    """Every OTEL_ variable but those that hold credentials, and no other."""
    environ = {"PATH": "/bin", "OTEL_SERVICE_NAME": "x", "OTEL_ANYTHING": "y", **dict.fromkeys(CREDENTIALS, "z")}
    environ["SSLKEYLOGFILE"] = "/keys"
    assert isolate(environ) == ["OTEL_ANYTHING", "OTEL_SERVICE_NAME", "SSLKEYLOGFILE"]
    assert environ == {"PATH": "/bin", **dict.fromkeys(CREDENTIALS, "z")}


def test_otlp_in_a_host_with_telemetry_adds_nothing_to_it(tmp_path: Path) -> None:
    """A host's own tracing and metrics do not fill up with the requests of its sidecar."""
    code = """
import http.client, sys, vitalsd
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
tracing = TracerProvider()
tracing.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(tracing)
metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
with vitalsd.start() as sidecar:
    for path in ("/metrics?window_ms=10", "/metrics?window_ms=1"):
        connection = http.client.HTTPConnection(sidecar.url.removeprefix("http://"))
        connection.request("GET", path)
        print(connection.getresponse().status)
        connection.close()
print(len(spans.get_finished_spans()), reader.get_metrics_data())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(tmp_path))
    assert out.stdout.split() == ["200", "422", "0", "None"], out
