"""
Act as another user of this machine: one attempt per line of JSON, one line back. Started by root.

``{"dial": URL or path, "send": text}`` · ``{"read": path}`` · ``{"list": path}`` · ``{"squat": port}``, which
answers twice: when it listens, and with what it received · ``{"leave": URL, "send": text, "reset": bool, "times": N}``,
which sends and closes without reading · ``{"flood": URL, "requests": [texts], "seconds": S}``, which sends each request
again and again on a connection of its own and answers with the number of answers by status.

``intruder.py [UID]``: the user id, by default 65534.
"""

import encodings.idna  # noqa: F401 - what is loaded late could not be read any more
import http.client
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from typing import Any

NOBODY_UID = 65534


def attempt(what: dict[str, Any]) -> Any:
    """Make one attempt, and return the JSON of its result."""
    try:
        if "dial" in what:
            return dial(what["dial"], what["send"])
        if "read" in what:
            with open(what["read"], "rb") as file:
                return file.read(100).decode("latin-1")
        if "list" in what:
            return os.listdir(what["list"])
        if "leave" in what:
            return leave(what["leave"], what["send"], what["reset"], what["times"])
        if "flood" in what:
            return flood(what["flood"], what["requests"], what["seconds"])
        return squat(what["squat"])
    except OSError as error:
        return type(error).__name__


def dial(where: str, content: str) -> str:
    """Send text to a URL or a Unix socket, and return the answer."""
    if where.startswith("http://"):
        host, port = where.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), 10)
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(where)
    received = b""
    with connection:
        if content:  # even to send nothing fails once the other end has closed
            connection.sendall(content.encode())
        while part := connection.recv(65536):
            received += part
    return received.decode("latin-1")


def connect(url: str) -> socket.socket:
    """Return a connection to a URL."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), 10)


def leave(url: str, content: str, reset: bool, times: int) -> str:
    """Send a request and close or reset without reading, `times` times."""
    for _ in range(times):
        connection = connect(url)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(content.encode())
        connection.close()
    return "left"


def flood(url: str, requests: list[str], seconds: float) -> dict[str, int]:
    """Send each request repeatedly on a connection, which is opened again if the sidecar closes it; count by status."""
    statuses: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def send(content: bytes) -> None:
        while time.monotonic() < end:
            try:
                with connect(url) as connection:
                    connection.settimeout(1)
                    while time.monotonic() < end:
                        connection.sendall(content)
                        answer = http.client.HTTPResponse(connection)
                        answer.begin()
                        statuses[str(answer.status)] += 1
                        answer.read()
            except (OSError, http.client.HTTPException) as error:
                statuses[type(error).__name__] += 1

    threads = [threading.Thread(target=send, args=(each.encode(),)) for each in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(statuses)


def squat(port: int) -> str:
    """Listen on a port for 3 s, answer 200 to every client, and return everything that they sent."""
    received = b""
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(json.dumps("listening"), flush=True)
        listener.settimeout(3)
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(1)
                    received += connection.recv(65536)
                    body = b'{"app":"vitalsd","proof":"0000"}'
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                        + body
                    )
                    received += connection.recv(65536)
        except TimeoutError:
            return received.decode("latin-1")


if __name__ == "__main__":
    user = int(sys.argv[1]) if len(sys.argv) > 1 else NOBODY_UID
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)
