"""The service on a real socket: a `vitalsd serve` process and an ordinary HTTP client."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.paths import SUPPORT
from support.serving import Serving
from support.target import Target
from vitalsd.contract.metrics import FullMetrics, Measured, Unavailable, parse_runtime_metrics

pytestmark = pytest.mark.live

Start = Callable[..., Target]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for the tests that leave it as it was; it samples itself and records nothing."""
    with Serving(tmp_path_factory.mktemp("state"), "--record-interval", "0") as serving:
        yield serving


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The body of a refusal, which has one shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 1024
    body: dict[str, Any] = answer.json()
    assert set(body) - {"parameter"} == {"title", "status", "reason", "detail"}
    assert body["status"] == status
    return body


def unavailable(answer: httpx.Response, status: int) -> str:
    """The reason of an answer that has no numbers."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < 1024
    parsed = parse_runtime_metrics(answer.content)
    assert isinstance(parsed, Unavailable)
    return parsed.reason


def connect(serving: Serving) -> socket.socket:
    url = serving.client.base_url
    return socket.create_connection((url.host, url.port or 80), timeout=20)


def request(serving: Serving, path: str) -> bytes:
    host = serving.url.removeprefix("http://")
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


# Answers


def test_stream_asks_proxies_not_to_buffer_it(served: Serving) -> None:
    """The answers to GET and to HEAD have the header of nginx."""
    query = {"interval_ms": 100}
    with served.client.stream("GET", "/stream", params=query) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
    assert served.client.head("/stream", params=query).headers["x-accel-buffering"] == "no"


def test_metrics_without_a_target_measure_the_service(served: Serving) -> None:
    """Without a target the answer is about the service: its threads, its memory, over the measured time."""
    answer = served.client.get("/metrics", params={"window_ms": 100})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers
    metrics = parse_runtime_metrics(answer.content)
    assert type(metrics) is Measured
    assert 95 <= metrics.sample_window_ms < 10_000
    oracle = psutil.Process(served.process.pid)
    assert {thread.tid for thread in metrics.threads} == {thread.id for thread in oracle.threads()}
    assert metrics.process.rss_kb == pytest.approx(oracle.memory_info().rss / 1024, rel=0.1)
    assert metrics.process.uptime_secs == pytest.approx(time.time() - oracle.create_time(), abs=1.5)


def test_metrics_with_pid_measure_that_process(served: Serving, start: Start) -> None:
    """pid= chooses another process; its busy thread has its name, and the CPU accounting balances."""
    target = start("--burn", "30", "--idle", "3")
    full = parse_runtime_metrics(
        served.client.get("/metrics", params={"pid": target.pid, "window_ms": 300, "detail": "full"}).content
    )
    assert isinstance(full, FullMetrics)
    assert full.target.pid == target.pid
    assert {thread.name: thread.tid for thread in full.threads if thread.tid != target.pid} == {
        name: tid for name, tid in target.tids.items() if name != "main"
    }
    assert full.process.thread_count == 5
    assert max(full.threads, key=lambda thread: thread.cpu_percent or 0).name == "burn-0"
    books = full.accounting
    assert books.process_percent == pytest.approx(
        books.living_percent + books.exited_percent + books.unattributed_percent, abs=0.002
    )
    assert full.window.requested_ms == 300


def test_metrics_cpu_accounting_balances_during_thread_churn(served: Serving, start: Start) -> None:
    """While hundreds of threads start and end, process = living + exited + unattributed in every answer."""
    target = start("--idle", "2")
    target.tell("churn_for 1.5 300")
    exited = []
    for _ in range(5):
        answer = served.client.get("/metrics", params={"pid": target.pid, "window_ms": 200, "detail": "full"})
        books = answer.json()["accounting"]
        assert books["process_percent"] == pytest.approx(
            books["living_percent"] + books["exited_percent"] + books["unattributed_percent"], abs=0.002
        )
        exited.append(books["exited_percent"])
    assert target.read() > 100
    assert max(exited) > 0


def test_metrics_sort_and_limit_return_the_busiest_threads(served: Serving, start: Start) -> None:
    """The busiest thread comes first and the list is cut where asked."""
    target = start("--idle", "5", "--burn", "30")
    ask = {"pid": target.pid, "window_ms": 100, "sort": "cpu", "limit": 2}
    threads = served.get("/metrics", **ask)["threads"]
    assert [len(threads), threads[0]["name"]] == [2, "burn-0"]
    names = [thread["name"] for thread in served.get("/metrics", pid=target.pid, window_ms=20, sort="name")["threads"]]
    assert names == sorted(names)
    assert served.get("/metrics", pid=target.pid, window_ms=20, limit=0)["threads"] == []


def test_processes_lists_own_processes_with_the_figures_of_psutil(served: Serving, start: Start) -> None:
    """A process of ours is on the list under its name, with the figures psutil has."""
    target = start("--idle", "2")
    listed = {process["pid"]: process for process in served.get("/processes")}
    assert list(listed) == sorted(listed)
    entry = listed[target.pid]
    assert list(entry) == ["pid", "name", "started_at", "cpu_time_secs", "rss_kb", "thread_count"]
    assert entry["thread_count"] == 3
    assert entry["name"] == psutil.Process(target.pid).name()[:15]


def test_healthz_info_and_schema_describe_the_service(served: Serving) -> None:
    """Liveness is one word; info tells version, target and own cost; the schema names every route's model."""
    assert served.get("/healthz") == {"status": "ok"}
    info = served.get("/info")
    assert info["target"]["pid"] == info["self"]["pid"] == served.process.pid
    assert info["platform"] in ("linux", "macos")
    assert info["self"]["cpu_secs"] > 0
    schema = served.get("/openapi.json")
    assert {"/metrics", "/processes", "/healthz", "/info"} <= set(schema["paths"])
    window = next(p for p in schema["paths"]["/metrics"]["get"]["parameters"] if p["name"] == "window_ms")
    assert (window["schema"]["minimum"], window["schema"]["maximum"]) == (10, 60_000)
    assert {"403", "404", "410", "422", "501", "503"} <= set(schema["paths"]["/metrics"]["get"]["responses"])


