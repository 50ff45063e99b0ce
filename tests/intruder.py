"""
Another user of this machine who tries to get in: one attempt per line of JSON, one line back. Started by root.

``{"dial": URL or path, "send": text}`` · ``{"read": path}`` · ``{"list": path}`` · ``{"squat": port}``, which
answers twice: once it listens, and with what it was sent.
"""

import encodings.idna  # noqa: F401 - what is loaded late could not be read any more
import json
import os
import socket
import sys
from typing import Any

NOBODY = 65534


def attempt(what: dict[str, Any]) -> Any:
    try:
        if "dial" in what:
            return dial(what["dial"], what["send"])
        if "read" in what:
            with open(what["read"], "rb") as file:
                return file.read(100).decode("latin-1")
        if "list" in what:
            return os.listdir(what["list"])
        return squat(what["squat"])
    except OSError as error:
        return type(error).__name__


def dial(where: str, content: str) -> str:
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


def squat(port: int) -> str:
    """Everything that whoever comes within 3 s sends; they are told that all is well."""
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
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)
