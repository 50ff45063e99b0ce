"""
The sidecar alongside its client: a process of its own that outlives a crash.

Of the standard library alone: the client does not load the service.
"""

import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

__all__ = ["ReadyFd", "SpawnError", "Spawned", "spawn"]

MAX_ANSWER_BYTES = 65536


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
        options: more options of ``vitalsd serve``.
        command: how ``vitalsd`` is run; default: by this Python. To be given where `sys.executable`
            is no Python, as in a frozen application.
        env: its environment; default: that of this process.
        timeout_s: to get ready.

    Raises:
        SpawnError: it did not get ready; no process is left behind.
        ValueError: `timeout_s` is out of range, or `command` is empty.
    """
    if not 0 <= timeout_s <= 3600:
        raise ValueError("timeout_s is from 0 to 3600")
    if command is not None and not command:
        raise ValueError("command is empty")
    # -P: a vitalsd.py in the client's working directory must not be taken for this one.
    program = [sys.executable, "-P", "-m", "vitalsd"] if command is None else list(command)
    arguments = ["serve", "--pid", str(os.getpid() if pid is None else pid), "--auth", auth]
    arguments += ["--exit-with-target"] if exit_with_target else []
    arguments += ["--port", str(port)] if port is not None else []
    arguments += [] if tcp else ["--no-tcp"]
    arguments += ["--uds", str(uds)] if uds is not None else []

    reader, writer = os.pipe()
    try:
        try:
            process = _Process(
                [*program, *arguments, "--ready-fd", str(writer), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writer,),
                start_new_session=True,
                env=env,
            )
        except OSError as error:
            raise SpawnError(f"cannot run {program[0]}: {error.strerror}") from None
        finally:
            os.close(writer)
        try:
            return Spawned(process, _answer(process, reader, time.monotonic() + timeout_s))
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            raise
    finally:
        os.close(reader)


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
