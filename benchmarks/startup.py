"""
Measure the time to the first answer, and the size then, beside a bare FastAPI application with one route.

    python benchmarks/startup.py [--rounds 60]

Both are started in turn and asked over loopback until they answer 200. The ratio is the median of the ratios of
neighbours, because the load of a shared machine changes and affects both.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spread import spread

BARE = """
import sys, uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.get("/healthz")
async def healthz():
    return {"status": "ok"}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), http="h11", loop="asyncio", log_level="error")
"""


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_answer(command: list[str], port: int, state: str) -> tuple[float, int]:
    """Return the seconds until the first 200, and the resident KiB then."""
    request = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "HOME": state, "VITALSD_STATE_DIR": state, "VITALSD_RUNTIME_DIR": state},
    )
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(request)
                if connection.recv(64).startswith(b"HTTP/1.1 200"):
                    break
        except OSError:
            time.sleep(0.002)
    took = time.perf_counter() - begin
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    process.terminate()
    process.wait()
    return took, pages * 4


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[tuple[float, int]]] = {"vitalsd": [], "bare": []}
    with tempfile.TemporaryDirectory() as state:
        for number in range(rounds + 1):
            for name in taken:
                port = free_port()
                command = (
                    [sys.executable, "-m", "vitalsd", "serve", "--port", str(port)]
                    if name == "vitalsd"
                    else [sys.executable, "-c", BARE, str(port)]
                )
                result = first_answer(command, port, state)
                if number:  # the first of each warms the page cache
                    taken[name].append(result)
    seconds = {name: statistics.median(took for took, _ in values) for name, values in taken.items()}
    spreads = {name: spread([1000 * took for took, _ in values]) for name, values in taken.items()}
    ratios = [ours / bare for (ours, _), (bare, _) in zip(*taken.values(), strict=True)]
    kib = {name: statistics.median(size for _, size in values) for name, values in taken.items()}
    print(
        json.dumps(
            {
                "rounds": rounds,
                "first_answer_ms": round(1000 * seconds["vitalsd"]),
                "bare_first_answer_ms": round(1000 * seconds["bare"]),
                "first_answer_spread_ms": spreads["vitalsd"],
                "bare_first_answer_spread_ms": spreads["bare"],
                "ratio": round(statistics.median(ratios), 2),
                "ratio_spread": spread(ratios, 2),
                "rss_mib": round(kib["vitalsd"] / 1024, 1),
                "bare_rss_mib": round(kib["bare"] / 1024, 1),
                "rss_difference_mib": round((kib["vitalsd"] - kib["bare"]) / 1024, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