# Refusals

BAD_WINDOWS = [
    "0",
    "-1",
    "9",
    "60001",
    "1e12",
    "1000000000000",
    "1e3",
    "NaN",
    "inf",
    "1_000",
    "+5",
    "5.0",
    " 50",
    "50 ",
    "50\n",
    "\u0663\u0663",
    "\uff15\uff10",
    "0x32",
    "50,50",
    "true",
    "",
    "9" * 2_000,
]


@pytest.mark.parametrize("value", BAD_WINDOWS, ids=lambda value: ascii(value[:8]))
def test_window_ms_not_a_decimal_in_range_is_422(served: Serving, value: str) -> None:
    """A window is ASCII digits from 10 to 60000; anything else is refused by name."""
    body = problem(served.client.get("/metrics", params={"window_ms": value}), 422)
    assert (body["reason"], body["parameter"]) == ("bad_parameter", "window_ms")


@pytest.mark.parametrize("query", ["window_ms=10", "window_ms=000050", "window_ms=%35%30"])
def test_window_ms_minimum_zero_padded_or_percent_encoded_is_accepted(served: Serving, query: str) -> None:
    """The least window, leading zeros and percent-encoded digits are numbers like others."""
    assert served.client.get(f"/metrics?{query}").status_code == 200


def test_window_ms_maximum_is_accepted(served: Serving) -> None:
    """60000 is not refused: the answer is still being measured when the client gives up."""
    with pytest.raises(httpx.ReadTimeout):
        served.client.get("/metrics?window_ms=60000", timeout=0.3)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("window_ms", "window_ms"),
        ("window_ms=", "window_ms"),
        ("window_ms=50%0a", "window_ms"),
        ("window_ms=50%00", "window_ms"),
        ("window_ms[]=50", "window_ms[]"),
        ("Window_ms=50", "Window_ms"),
        ("WINDOW_MS=50", "WINDOW_MS"),
        ("windw_ms=50", "windw_ms"),
        ("window_ms=50&window_ms=50", "window_ms"),
        ("window_ms=50&window_ms=60", "window_ms"),
        ("window_ms=50&extra=1", "extra"),
        ("extra", "extra"),
        ("=5", ""),
        ("detail=FULL", "detail"),
        ("detail=", "detail"),
        ("sort=pid", "sort"),
        ("mode=now", "mode"),
        ("limit=-1", "limit"),
        ("limit=", "limit"),
        ("limit=20001", "limit"),
        ("limit=1.5", "limit"),
        ("pid=0", "pid"),
        ("pid=-1", "pid"),
        ("pid=", "pid"),
        ("pid=2147483648", "pid"),
        ("pid=self", "pid"),
        ("pid=99999999999999999999", "pid"),
    ],
)
def test_parameters_unknown_duplicate_or_out_of_range_are_422(served: Serving, query: str, parameter: str) -> None:
    """Unknown, duplicate, empty, misspelt and out-of-range parameters are refused, and the refusal names them."""
    body = problem(served.client.get(f"/metrics?{query}"), 422)
    assert (body["reason"], body["parameter"]) == ("bad_parameter", parameter)


