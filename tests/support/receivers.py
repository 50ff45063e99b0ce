"""
Run the example receiver behind a proxy that fails uploads at random.

    python receivers.py STORE SEED [FRACTION OF UPLOADS TREATED BADLY]

prints the URL to send to, and serves until it is killed.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from examples.receiver import create_app

__all__ = ["receiving", "receiving_badly"]

STALL_S = 1.0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(store: Path) -> tuple[_Server, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(store), http="h11", ws="none", log_config=None, access_log=False)
    return _Server(config), listener


@contextlib.contextmanager
def receiving(store: Path) -> Iterator[str]:
    """Run the receiver on a thread, and yield its URL."""
    server, listener = _server(store)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/reports"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@contextlib.contextmanager
def receiving_badly(store: Path, seed: int, fraction: float = 0.6) -> Iterator[str]:
    """Run the receiver behind the failing proxy in a process of its own, and yield its URL."""
    argv = [sys.executable, __file__, str(store), str(seed), str(fraction)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


class _Front:
    """
    Forward a connection to the receiver, or drop, stall or cut it, or send an error or a wrong answer.

    Some of these happen after the receiver has stored the report, which the sender cannot know then.
    """

    def __init__(self, port: int, seed: int, fraction: float) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._fraction = fraction
        self._fates = (
            self.drop,
            self.drop_in_the_middle,
            self.stall,
            self.fail,
            self.lie,
            self.lie_about_another,
            self.swallow_the_answer,
            self.cut_the_answer,
            self.stall_the_answer,
            self.fail_after_all,
        )

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fate = self._random.choice(self._fates) if self._random.random() < self._fraction else self.pass_on
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await fate(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        return head + await reader.readexactly(int(length))

    async def _answer(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            return await reader.read()
        finally:
            writer.close()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await self._answer(await self._request(reader)))
        await writer.drain()

    async def drop(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def drop_in_the_middle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(self._random.randrange(1, 3000))
        await self.drop(reader, writer)

    async def stall(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(STALL_S)

    async def fail(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._request(reader)
        status = self._random.choice(["500 No", "502 No", "503 No", "429 No", "408 No", "425 No"])
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    async def lie(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._request(reader)
        body = self._random.choice(
            [b"", b"<html>Welcome to our Wi-Fi</html>", b"{}", b'{"receipt": "R"}', b"null", b"[" * 999]
        )
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def lie_about_another(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._request(reader)
        body = json.dumps({"receipt": "R-1", "report_id": "0" * 32, "sha256": "0" * 64}).encode()
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def swallow_the_answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._answer(await self._request(reader))

    async def cut_the_answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = await self._answer(await self._request(reader))
        writer.write(answer[: self._random.randrange(1, len(answer))])

    async def stall_the_answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = await self._answer(await self._request(reader))
        writer.write(answer[: self._random.randrange(0, len(answer))])
        await asyncio.sleep(STALL_S)

    async def fail_after_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._answer(await self._request(reader))
        writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")


async def main(store: Path, seed: int, fraction: float) -> None:
    """Serve until killed."""
    server, listener = _server(store)
    front = await asyncio.start_server(_Front(listener.getsockname()[1], seed, fraction), "127.0.0.1", 0, limit=1 << 24)
    print(f"http://127.0.0.1:{front.sockets[0].getsockname()[1]}/reports", flush=True)
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
