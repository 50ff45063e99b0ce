"""Ask a sidecar: `vitalsd_client.fetch_metrics`, `places` and `marks`, against real and misbehaving ones."""

import ast
import asyncio
import hmac
import itertools
import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import vitalsd
from support.misbehaving import FAULTS, METRICS, Behaviour, Misbehaving, answer, says
from support.paths import ROOT
from support.sidecars import ask, eventually, serving
from support.stopwatch import Stopwatch
from vitalsd.contract.metrics import FullMetrics, Measured, RuntimeMetrics, Unavailable
from vitalsd.discovery import runtime_file as endpoints
from vitalsd.discovery.directories import private_directory
from vitalsd.discovery.runtime_file import Endpoint, ProcessRun, proof
from vitalsd.sources.platform import process_identities
from vitalsd_client import BugReport, afetch, fetch, mark
from vitalsd_client.fetch_metrics import BUDGET_S


@pytest.fixture
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directories of a user without a sidecar."""
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("VITALSD_STATE_DIR", str(short_path / "state"))
    return short_path


def me(**changes: Any) -> Endpoint:
    """A runtime file that this living process might have written."""
    kernel = process_identities()
    mine = ProcessRun(os.getpid(), kernel.start_key(os.getpid()) or 0)
    plain = Endpoint(
        version="0",
        pid=mine.pid,
        start=mine.start,
        boot_id=kernel.boot_id(),
        host_scope=kernel.host_scope(),
        uid=os.geteuid(),
        target=mine,
        socket=None,
        host=None,
        port=None,
        token=None,
        started_at=endpoints.now(),
    )
    return replace(plain, **changes)


def publish(home: Path, **changes: Any) -> Path:
    return endpoints.publish(me(**changes), private_directory(home / "run"))


def timed(call: Callable[[], RuntimeMetrics], window_ms: int) -> RuntimeMetrics:
    """Its answer, which must come within the window and 2 s."""
    watch = Stopwatch()
    found = call()
    assert watch.elapsed_s < watch.allowed_s(window_ms / 1000 + 2)
    return found


def reason(found: RuntimeMetrics) -> str:
    assert isinstance(found, Unavailable), found
    return found.reason


# A sidecar that is well


@pytest.mark.parametrize("tcp", [True, False])
def test_fetch_finds_the_sidecar_of_this_process(home: Path, tcp: bool) -> None:
    """Over the Unix socket, or over TCP with a token if the socket is gone: numbers of this very process."""
    options = ["--pid", str(os.getpid()), "--record-interval", "0"]
    with serving(home, *options, *(["--auth", "token"] if tcp else ["--no-tcp"])) as (_, ready):
        if tcp:
            os.unlink(ready["socket"])
        found = timed(lambda: fetch(50), 50)
        assert isinstance(found, Measured)
        assert threading.get_native_id() in [thread.tid for thread in found.threads]
        full = fetch(50, detail="full")
        assert isinstance(full, FullMetrics)
        assert full.target.pid == os.getpid()


def test_fetch_asks_another_sidecar_by_pid(home: Path) -> None:
    """A sidecar found by chance is asked by pid, and not for its own target."""
    with serving(home, "--record-interval", "0"):
        full = fetch(50, detail="full")
        assert isinstance(full, FullMetrics)
        assert full.target.pid == os.getpid()
        other = fetch(50, pid=os.getppid(), detail="full")
        assert isinstance(other, FullMetrics)
        assert other.target.pid == os.getppid()
        assert reason(fetch(50, pid=2**31 - 1)) == "no process has pid 2147483647"


def test_fetch_auto_waits_only_until_the_recording_covers_the_window(home: Path) -> None:
    """Young: the window is waited for. Old enough: the answer comes at once, for the window just past."""
    with serving(home, "--pid", str(os.getpid()), "--record-interval", "0.1") as (_, ready):
        begun = time.monotonic()
        young = fetch(1000)
        assert time.monotonic() - begun >= 0.9
        assert isinstance(young, Measured)
        eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 14)
        watch = Stopwatch()
        old = fetch(1000)
        assert watch.elapsed_s < watch.allowed_s(0.7)
        assert isinstance(old, Measured)
        assert 990 <= old.sample_window_ms < 1500
        begun = time.monotonic()
        assert isinstance(fetch(300, "wait"), Measured)
        assert time.monotonic() - begun >= 0.28
        short = fetch(60_000, "trailing")
        assert isinstance(short, Measured)
        assert short.sample_window_ms < 60_000


def test_afetch_does_not_block_the_loop_and_can_be_cancelled(home: Path) -> None:
    """The event loop beats through the window; a cancelled question raises CancelledError and nothing later."""

    async def scenario() -> None:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.01)
                beats += 1

        beating = asyncio.create_task(beat())
        found = await afetch(500, "wait")
        assert isinstance(found, Measured)
        assert beats > 20
        beating.cancel()
        asking = asyncio.create_task(afetch(500, "wait"))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    with serving(home, "--pid", str(os.getpid()), "--record-interval", "0"):
        asyncio.run(scenario())


def test_fetch_of_a_stopped_sidecar_returns_within_the_budget(home: Path) -> None:
    """SIGSTOP: a reason in time. SIGCONT: numbers again."""
    with serving(home, "--pid", str(os.getpid()), "--record-interval", "0") as (process, _):
        process.send_signal(signal.SIGSTOP)
        assert "sent no answer within" in reason(timed(lambda: fetch(20), 20))
        process.send_signal(signal.SIGCONT)
        assert isinstance(eventually(lambda: isinstance(fetch(20), Measured)), bool)


def test_fetch_with_one_stopped_sidecar_asks_the_other(home: Path) -> None:
    """If one of two sidecars of a process hangs, `fetch` and a report use the other one."""
    options = ("--pid", str(os.getpid()), "--record-interval", "0.05")
    with serving(home, *options), serving(home, *options) as (newest, _):
        newest.send_signal(signal.SIGSTOP)
        for mode in ("wait", "trailing", "auto"):
            assert isinstance(timed(lambda mode=mode: fetch(100, mode=mode), 100), Measured)  # type: ignore[misc]
        assert "runtime-history.json" in BugReport("ryll", window_ms=100).preview()


# No sidecar


def test_fetch_without_a_sidecar_has_a_reason_with_a_remedy(home: Path) -> None:
    """No sidecar has run; one has died; its file is open to others, broken, or of another container."""
    watch = Stopwatch()
    assert "no runtime file in" in reason(fetch())
    assert "vitalsd.start()" in reason(fetch())
    assert watch.elapsed_s < watch.allowed_s(1), "nothing is there to wait for"
    path = publish(home, start=1)
    assert "left behind by a sidecar that is no longer running" in reason(fetch())
    publish(home, host_scope="elsewhere")
    assert "another machine or container" in reason(fetch())
    publish(home)
    path.chmod(0o644)
    assert "is open to other users" in reason(fetch())
    path.chmod(0o600)
    path.write_text("{")
    assert "is not a runtime file" in reason(fetch())
    if os.geteuid() == 0:
        publish(home)
        os.chown(path, 65534, 65534)
        assert "belongs to user 65534" in reason(fetch())
        os.chown(home / "run", 65534, 65534)
        assert "belongs to user 65534, so nothing in it is believed" in reason(fetch())


def test_fetch_direct_without_a_sidecar_measures_this_process(home: Path) -> None:
    """Without a sidecar and with direct=True the numbers are ours, and the window was waited for."""
    begun = time.monotonic()
    found = fetch(200, direct=True)
    assert time.monotonic() - begun >= 0.2
    assert isinstance(found, Measured)
    assert threading.get_native_id() in [thread.tid for thread in found.threads]
    full = fetch(20, direct=True, detail="full")
    assert isinstance(full, FullMetrics)
    assert full.target.pid == os.getpid()
    other = fetch(20, direct=True, pid=os.getppid(), detail="full")
    assert isinstance(other, FullMetrics)
    assert other.target.pid == os.getppid()


def test_fetch_direct_after_a_hung_sidecar_is_in_time(home: Path) -> None:
    """The window runs while the sidecar is asked, so there are numbers before the budget ends."""
    with Misbehaving(FAULTS["hung at the head"][0]) as server:
        publish(home, host="127.0.0.1", port=server.port)
        found = timed(lambda: fetch(100, direct=True), 100)
        assert isinstance(found, Measured)


def test_fetch_after_a_refused_socket_tries_tcp_and_the_next_sidecar(home: Path) -> None:
    """If the socket of the first is refused, TCP is tried, and then the next sidecar."""
    with Misbehaving(says(answer(METRICS))) as server:
        publish(home, socket=str(home / "gone.sock"), host="127.0.0.1", port=server.port)
        assert isinstance(fetch(10), Measured)
    with Misbehaving(says(answer(METRICS)), home / "b.sock"):
        publish(home, socket=str(home / "gone.sock"), host="127.0.0.1", port=server.port)
        found = fetch(10)
        assert "gone.sock" in reason(found)
        assert "refused" in reason(found)


def refuses(times: int, status: str, extra: str = "Retry-After: 1\r\n") -> Behaviour:
    """Refuses so many requests, then answers."""
    left = itertools.repeat(None, times)

    def behave(connection: socket.socket, _: threading.Event) -> None:
        refused = next(left, True) is None
        body = b'{"detail": "16 large answers are being waited for already"}'
        connection.sendall(
            answer(body, status=status, kind="application/problem+json", extra=extra) if refused else answer(METRICS)
        )

    return behave


@pytest.mark.parametrize("status", ["429 Busy", "503 Full"])
@pytest.mark.parametrize("connection", ["", "Connection: close\r\n"])
def test_fetch_waits_as_long_as_retry_after_asks(home: Path, status: str, connection: str) -> None:
    """A sidecar that is busy for a moment costs a second and not the answer."""
    with Misbehaving(refuses(1, status, f"Retry-After: 1\r\n{connection}")) as server:
        begun = time.monotonic()
        assert isinstance(fetch(10, "trailing", url=server.url), Measured)
        assert time.monotonic() - begun >= 1


@pytest.mark.parametrize(
    "behaviour",
    [
        refuses(100, "429 Busy"),
        refuses(100, "429 Busy", "Retry-After: 3600\r\n"),
        refuses(100, "429 Busy", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n"),
        refuses(100, "503 Full", ""),
    ],
)
def test_fetch_of_a_sidecar_that_stays_busy_is_unavailable_within_the_budget(home: Path, behaviour: Behaviour) -> None:
    """The reason is that of the sidecar."""
    with Misbehaving(behaviour) as server:
        watch = Stopwatch()
        answered = fetch(10, "wait", url=server.url)
        assert isinstance(answered, Unavailable)
        assert "being waited for" in answered.reason
        assert watch.elapsed_s < watch.allowed_s(0.01 + BUDGET_S)


def test_fetch_socket_accepts_text_and_path(home: Path) -> None:
    """The path of the socket may be text or a `Path`."""
    with Misbehaving(says(answer(METRICS)), home / "b.sock"):
        assert isinstance(fetch(10, socket=home / "b.sock"), Measured)
        assert isinstance(fetch(10, socket=str(home / "b.sock")), Measured)


@pytest.mark.parametrize("window_ms", [9, 60_001, 0, -1, 10**12, "x", None, float("nan"), True])
def test_fetch_with_a_bad_window_is_unavailable(home: Path, window_ms: Any) -> None:
    """Even a wrong argument does not raise."""
    assert "window_ms must be 10 to 60000" in reason(timed(lambda: fetch(window_ms), 0))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:1",
        "https://127.0.0.1",
        "http://example.com",
        "http://[",
        "http://u:p@127.0.0.1",
        "http://127.0.0.1:99999",
    ],
)
def test_fetch_with_a_bad_url_is_unavailable_and_sends_nothing(home: Path, url: str) -> None:
    """Names are not looked up, because that has no deadline; nothing is sent anywhere."""
    assert "is not a sidecar's URL" in reason(timed(lambda: fetch(10, url=url), 10))


# A sidecar that is not


def test_fetch_of_a_faulty_server_over_tcp_is_unavailable_in_time(home: Path) -> None:
    """Whatever a server does over TCP, the answer comes within the window and 2 s, with the reason."""
    with ExitStack() as stack, ThreadPoolExecutor(len(FAULTS)) as pool:
        servers = {fault: stack.enter_context(Misbehaving(behaviour)) for fault, (behaviour, _) in FAULTS.items()}

        def ask_it(server: Misbehaving) -> RuntimeMetrics:
            return timed(lambda: fetch(10, url=server.url), 10)

        for fault, found in zip(servers, pool.map(ask_it, servers.values()), strict=True):
            said = reason(found)
            if not re.search(FAULTS[fault][1], said):  # all at once were too much for this machine
                said = reason(ask_it(servers[fault]))
            assert re.search(FAULTS[fault][1], said), f"{fault}: {said}"
            assert said.isprintable()
            assert len(said) <= 400


def test_afetch_of_many_faulty_servers_over_unix_sockets_is_in_time(home: Path) -> None:
    """The same over Unix sockets, from one event loop, all at the same time and each in time."""

    async def scenario(servers: dict[str, Misbehaving]) -> dict[str, RuntimeMetrics]:
        watch = Stopwatch()
        found = await asyncio.gather(*(afetch(10, socket=server.address) for server in servers.values()))
        assert watch.elapsed_s < watch.allowed_s(2.01)
        return dict(zip(servers, found, strict=True))

    with ExitStack() as stack:
        servers = {
            fault: stack.enter_context(Misbehaving(FAULTS[fault][0], home / f"{i}.sock"))
            for i, fault in enumerate(FAULTS)
        }
        for fault, found in asyncio.run(scenario(servers)).items():
            assert isinstance(found, Unavailable), fault


@pytest.mark.parametrize("unix", [True, False])
def test_fetch_with_a_full_backlog_gives_up_in_time(home: Path, unix: bool) -> None:
    """A full backlog: the connection is given up in time."""
    with Misbehaving(None, home / "full.sock" if unix else None) as server:
        where = {"socket": server.address} if unix else {"url": server.url}
        found = timed(lambda: fetch(10, **where), 10)
        assert "did not accept a connection within" in reason(found)


def test_fetch_of_a_measurement_with_status_404_is_unavailable(home: Path) -> None:
    """Status 404 with the body of a measurement is no measurement."""
    with Misbehaving(says(answer(METRICS, status="404 Not Found"))) as server:
        assert "answered 404" in reason(fetch(10, url=server.url))


def test_fetch_on_a_hung_file_system_returns_within_the_budget(home: Path) -> None:
    """A call that hangs in the file system stays behind on its thread."""
    code = (
        "import os, time, vitalsd.discovery.runtime_file as e\n"
        "def hung(*_, **__): time.sleep(60)\n"
        "import vitalsd_client.locate as p, vitalsd_client.fetch_metrics as c\n"
        "c.locate = hung\n"
        "begun = time.monotonic(); found = c.fetch(10); took = time.monotonic() - begun\n"
        "assert 'a file system hangs' in found.reason\n"
        "print(took)"
    )
    watch = Stopwatch()
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=30, stdout=subprocess.PIPE)
    assert float(done.stdout) < watch.allowed_s(2.01)
    assert watch.elapsed_s < watch.allowed_s(10), "and its exit waits for nothing"


def test_fetch_at_interpreter_exit_returns_without_raising(home: Path) -> None:
    """In atexit, where no thread can be started any more, `fetch` neither raises nor hangs."""
    code = (
        "import atexit, vitalsd_client\n"
        "from vitalsd_client import fetch\n"
        "atexit.register(lambda: print(fetch(10).available))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert out.stdout == "False\n"
    assert out.stderr == ""


# Trust in a sidecar


def test_fetch_ignores_proxies_of_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request, and no token, ever reaches them."""
    with Misbehaving(says(b"")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with serving(home, "--pid", str(os.getpid()), "--auth", "token", "--record-interval", "0") as (_, ready):
            assert isinstance(fetch(20, url=ready["url"]), Measured)
            assert isinstance(fetch(20), Measured)
        assert proxy.requests == []


def test_fetch_sends_no_token_without_a_proof(home: Path) -> None:
    """A server that cannot prove that it knows the token does not get it, whatever it answers."""
    wrong = hmac.new(b"guess", b"", "sha256").hexdigest()
    for reply in (answer(b"{}"), answer(json.dumps({"proof": wrong}).encode()), answer(METRICS), answer(b"[")):
        with Misbehaving(says(reply)) as squatter:
            publish(home, host="127.0.0.1", port=squatter.port, token="the-secret-token")
            assert "the token was not sent" in reason(fetch(10))
            assert squatter.requests
            for request in squatter.requests:
                assert b"the-secret-token" not in request
                assert b"authorization" not in request.lower()


def test_fetch_refuses_a_proof_relayed_from_another_port(home: Path) -> None:
    """The live sidecar's answer to the same nonce is no proof on the port of a squatter."""
    with serving(home, "--pid", str(os.getpid()), "--auth", "token", "--record-interval", "0") as (_, ready):
        (found,) = endpoints.discover()
        assert found.token is not None

        def relay(connection: socket.socket, _: threading.Event) -> None:
            path = relaying.requests[-1].split(b" ")[1].decode()
            status, body = ask(ready["url"], path)
            assert (status, len(body["proof"])) == (200, 64)
            connection.sendall(answer(json.dumps(body).encode()))

        with Misbehaving(relay) as relaying:
            fake = replace(found, port=relaying.port, socket=None)
            os.unlink(ready["runtime_file"])
            endpoints.publish(fake, home / "run")
            assert "could not prove" in reason(fetch(20))
            assert all(found.token.encode() not in request for request in relaying.requests)


def test_hello_with_a_valid_nonce_returns_the_proof_only(home: Path) -> None:
    """A fresh nonce, well-formed, gives the HMAC over nonce and port; anything else is refused, without the token."""
    with serving(home, "--auth", "token", "--record-interval", "0") as (_, ready):
        (found,) = endpoints.discover()
        assert found.token is not None
        assert found.port is not None
        nonce = "n" * 16
        status, body = ask(ready["url"], f"/hello?nonce={nonce}")
        assert (status, body["proof"]) == (200, proof(found.token, nonce, found.port))
        for query in (
            "",
            "?nonce=",
            "?nonce=short",
            f"?nonce={'n' * 129}",
            f"?nonce={nonce}&nonce={nonce}",
            f"?x={nonce}",
        ):
            status, body = ask(ready["url"], f"/hello{query}")
            assert (status, body["reason"]) == (422, "bad_parameter")
        assert ask(ready["url"], "/metrics?window_ms=10")[0] == 401
    with serving(home, "--record-interval", "0") as (_, ready):
        assert ask(ready["url"], f"/hello?nonce={nonce}")[0] == 404


def test_fetch_of_a_socket_of_another_user_sends_nothing(short_path: Path) -> None:
    """The client checks the user of the peer before it sends a byte; as root, the test plants another user's socket."""
    path = short_path / "theirs.sock"
    if os.geteuid() != 0:
        with Misbehaving(says(answer(METRICS)), path):
            assert isinstance(fetch(10, socket=str(path)), Measured)
        return
    short_path.chmod(0o777)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"{path}.new")
                listener.listen(5)
                os.rename(f"{path}.new", path)
                listener.settimeout(20)
                connection, _ = listener.accept()
                os._exit(1 if connection.recv(100) else 0)
        os._exit(2)
    eventually(path.exists)
    assert "is served by user 65534, not by you; nothing was asked there" in reason(fetch(10, socket=str(path)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_fetch_reason_contains_neither_home_nor_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons end up in reports: the home directory is ~ there, and the user's own name is left out."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(home / user / "run"))
    said = reason(fetch(10))
    assert str(home) not in said
    assert "~/" in said
    assert user == "root" or user not in said


# What it costs to import


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import vitalsd_client", "fastapi uvicorn starlette httpx pydantic asyncio vitalsd h11 rich"),
        (
            "from vitalsd_client import fetch, afetch, BugReport",
            "fastapi uvicorn starlette httpx rich vitalsd.sampling.sampler",
        ),
        ("from vitalsd_client import Spool", "fastapi uvicorn starlette httpx rich pydantic vitalsd.contract.metrics"),
    ],
)
def test_import_of_vitalsd_client_loads_no_service(code: str, absent: str) -> None:
    """The package loads nothing, and each name only what it needs; never the service."""
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not set(absent.split()) & set(out.stdout.split())


