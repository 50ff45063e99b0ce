"""
Measure what an answer costs: CPU of the server per request, by process clock, all variants in one interleaved run.

    python benchmarks/answering.py [--threads 1000] [--rounds 5] [--requests 200]

`ours` is GET /metrics?mode=trailing of a sidecar. `response_model` is the same numbers through pydantic objects, as in
FastAPI's tutorial. `tiny` is /healthz of the same sidecar. `h11` is an ASGI application of three lines on the same
server and parser, the lower bound of any application. `peer` is the cost of a new connection before its first request:
the question to the kernel which user opened it. One client keeps the server busy over one connection. Then 200
clients, each on its own connection, ask at once for a window of half a second, and again after each answer.
`overshoot` is how much longer than asked their windows were, `late` how long after the end of its window each answer
was complete.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sampling import build
from spread import spread
from vitalsd.http.access.peer import PeerUsers

REFERENCE = """
import sys, uvicorn
from fastapi import FastAPI
from vitalsd.contract.metrics import Measured, ProcessMetrics, ThreadMetrics
app = FastAPI()
rows = [(1000 + i, f"worker {i}", i / 7) for i in range(int(sys.argv[1]))]
@app.get("/metrics", response_model=Measured)
async def metrics():
    return Measured(
        sample_window_ms=1000,
        process=ProcessMetrics(cpu_percent=1.5, rss_kb=65536, vm_size_kb=131072, uptime_secs=47.2),
        threads=tuple(ThreadMetrics(tid=t, name=n, cpu_percent=c) for t, n, c in rows),
        platform="linux",
    )
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), http="h11", loop="asyncio", log_level="error")
"""


H11 = """
import sys, uvicorn
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", b"15")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"status":"ok"}'})
uvicorn.run(
    app, host="127.0.0.1", port=int(sys.argv[1]), http="h11", loop="asyncio", log_level="error", access_log=False,
    lifespan="off",
)
"""


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process, ns (Linux: its CPU clock)."""
    return time.clock_gettime_ns((~pid << 3) | 2)


class Client:
    """Send requests over one persistent connection, with little CPU of its own."""

    def __init__(self, port: int) -> None:
        self._host = f"127.0.0.1:{port}"
        self._socket = socket.create_connection(("127.0.0.1", port), 30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, path: str) -> bytes:
        """Return the body of an answer of 200."""
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._received()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self._received()
        return body

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _received(self) -> bytes:
        data = self._socket.recv(1 << 20)
        assert data, "the server closed the connection"
        return data


def ask(client: Client, path: str, pid: int, requests: int) -> tuple[float, list[float]]:
    """Return the CPU of the server per request, µs, and the time of each answer, ms."""
    took = []
    before = cpu_ns(pid)
    for _ in range(requests):
        begin = time.perf_counter()
        client.get(path)
        took.append((time.perf_counter() - begin) * 1000)
    return (cpu_ns(pid) - before) / requests / 1000, took


def peer_us(lookups: int) -> float:
    """Return the CPU of one question for the user at the other end of a new connection, µs."""
    users = PeerUsers()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, client = listener.accept()
        with accepted:
            server = accepted.getsockname()
            before = time.thread_time_ns()
            for _ in range(lookups):
                users.peer(client, server)
            took_ns = time.thread_time_ns() - before
    users.close()
    return took_ns / lookups / 1000


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def together(port: int, callers: int, window_ms: int, seconds: float) -> tuple[list[int], list[float]]:
    """
    Return how much longer than asked each window was, and how long after it its answer came, ms; ascending.

    Uses plain sockets, so that no client library is measured.
    """
    overshoot: list[int] = []
    late: list[float] = []
    end = time.perf_counter() + seconds
    request = f"GET /metrics?window_ms={window_ms} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            begin = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            late.append((time.perf_counter() - begin) * 1000 - window_ms)
            overshoot.append(int(body.partition(b":")[2].partition(b",")[0]) - window_ms)
        writer.close()

    await asyncio.gather(*(one() for _ in range(callers)))
    return sorted(overshoot), sorted(late)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs = build(Path(directory))
        target = subprocess.Popen(
            [programs["target"], str(arguments.threads), "4", "100", "20000"], stdout=subprocess.PIPE, text=True
        )
        assert target.stdout is not None
        target.stdout.readline()
        ours = subprocess.Popen(
            [sys.executable, "-m", "vitalsd", "serve", "--pid", str(target.pid), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": directory, "VITALSD_STATE_DIR": directory},
        )
        assert ours.stderr is not None
        line = ours.stderr.readline()
        port = int(line.split("http://")[1].split("/")[0].rpartition(":")[2])
        ports = {"response_model": free_port(), "h11": free_port()}
        sources = {"response_model": [REFERENCE, str(arguments.threads)], "h11": [H11]}
        others = {
            name: subprocess.Popen([sys.executable, "-c", *words, str(ports[name])], text=True)
            for name, words in sources.items()
        }
        time.sleep(5)
        figures: dict[str, list[float]] = {"ours": [], "peer": [], "tiny": [], "response_model": [], "h11": []}
        times: list[float] = []
        client = Client(port)
        clients = {name: Client(each) for name, each in ports.items()}
        for _ in range(arguments.rounds):
            cost, took = ask(client, "/metrics?mode=trailing&window_ms=2000", ours.pid, arguments.requests)
            figures["ours"].append(cost)
            times += took
            figures["peer"].append(peer_us(arguments.requests))
            figures["tiny"].append(ask(client, "/healthz", ours.pid, arguments.requests)[0])
            for name, other in clients.items():
                count = arguments.requests // (4 if name == "response_model" else 1)
                figures[name].append(ask(other, "/metrics", others[name].pid, count)[0])
        for each in (client, *clients.values()):
            each.close()
        client = Client(port)
        before = json.loads(client.get("/info"))["self"]["snapshots"]
        overshoot, late = asyncio.run(together(port, 200, 500, 3))
        snapshots = json.loads(client.get("/info"))["self"]["snapshots"] - before
        medians = {name: statistics.median(values) for name, values in figures.items()}
        times.sort()
        result = {
            "threads": arguments.threads,
            **{f"{name}_us": round(value) for name, value in medians.items()},
            **{f"{name}_spread_us": spread(values) for name, values in figures.items()},
            "response_model_to_ours": round(medians["response_model"] / medians["ours"], 1),
            "ours_to_tiny": round(medians["ours"] / medians["tiny"], 2),
            "peer_to_ours": round(medians["peer"] / medians["ours"], 3),
            "ours_to_h11": round(medians["ours"] / medians["h11"], 2),
            "trailing_per_second_per_core": round(1e6 / medians["ours"]),
            "p99_to_p50": round(times[len(times) * 99 // 100] / times[len(times) // 2], 2),
            "callers": 200,
            "snapshots_per_request": round(snapshots / len(late), 3),
            "overshoot_p99_ms": overshoot[len(overshoot) * 99 // 100],
            "late_p50_ms": round(late[len(late) // 2], 1),
            "late_p99_ms": round(late[len(late) * 99 // 100], 1),
        }
        print(json.dumps(result))
        client.close()
        for process in (ours, *others.values(), target):
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