@pytest.mark.parametrize("route", ["/processes", "/healthz", "/info"])
def test_routes_without_parameters_refuse_any(served: Serving, route: str) -> None:
    """A parameter of a route without parameters is refused by its name."""
    assert problem(served.client.get(f"{route}?pid=1"), 422)["parameter"] == "pid"


def test_query_of_a_thousand_parameters_does_not_block_the_loop(served: Serving) -> None:
    """A query of many names is refused at the cost of one, and the loop continues to answer."""
    query = "&".join(f"{i:x}" for i in range(500))
    begun = time.monotonic()
    problem(served.client.get(f"/metrics?{query}"), 422)
    hostile = time.monotonic() - begun
    begun = time.monotonic()
    problem(served.client.get("/metrics?x"), 422)
    assert hostile < 0.05 + 50 * (time.monotonic() - begun)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["window_ms", "pid", "limit", "sort", "detail", "mode"]) | st.text(max_size=20),
    value=st.text(max_size=40),
)
def test_query_of_any_content_is_never_a_500(served: Serving, name: str, value: str) -> None:
    """For any query the answer is a result or a refusal under 1 KiB, never a 500."""
    query = str(httpx.QueryParams([(name, value)]))
    valid_window = name == "window_ms" and value.isascii() and value.isdecimal() and 10 <= int(value) <= 60_000
    if valid_window:
        return
    answer = served.client.get(f"/metrics?{query}&window_ms=10" if name != "window_ms" else f"/metrics?{query}")
    assert answer.status_code in (200, 403, 404, 422), answer.text
    if answer.status_code == 422:
        problem(answer, 422)


@pytest.mark.parametrize("path", ["/metric", "/metrics/", "/METRICS", "/metrics%00", "/\u202e", "/" + "a" * 2000])
def test_unknown_path_is_404_and_lists_the_routes(served: Serving, path: str) -> None:
    """An unknown path is a short 404 that lists the known ones, never a redirect."""
    body = problem(served.client.get(path), 404)
    assert body["reason"] == "no_such_route"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_unknown_method_is_405_and_lists_the_allowed_ones(served: Serving, method: str) -> None:
    """Another method is refused with the ones that are allowed."""
    answer = served.client.request(method, "/metrics")
    assert problem(answer, 405)["reason"] == "method_not_allowed"
    assert "GET" in answer.headers["allow"]


# Targets that fail


