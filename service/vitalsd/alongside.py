"""
The sidecar alongside its client: a process of its own that outlives a crash.

The client does not load the service for it.
"""

import atexit
import errno
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from vitalsd import endpoint as runtime_file
from vitalsd.contract.application import Application
from vitalsd.contract.labels import clean_label
from vitalsd.directories import EndpointError
from vitalsd.sources.programs import main_script

__all__ = ["ExitNote", "ReadyFd", "SpawnError", "Spawned", "spawn"]

log = logging.getLogger("vitalsd")

MAX_ANSWER_BYTES = 65536
EXIT_NOTE = b"exit"
MARK_S = 0.25
"""For a mark to be recorded: the thread that sets it may be that of a user interface."""


class SpawnError(RuntimeError):
    """The sidecar did not get ready; ``str(error)`` says why in a sentence."""


class ReadyFd:
    """
    The sidecar's end of the agreement: one line of JSON on a descriptor, which is then closed.

    ``{"pid": ..., "url": ..., "socket": ..., "runtime_file": ...}`` or ``{"error": "a sentence"}``.

    Args:
        fd: ``None``: nobody waits.

    Raises:
        OSError: `fd` is not open.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "it cannot be written to")

    def send(self, **answer: Any) -> None:
        """Tell it, once; a reader that has gone away is none of our business."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(BrokenPipeError), os.fdopen(fd, "wb") as pipe:
                pipe.write(json.dumps(answer).encode() + b"\n")


