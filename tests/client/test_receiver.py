"""The example receiver against uploads that are too large, over real sockets."""

import http.client
import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from examples.receiver import MAX_MEMBER_BYTES, MAX_MEMBERS_BYTES, MAX_UPLOAD_BYTES, BadReportError, check
from support.paths import ROOT
from support.sidecars import eventually

pytestmark = pytest.mark.live
RECEIVER = ROOT / "clients" / "examples" / "receiver.py"
HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="report"; filename="a.zip"\r\nContent-Type: application/zip\r\n\r\n'
)
HEADERS = {"Content-Type": "multipart/form-data; boundary=b", "Idempotency-Key": "0" * 32, "X-Content-SHA256": "0"}


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """Its URL, its temporary directory, and its process."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(RECEIVER), "--store", str(tmp_path / "store"), "--port", str(port)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: answers(port), 20)
        yield f"http://127.0.0.1:{port}/reports", temporary, process
    finally:
        process.terminate()
        process.wait(10)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 404
    except OSError:
        return False
    finally:
        connection.close()


def written(pid: int) -> int:
    """Bytes that a process has passed to write(2), to files and sockets."""
    return int(dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())["wchar"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/io")
@pytest.mark.parametrize("chunked", [False, True])
def test_upload_that_is_too_large_is_413_before_it_is_on_disk(
    receiver: tuple[str, Path, subprocess.Popen[bytes]], chunked: bool
) -> None:
    """With a Content-Length nothing of it is written; without one at most the limit."""
    url, temporary, process = receiver
    size = 2 * MAX_UPLOAD_BYTES
    block = bytes(1 << 20)

    def body() -> Iterator[bytes]:
        yield HEAD
        for _ in range(size // len(block)):
            yield block
        yield b"\r\n--b--\r\n"

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    before = written(process.pid)
    length = {} if chunked else {"Content-Length": str(len(HEAD) + size + 9)}
    connection.request("POST", "/reports", body=body(), headers=HEADERS | length, encode_chunked=chunked)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["detail"]) == (
        413,
        "the report is too large: send at most 64 MiB",
    )
    connection.close()
    assert written(process.pid) - before < (MAX_UPLOAD_BYTES + (4 << 20) if chunked else 1 << 20)
    eventually(lambda: not list(temporary.iterdir()))


def test_report_with_members_too_large_together_is_refused() -> None:
    """Each of them is within its own bound, and is not compressed."""
    content = io.BytesIO()
    block = bytes(1 << 20)
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for number in range(MAX_MEMBERS_BYTES // (40 << 20) + 1):
            archive.writestr(f"attachments/{number}", block * 40)
    assert len(block) * 40 < MAX_MEMBER_BYTES
    with pytest.raises(BadReportError, match="its members unpack to more than"):
        check(content.getvalue(), "0" * 32)