def test_pid_without_a_process_is_404(served: Serving) -> None:
    """A request for a process that does not exist is 404."""
    assert unavailable(served.client.get("/metrics?pid=2147483647&window_ms=10"), 404) == (
        "no process has pid 2147483647"
    )


def test_target_killed_in_mid_window_is_410(served: Serving, start: Start) -> None:
    """At whatever moment the target is killed, the answer is 410 with the reason."""
    for delay in (0.02, 0.1, 0.2):
        for longer in (1, 5, 20):
            target = start("--idle", "3")
            query = {"pid": target.pid, "window_ms": 10}
            assert served.client.get("/metrics", params=query).status_code == 200  # from now on the target is open
            killer = threading.Timer(delay * longer, target.kill)
            killer.start()
            answer = served.client.get("/metrics", params=query | {"window_ms": 400 * longer})
            killer.join()
            if answer.status_code != 404:  # killed and forgotten before the request was there
                break
        # For a moment it is a zombie, and the reason says so.
        assert unavailable(answer, 410).startswith(f"target {target.pid} has exited")


def test_default_target_after_its_exit_stays_410(tmp_path: Path, start: Start) -> None:
    """After the exit of the process that --pid named, each answer is 410, also without an earlier request."""
    target = start()
    with Serving(tmp_path, "--pid", str(target.pid), "--record-interval", "0") as serving:
        target.kill()
        for _ in range(2):
            assert unavailable(serving.client.get("/metrics?window_ms=10"), 410) == f"target {target.pid} has exited"
        assert serving.get("/healthz") == {"status": "ok"}


def test_zombie_target_is_410(served: Serving, start: Start) -> None:
    """A target that has ended and waits for its parent is gone."""
    target = start()
    target.process.kill()
    while psutil.Process(target.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert "zombie" in unavailable(served.client.get(f"/metrics?window_ms=10&pid={target.pid}"), 410)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to mount /proc and act as another user"
)
@pytest.mark.parametrize("hidepid", [1, 2])
def test_process_hidden_by_hidepid_is_403(start: Start, tmp_path: Path, hidepid: int) -> None:
    """Another user's process on a /proc with hidepid is forbidden, and never a server error."""
    target = start()
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    stranger = str(SUPPORT / "stranger.py")
    with Serving(home, "--no-black-box", python=(sys.executable, stranger, str(hidepid))) as serving:
        assert "hide" in unavailable(serving.client.get("/metrics", params={"window_ms": 10, "pid": target.pid}), 403)
        assert serving.get("/metrics", window_ms=10)["platform"] == "linux"


# Many at once


@pytest.mark.parametrize("window_ms", [100, 1000])
def test_window_of_200_callers_takes_few_snapshots(served: Serving, window_ms: int) -> None:
    """Clients that request the same window at once share it: all get 200, and few snapshots are taken."""
    before = served.get("/info")["self"]["snapshots"]
    with ExitStack() as stack:
        # Plain sockets that are connected before: a slow client would spread the questions over a second.
        callers = [stack.enter_context(connect(served)) for _ in range(200)]
        for caller in callers:
            caller.sendall(request(served, f"/metrics?window_ms={window_ms}"))
        answers = [read_all(caller) for caller in callers]
    assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200"}
    # 400 without sharing; room for a machine that takes long over the first answers.
    assert served.get("/info")["self"]["snapshots"] - before <= 40


def test_event_loop_answers_while_windows_are_open(served: Serving) -> None:
    """A long window holds up no other question."""
    waiting = threading.Thread(target=served.get, args=("/metrics",), kwargs={"window_ms": 1500})
    waiting.start()
    begun = time.monotonic()
    served.get("/healthz")
    assert time.monotonic() - begun < 1.4
    waiting.join()


def test_answer_arrives_soon_after_its_window(served: Serving, start: Start) -> None:
    """The answer is there within a small part of its window, in the median of ten; see benchmarks/ for the figure."""
    target = start("--idle", "49")
    late = []
    for _ in range(10):
        begun = time.monotonic()
        served.get("/metrics", pid=target.pid, window_ms=200)
        late.append(time.monotonic() - begun - 0.2)
    assert statistics.median(late) < 0.2