class ExitNote:
    """
    The sidecar's end of a pipe on which the client notes that it exits by itself.

    Linux before 6.15 shows the exit status of a process to its parent alone, so without this note each normal exit of a
    client would pass for a crash. A client that crashes writes nothing.

    Args:
        fd: ``None``: the client gives no notes.

    Raises:
        OSError: `fd` is not open.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)
            os.set_blocking(fd, False)

    def received(self) -> bool:
        """Return whether the client has written its note."""
        if self._fd is None:
            return False
        with suppress(OSError):
            return os.read(self._fd, len(EXIT_NOTE)) == EXIT_NOTE
        return False


def _note_exit(fd: int, pipe: tuple[int, int], pid: int) -> None:
    """Write the note at the exit of the interpreter; in a forked child, or if `fd` is another file now, do nothing."""
    with suppress(OSError):
        found = os.fstat(fd)
        if os.getpid() == pid and (found.st_dev, found.st_ino) == pipe:
            os.write(fd, EXIT_NOTE)


class _Process(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """As ever, the next Popen collects it; but that it outlives its keeper is no reason for a warning."""
        super().__del__(_warn=lambda *_, **__: None)  # type: ignore[call-arg]


class Spawned:
    """
    A sidecar running alongside; made by `spawn`.

    It need not be kept. As a context manager it stops the sidecar at the end.
    """

    def __init__(self, process: _Process, ready: Mapping[str, Any]) -> None:
        self._process = process
        self.url: str | None = ready["url"]
        """Base URL over TCP; ``None`` without TCP."""
        self.socket: str | None = ready["socket"]
        """Path of the Unix socket; ``None`` if there is none."""
        self.runtime_file: Path | None = ready["runtime_file"] and Path(ready["runtime_file"])
        """Where the token is, if there is one."""

    @property
    def pid(self) -> int:
        """The sidecar's own process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def mark(self, label: str) -> bool:
        """
        Put a label on the recorder's clock; from any thread. It never raises, and returns within 0.25 s.

        Args:
            label: text; what a label cannot have is replaced, see `clean_label`.

        Returns:
            Whether the sidecar recorded it; if not, the logger ``vitalsd`` has the reason.
        """
        cleaned = clean_label(label)
        if cleaned is None:
            return False
        reason = self._post("/marks", {"label": cleaned}) if self.running else "its sidecar has ended"
        if reason is not None:
            log.warning("the mark %r was not recorded: %s", cleaned, reason)
        return reason is None

    def _post(self, path: str, body: Mapping[str, Any]) -> str | None:
        """Send JSON; return why it was not accepted, ``None`` if it was."""
        from vitalsd.discovery.http_connection import Connection, ExchangeError

        headers = {"Content-Type": "application/json"}
        try:
            if self.socket is not None:
                place: str | tuple[str, int] = self.socket
            else:
                parts = urlsplit(self.url or "")
                place = parts.hostname or "", parts.port or 0
                # No proof is asked for: the process that has the port is a child of this one, and it runs.
                if self.runtime_file is not None and (token := runtime_file.read(self.runtime_file).token):
                    headers["Authorization"] = f"Bearer {token}"
            with Connection(place, time.monotonic() + MARK_S) as connection:
                content = json.dumps(body).encode()
                answer = connection.request(path, method="POST", headers=headers, body=content, max_bytes=4096)
        except (ExchangeError, EndpointError, OSError) as error:
            return str(error)
        return None if answer.status < 300 else f"the sidecar answered {answer.status}"

    def stop(self, timeout_s: float = 5.0) -> int:
        """
        End it by SIGTERM and, after `timeout_s`, by SIGKILL. A second call does nothing.

        Returns:
            Its exit status; negative: the signal.
        """
        self._process.terminate()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> "Spawned":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def spawn(
    pid: int | None = None,
    *,
    exit_with_target: bool = False,
    port: int | None = None,
    tcp: bool = True,
    uds: str | Path | None = None,
    auth: Literal["none", "token"] = "none",
    app: str | None = None,
    app_version: str | None = None,
    options: Sequence[str] = (),
    command: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> Spawned:
    """
    Start a sidecar for a process in a process of its own; return once it answers.

    It has a session of its own, so neither the signals of a terminal nor those of the client's
    process group reach it, and its standard streams are /dev/null. When the target has exited it
    goes on for 30 s (``--linger`` in `options`), so that what led up to it can be fetched, and then ends.

    Args:
        pid: target; default: this process.
        exit_with_target: end at once when the target does.
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        tcp: whether to listen on TCP at all.
        uds: path of the Unix socket; default: in the runtime directory.
        auth: ``"token"`` demands the token of the runtime file over TCP.
        app: application id, 1 to 64 of ``A-Z a-z 0-9 . _ -``: reports with this id find the runs of this program, from
            wherever and however it is started. Without it, the file of the main module decides.
        app_version: up to 64 printable characters.
        options: more options of ``vitalsd serve``.
        command: how ``vitalsd`` is run; default: by this Python. To be given where `sys.executable`
            is no Python, as in a frozen application.
        env: its environment; default: that of this process.
        timeout_s: to get ready.

    Raises:
        SpawnError: it did not get ready; no process is left behind.
        ValueError: `timeout_s` is out of range, `command` is empty, or `app` or `app_version` cannot be one.
    """
    if not 0 <= timeout_s <= 3600:
        raise ValueError("timeout_s is from 0 to 3600")
    if command is not None and not command:
        raise ValueError("command is empty")
    application = Application.checked(app, app_version)
    # -P: a vitalsd.py in the client's working directory must not be taken for this one.
    program = [sys.executable, "-P", "-m", "vitalsd"] if command is None else list(command)
    arguments = ["serve", "--pid", str(os.getpid() if pid is None else pid), "--auth", auth]
    arguments += ["--exit-with-target"] if exit_with_target else []
    arguments += ["--port", str(port)] if port is not None else []
    arguments += [] if tcp else ["--no-tcp"]
    arguments += ["--uds", str(uds)] if uds is not None else []
    arguments += ["--app", application.app] if application.app is not None else []
    arguments += ["--app-version", application.app_version] if application.app_version is not None else []
    own = pid is None or pid == os.getpid()
    if own and (script := main_script()) is not None:
        arguments += ["--target-script", script]

    reader, writer = os.pipe()
    note_reader, note_writer = os.pipe() if own else (-1, -1)
    arguments += ["--exit-note-fd", str(note_reader)] if own else []
    try:
        try:
            process = _Process(
                [*program, *arguments, "--ready-fd", str(writer), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writer, note_reader) if own else (writer,),
                start_new_session=True,
                env=env,
            )
        except OSError as error:
            raise SpawnError(f"cannot run {program[0]}: {error.strerror}") from None
        finally:
            os.close(writer)
        import_module("vitalsd.discovery.http_connection")  # for `Spawned.mark`, while the sidecar starts
        try:
            spawned = Spawned(process, _answer(process, reader, time.monotonic() + timeout_s))
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            raise
        if own:
            pipe = os.fstat(note_writer)
            atexit.register(_note_exit, note_writer, (pipe.st_dev, pipe.st_ino), os.getpid())
            note_writer = -1  # it stays open until this process ends
        return spawned
    finally:
        for fd in (reader, note_reader, note_writer):
            if fd >= 0:
                os.close(fd)


def _answer(process: _Process, reader: int, deadline: float) -> dict[str, Any]:
    """The line that the sidecar writes to its ready-fd."""
    ready = select.poll()  # select(2) knows no descriptor above 1023
    ready.register(reader, select.POLLIN)
    content = b""
    while not content.endswith(b"\n"):
        wait_s = deadline - time.monotonic()
        if wait_s <= 0 or not ready.poll(wait_s * 1000):
            raise SpawnError("the sidecar was not ready in time")
        chunk = os.read(reader, 4096)
        if not chunk:
            try:
                status = process.wait(deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                raise SpawnError("the sidecar closed its ready-fd and did not end") from None
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            raise SpawnError(f"the sidecar ended {how} before it was ready; see: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise SpawnError("the sidecar said more than it should")
    try:
        answer: dict[str, Any] = json.loads(content)
        if (reason := answer.get("error")) is not None:
            raise SpawnError(str(reason))
        return {key: answer[key] for key in ("url", "socket", "runtime_file")}
    except (ValueError, AttributeError, KeyError):
        raise SpawnError(f"this is no sidecar, it said {content[:80]!r}") from None