def test_client_imports_only_contract_and_discovery_modules() -> None:
    """The client imports these modules of the service and no others; none of them loads the web framework."""
    allowed = {
        "vitalsd",
        "vitalsd.contract.metrics",
        "vitalsd.discovery.runtime_file",
        "vitalsd.discovery.directories",
        "vitalsd.discovery.atomic_file",
        "vitalsd.discovery.unix_socket",
        "vitalsd.contract.application",
        "vitalsd.contract.host",
        "vitalsd.contract.labels",
        "vitalsd.contract.report_archive",
        "vitalsd.discovery.http_connection",
        "vitalsd.discovery.own_sidecars",
        "vitalsd.discovery.program_key",
        "vitalsd.report.builder",
        "vitalsd.sources.names",
        "vitalsd.worker_thread",
        "vitalsd.report.previous_run",
    }
    more = {
        "signals.py": {"vitalsd.contract.signals"},
        "direct.py": {"vitalsd.snapshot", "vitalsd.sources", "vitalsd.sources.base", "vitalsd.contract.encoding"},
        "recorded_data.py": {
            "vitalsd.recording.run_directory",
            "vitalsd.sources",
            "vitalsd.sources.base",
            "vitalsd.sources.programs",
        },
        "crash.py": {"vitalsd.recording.run_directory", "vitalsd.recording.run_reader"},
    }
    for file in (ROOT / "clients" / "vitalsd_client").glob("*.py"):
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found.add(node.module)
        ours = {name for name in found if name.split(".")[0] == "vitalsd"}
        assert ours <= allowed | more.get(file.name, set()), file.name


