"""
Receive bug reports that `vitalsd_client.Spool` uploads: an example of a server.

    python clients/examples/receiver.py --store DIR [--port 8080]

A sender relies on the following:

- the server checks the zip against its manifest, and the manifest against the upload, before it accepts a report;
- it stores complete files only, under names that it chooses itself;
- a second upload with the same ``Idempotency-Key`` gets the same receipt and stores no second copy;
- the receipt contains the report's id and SHA-256, so an answer of a captive portal is not taken for a receipt.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, File, Header, HTTPException, UploadFile
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOAD_BYTES = 64 << 20
"""Limit for a report."""
MAX_FORM_BYTES = 64 << 10
"""Limit for the multipart boundaries and names that the form adds to the report."""
MAX_DISCARDED_BYTES = 256 << 20
"""Bytes to read and discard of an upload that is too large: a client reads the 413 only when it has sent its body."""
MAX_MEMBER_BYTES = 50 << 20
"""Limit for one member, unpacked."""
MAX_MEMBERS_BYTES = 128 << 20
"""Limit for all members together, unpacked."""
TOO_LARGE = f"the report is too large: send at most {MAX_UPLOAD_BYTES >> 20} MiB"
MAX_RATIO = 100
"""Limit for the compression ratio of a member, against zip bombs."""
MAX_MEMBERS = 200
"""Limit for the number of members."""
KEY = re.compile(r"[0-9a-f]{32}", re.ASCII)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Allowed compression methods. For the others, zipfile unpacks more bytes than a read asks for."""
MEMBER = re.compile(r"(attachments/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,100}", re.ASCII)


class BadReportError(Exception):
    """Report that an upload is not a valid report; ``str(error)`` is the reason."""


def check(content: bytes, report_id: str) -> None:
    """
    Check a zip against its manifest and its id, without writing to disk.

    Raises:
        BadReportError: the zip is damaged or too large, or differs from its manifest.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise BadReportError(f"{len(members)} members")
            found: dict[str, tuple[int, str]] = {}
            room = MAX_MEMBERS_BYTES
            for info in members:
                if not MEMBER.fullmatch(info.filename) or info.filename in found:
                    raise BadReportError("a member has a bad name")
                if info.file_size > min(MAX_MEMBER_BYTES, MAX_RATIO * max(info.compress_size, 1024)):
                    raise BadReportError(f"{info.filename} unpacks to {info.file_size} bytes")
                room -= info.file_size
                if room < 0:
                    raise BadReportError(f"its members unpack to more than {MAX_MEMBERS_BYTES} bytes")
                if info.compress_type not in METHODS:
                    raise BadReportError(f"{info.filename} is compressed by method {info.compress_type}")
                body = _unpacked(archive, info)
                found[info.filename] = len(body), hashlib.sha256(body).hexdigest()
            manifest = json.loads(_unpacked(archive, archive.getinfo("manifest.json")))
            found.pop("manifest.json")
            listed = {each["name"]: (each["size"], each["sha256"]) for each in manifest["members"]}
            named = manifest["report_id"]
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, EOFError, RuntimeError) as error:
        raise BadReportError(f"{type(error).__name__}: {error}") from None
    if listed != found:
        raise BadReportError("its members are not those of its manifest")
    if named != report_id:
        raise BadReportError("it is another report than its key says")


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member, up to one byte more than its header declares; `ZipFile.read` has no limit."""
    with archive.open(info) as member:
        return member.read(info.file_size + 1)


def store(directory: Path, report_id: str, content: bytes) -> tuple[str, str]:
    """
    Store a report once; return its receipt number and the SHA-256 of the file stored under its id.

    link(2) does not replace a file, so of two uploads at the same time one is stored, and both calls return that one.
    """
    kept = directory / f"{report_id}.zip"
    temporary = directory / f".{report_id}.{secrets.token_hex(8)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, kept)
    finally:
        os.unlink(temporary)
    return f"R-{report_id[:12]}", hashlib.sha256(kept.read_bytes()).hexdigest()


class BodyLimit:
    """
    Answer 413 to a body that is too large, before any of it is written to a temporary file; an ASGI middleware.

    Args:
        app: the application.
        limit: size of a body, bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; answer 413 as soon as the declared or the received length is above the limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                await _discard(receive, message, read)
                raise HTTPException(413, TOO_LARGE)
            return message

        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            await _discard(receive, None, 0)
            await JSONResponse({"detail": TOO_LARGE}, 413)(scope, receive, send)
        else:
            await self._app(scope, bounded, send)


async def _discard(receive: Receive, message: Message | None, read: int) -> None:
    """Read and discard the rest of a body, up to `MAX_DISCARDED_BYTES`; `read` bytes of it were read before."""
    while read < MAX_DISCARDED_BYTES and (message is None or message.get("more_body", False)):
        message = await receive()
        read += len(message.get("body", b""))


def create_app(directory: Path) -> FastAPI:
    """Return the application, which stores reports in `directory`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    app = FastAPI(title="Receiver of bug reports", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=MAX_UPLOAD_BYTES + MAX_FORM_BYTES)

    @app.post("/reports", status_code=201)
    def receive(
        report: Annotated[UploadFile, File()],
        idempotency_key: Annotated[str, Header()],
        x_content_sha256: Annotated[str, Header()],
    ) -> dict[str, Any]:
        if not KEY.fullmatch(idempotency_key):
            raise HTTPException(400, "Idempotency-Key must be 32 hexadecimal digits")
        content = report.file.read(MAX_UPLOAD_BYTES + 1)
        if len(content) > MAX_UPLOAD_BYTES:
            raise HTTPException(413, TOO_LARGE)
        if hashlib.sha256(content).hexdigest() != x_content_sha256:
            raise HTTPException(408, "the report was damaged on its way; send it again")
        try:
            check(content, idempotency_key)
        except BadReportError as error:
            raise HTTPException(422, str(error)) from None
        number, sha256 = store(directory, idempotency_key, content)
        if sha256 != x_content_sha256:
            raise HTTPException(409, "another report has this key")
        return {"receipt": number, "report_id": idempotency_key, "sha256": sha256}

    return app


def main() -> None:
    """Run the server until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="directory for the reports")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    uvicorn.run(create_app(options.store), host=options.host, port=options.port, proxy_headers=False)


if __name__ == "__main__":
    main()
