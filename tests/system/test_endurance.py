"""
The service after much use and abuse: what it holds afterwards, and the memory it takes meanwhile.

What bounds its memory: the record (32 MiB, 1000 marks and events), 64 windows of a process, 8 streams of 16
measurements, 16 answers and 8 MiB of each measurement that is kept, and 64 KiB for each client that does not read.
"""

import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support.edge import Reply, dial, get, read_reply
from support.sidecars import eventually, serving
from support.target import Target
from vitalsd.contract.limits import WRITE_S

pytestmark = pytest.mark.live

MIB = 1 << 20


def request(where: str, path: str, *lines: str, method: str = "GET", body: str = "") -> bytes:
    host = where.removeprefix("http://") if where.startswith("http://") else "localhost"
    declared = [f"Content-Length: {len(body)}"] if method == "POST" else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *declared, *lines, "", body]).encode()


# Memory


@contextmanager
def growing_at_most(pid: int, size: int) -> Iterator[None]:
    """The resident memory of `pid`, looked at ten times a second, and at the end, grows by no more than `size`."""
    process = psutil.Process(pid)
    before = process.memory_info().rss
    peak = before
    with ThreadPoolExecutor(1) as looker, ExitStack() as stack:
        over: list[bool] = []

        def look() -> None:
            nonlocal peak
            while not over:
                peak = max(peak, process.memory_info().rss)
                time.sleep(0.05)

        stack.callback(looker.submit(look).result)
        stack.callback(over.append, True)
        yield
    peak = max(peak, process.memory_info().rss)
    print(f"{before / MIB:.1f} MiB, at most {(peak - before) / MIB:.1f} MiB more")
    assert peak - before <= size, f"{before / MIB:.1f} MiB grew by {(peak - before) / MIB:.1f} MiB"


def test_unread_shared_answers_take_bounded_memory(short_path: Path, start: Callable[..., Target]) -> None:
    """400 clients of the Unix socket request 400 KiB each and read none of it; a client that reads is answered."""
    target = start("--idle", "2500")
    with serving(short_path, "--pid", str(target.pid), "--no-tcp") as (process, ready), ExitStack() as stack:
        path = "/metrics?mode=trailing&detail=full"
        eventually(lambda: b"born_in_window" in get(ready["socket"], path).body)
        size = len(get(ready["socket"], path).body)
        assert size > 400_000
        with growing_at_most(process.pid, 80 * MIB):
            for _ in range(400):
                connection = stack.enter_context(dial(ready["socket"]))
                connection.sendall(request(ready["socket"], path))
            assert len(get(ready["socket"], path).body) > size / 2


def test_answers_about_a_dead_process_take_bounded_memory(short_path: Path, start: Callable[..., Target]) -> None:
    """Its last measurement stays; hundreds of different answers from it do not."""
    target = start("--idle", "1000")
    with serving(short_path, "--pid", str(target.pid), "--record-interval", "0.1") as (process, ready):
        where = ready["socket"]
        eventually(lambda: get(where, "/metrics?mode=trailing").status == 200)
        target.kill()
        eventually(lambda: b"exited" in get(where, "/info").body)
        with growing_at_most(process.pid, 12 * MIB), dial(where) as connection:
            for number in range(700):
                window, limit = number % 40 + 100, 900 - number // 10
                connection.sendall(request(where, f"/metrics?mode=trailing&window_ms={window}&limit={limit}"))
                assert read_reply(connection).status == 200


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_unread_tables_take_bounded_memory_in_total(short_path: Path, start: Callable[..., Target]) -> None:
    """120 clients ask for another table of megabytes each and take none of it; one that reads has its table in time."""
    clients, making, waiting = 120, 64 * MIB, 32 * MIB
    target = start("--idle", "3000")
    options = ("--pid", str(target.pid), "--record-interval", "0.05", "--no-black-box")
    with serving(short_path, *options) as (process, ready), ExitStack() as stack:
        where = ready["socket"]

        def path(top: int) -> str:
            return f"/history?seconds=15&top={top}"

        def served(reply: Reply) -> Reply | None:
            assert reply.status in (200, 503)
            return reply if reply.status == 200 else None

        eventually(lambda: len(get(where, path(3000)).body) > 3 * MIB, timeout_s=60)
        asked = 0
        with growing_at_most(process.pid, waiting + making):
            for number in range(clients):
                connection = stack.enter_context(dial(where))
                connection.sendall(request(where, path(2999 - number)))
                connection.settimeout(60)
                asked += connection.recv(12).endswith(b" 200")  # which does not come before all of it has been made
            read = eventually(lambda: served(get(where, path(3000))), timeout_s=2 * WRITE_S)
        print(f"{asked} tables like one of {len(read.body) / MIB:.1f} MiB")
        assert asked * len(read.body) > 1.5 * (waiting + making)


# A soak