def test_mark_is_recorded_by_the_sidecar_of_this_process(home: Path) -> None:
    """`vitalsd_client.mark`, and `mark` of what `spawn` returns, return whether it was recorded, and never raise."""
    assert not mark("without a sidecar")
    with vitalsd.spawn(port=0) as spawned, vitalsd.spawn(port=0, auth="token") as other:
        assert mark("by itself")
        assert spawned.mark("by the object\nthat spawn returned")
        spawned.socket = None
        assert spawned.mark("over TCP")
        other.socket = None
        assert other.mark("with a token")
        labels = [each["label"] for each in json.loads(httpx.get(f"{spawned.url}/marks", trust_env=False).content)]
        assert set(labels) >= {"by the object that spawn returned", "over TCP"}
        for wrong in ("", "  \n", None, 5, b"x"):
            assert not mark(wrong)  # type: ignore[arg-type]
            assert not spawned.mark(wrong)  # type: ignore[arg-type]
        assert not mark("x", url="no url")
    assert not spawned.mark("after its end")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_mark_of_a_hung_sidecar_returns_within_a_quarter_of_a_second(home: Path, how: str) -> None:
    """The thread that marks may be that of a user interface."""
    with vitalsd.spawn(port=0) as spawned:
        os.kill(spawned.pid, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        for put in (spawned.mark, mark):
            watch = Stopwatch()
            assert not put("unheard")
            assert watch.elapsed_s < watch.allowed_s(2), "0.25 s, and what a busy machine takes"
        if how == "stopped":
            os.kill(spawned.pid, signal.SIGCONT)


def test_fetch_after_the_sidecar_was_killed_asks_no_other_that_has_its_port(home: Path) -> None:
    """The numbers and the record of another process are not those of this one."""
    with vitalsd.spawn(port=0) as killed, subprocess.Popen(["sleep", "60"]) as other:
        port = int((killed.url or "").rpartition(":")[2])
        os.kill(killed.pid, signal.SIGKILL)
        eventually(lambda: not killed.running)
        with vitalsd.spawn(other.pid, port=port) as foreign:
            assert foreign.url == killed.url
            found = fetch(window_ms=50)
            assert isinstance(found, Measured)
            assert os.getpid() in [thread.tid for thread in found.threads]
            assert not mark("of this process")
            assert ask(foreign.url or "", "/marks")[1] == []
        other.kill()


def test_fetch_of_a_spawned_sidecar_with_a_token_needs_no_runtime_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ready-fd, which no other process reads, brings the token."""
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", "/proc/nowhere")
    with vitalsd.spawn(port=0, auth="token") as spawned:
        assert (spawned.socket, spawned.runtime_file) == (None, None)
        assert isinstance(fetch(window_ms=50), Measured)
        assert mark("one")
        assert spawned.mark("two")


def test_vitalsd_client_exports_every_name_in_all() -> None:
    """Every name of __all__ is there, dir() shows it, and any other is an AttributeError."""
    import vitalsd_client

    assert dir(vitalsd_client) == sorted(vitalsd_client.__all__)
    for name in vitalsd_client.__all__:
        found = getattr(vitalsd_client, name)
        assert not isinstance(found, type) or found.__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        vitalsd_client.nothing  # noqa: B018


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """No thread of the client outlives its question for long."""
    yield
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "vitalsd-client"], 5)