# Beginning and end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_sigterm_and_sigint_exit_with_status_0(tmp_path: Path, number: int) -> None:
    """SIGTERM and Ctrl-C end the service with status 0 and nothing more in the log."""
    with Serving(tmp_path, "--record-interval", "0") as serving:
        serving.get("/metrics", window_ms=10)
        assert serving.stop(number) == 0
        assert serving.process.stderr is not None
        assert serving.process.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_open_window_at_shutdown_is_503_with_the_reason(tmp_path: Path, number: int) -> None:
    """A client that waits for a long window when the service ends gets the reason, and the log no traceback."""
    with Serving(tmp_path, "--record-interval", "0") as serving, connect(serving) as waiting:
        waiting.sendall(request(serving, "/metrics?window_ms=60000"))
        time.sleep(0.3)
        begun = time.monotonic()
        assert serving.stop(number) == 0
        # Three seconds are promised; a busy machine gets as many again.
        assert time.monotonic() - begun < 6
        head, _, body = read_all(waiting).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body)["reason"] == "stopping"
        assert serving.process.stderr is not None
        assert "Traceback" not in serving.process.stderr.read()


def test_serve_second_signal_exits_at_once(tmp_path: Path) -> None:
    """A second Ctrl-C ends the service without a wait for open windows."""
    with Serving(tmp_path, "--record-interval", "0") as serving, connect(serving) as waiting:
        waiting.sendall(request(serving, "/metrics?window_ms=60000"))
        time.sleep(0.3)
        serving.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert serving.stop(signal.SIGINT) in (0, -signal.SIGINT)


def test_two_servers_measure_each_other(tmp_path: Path) -> None:
    """Each has its own port and target, and each may sample the other."""
    with (
        Serving(tmp_path, "--record-interval", "0") as one,
        Serving(tmp_path, "--record-interval", "0") as two,
    ):
        assert one.url != two.url
        full = one.get("/metrics", window_ms=50, detail="full", pid=two.process.pid)
        assert full["target"]["pid"] == two.process.pid


def test_non_http_client_is_closed_without_effect_on_others(served: Serving) -> None:
    """Garbage on the socket ends that connection and nothing else."""
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\0" * 5000, b"GET /metrics HTTP/1.1\r\n\r\n"):
        with connect(served) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
    assert served.get("/healthz") == {"status": "ok"}


def test_connections_that_exhaust_descriptors_are_logged_and_served_again(tmp_path: Path) -> None:
    """While connections use all descriptors, one line a second is logged; after they close, requests are served."""
    code = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (32, 32)); import vitalsd.cli as c; c.main()"
    with Serving(tmp_path, "--no-black-box", python=(sys.executable, "-c", code)) as serving:
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(connect(serving))
            time.sleep(1.5)
        for _ in range(100):
            with suppress(httpx.TransportError):
                if serving.client.get("/metrics?window_ms=10").status_code == 200:
                    break
            time.sleep(0.1)
        else:
            pytest.fail("it never answered again")
        assert serving.stop() == 0
        assert serving.process.stderr is not None
        log = serving.process.stderr.read()
    assert "out of file descriptors" in log
    assert log.count("\n") < 20


def test_target_of_100_threads_with_32_descriptors_is_measured(tmp_path: Path, start: Start) -> None:
    """Under RLIMIT_NOFILE=32 a target of 100 threads is still measured whole."""
    target = start("--idle", "99")
    code = "import resource as r, sys; r.setrlimit(r.RLIMIT_NOFILE, (32, 32)); import vitalsd.cli as c; c.main()"
    out = subprocess.run(
        [sys.executable, "-c", code, "sample", "--pid", str(target.pid), "--window-ms", "50"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert out.returncode == 0, out.stderr
    assert len(json.loads(out.stdout)["threads"]) == 100