@dataclass(frozen=True)
class Held:
    """Count what a process has open."""

    fds: int
    sockets: int
    threads: int
    rss_bytes: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        process = psutil.Process(pid)
        sockets = len(process.net_connections("all"))
        return cls(process.num_fds(), sockets, process.num_threads(), process.memory_info().rss)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.fds, self.sockets, self.threads


ASKED = [
    *("/healthz", "/metrics?window_ms=10", "/metrics?window_ms=12&detail=full", "/metrics?mode=trailing&window_ms=100"),
    *("/metrics?window_ms=10&sort=cpu&limit=3", "/history?seconds=2", "/info", "/marks", "/runs", "/", "/nowhere"),
    *("/metrics?window_ms=9", "/metrics?window_ms=10&window_ms=11", "/metrics?pid=2147483646", "/history?step_ms=-1"),
]


def keep_alive(where: str, dice: random.Random, statuses: Counter[str]) -> int:
    """Ten requests on one connection."""
    with dial(where) as connection:
        for path in dice.choices(ASKED, k=9):
            headers = [f"Accept: {dice.choice(['text/plain', 'text/csv', '*/*'])}"] if dice.random() < 0.3 else []
            connection.sendall(request(where, path, *headers))
            statuses[str(read_reply(connection).status)] += 1
        label = dice.choice(['{"label":"soak"}', "{", '{"label":""}'])
        connection.sendall(request(where, "/marks", "Content-Type: application/json", method="POST", body=label))
        statuses[str(read_reply(connection, "POST").status)] += 1
    return 10


def hang_up(where: str, dice: random.Random, statuses: Counter[str]) -> int:
    """Leave while a window is open, now and then with a reset."""
    with dial(where) as connection:
        connection.sendall(request(where, dice.choice(["/metrics?window_ms=50", "/stream?interval_ms=10", "/"])))
        if dice.random() < 0.3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    statuses["left"] += 1
    return 1


def garbage(where: str, dice: random.Random, statuses: Counter[str]) -> int:
    """Bytes that are no request."""
    with dial(where) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(dice.randbytes(dice.randrange(1, 200)) + b"\r\n\r\n")
        statuses[str(read_reply(connection).status)] += 1
    return 1


def large(where: str, dice: random.Random, statuses: Counter[str]) -> int:
    """A body far too large, which is refused unread."""
    with dial(where) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(request(where, "/marks", method="POST", body="x" * 200_000))
        statuses[str(read_reply(connection, "POST").status)] += 1
    return 1


def stream(where: str, dice: random.Random, statuses: Counter[str]) -> int:
    """A stream, for a few events."""
    with dial(where) as connection:
        connection.sendall(request(where, "/stream?interval_ms=10"))
        for _ in range(3):
            connection.recv(4096)
    statuses["streamed"] += 1
    return 1


MIX = [keep_alive] * 24 + [hang_up] * 3 + [garbage, large, stream]


def soak(places: list[str], count: int, seed: int) -> Counter[str]:
    """`count` requests by eight clients; what came back."""

    def client(number: int) -> Counter[str]:
        dice, statuses, done = random.Random(f"{seed}-{number}"), Counter[str](), 0
        while done < count / 8:
            done += dice.choice(MIX)(dice.choice(places), dice, statuses)
        return statuses

    with ThreadPoolExecutor(8) as clients:
        return sum(clients.map(client, range(8)), Counter[str]())


@pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc lists")
@pytest.mark.parametrize(
    ("count", "grown"),
    [
        pytest.param(2000, 10 * MIB, id="quick"),
        pytest.param(200_000, 10 * MIB, id="torture", marks=[pytest.mark.torture, pytest.mark.timeout(1200)]),
    ],
)
def test_soak_of_all_kinds_of_requests_leaks_nothing(short_path: Path, count: int, grown: int) -> None:
    """After so many requests of every kind: descriptors, sockets and threads as before, memory nearly so."""
    # Snapshots far apart: the record may grow to its bound, and is not what is measured here.
    with serving(short_path, "--record-interval", "20") as (process, ready):
        places = [ready["url"], ready["socket"]]
        fresh = Held.by(process.pid)
        soak(places, max(500, count // 20), 1)
        # SQLite keeps a descriptor of its own file once another thread has read it.
        eventually(lambda: Held.by(process.pid).counts[1:] == fresh.counts[1:], 15)
        idle = Held.by(process.pid)
        begun = time.monotonic()
        statuses = soak(places, count, 2)
        took_s = time.monotonic() - begun
        eventually(lambda: Held.by(process.pid).counts == idle.counts, 15)
        after = Held.by(process.pid)
        print(f"{statuses.total()} requests in {took_s:.0f} s, {dict(statuses)}, {idle} -> {after}")
        assert statuses.total() >= count
        assert {"200", "201", "400", "404", "413", "422", "left", "streamed"} <= set(statuses)
        assert not {each for each in statuses if each.startswith("5")}
        assert after.rss_bytes - idle.rss_bytes < grown
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert len(process.stderr.read().splitlines()) == 1
