"""
Start the sidecar as a process of its own, which outlives a crash of its client.

The client loads no module of the service for it.
"""

import fcntl
import json
import os
import posix
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from vitalsd.contract.application import Application
from vitalsd.discovery.own_sidecars import own_sidecars
from vitalsd.sidecar.config import DEFAULTS, TIMEOUT, Auth, serve_arguments
from vitalsd.sidecar.frozen import (
    NotRunnableError,
    absolute,
    child_environment,
    is_one_file,
    own_command,
    with_own_files,
    with_own_path,
)
from vitalsd.sidecar.marker import marker_of, why_second_generation
from vitalsd.sidecar.spawned import SidecarProcess, Spawned
from vitalsd.sources.names import publish_names
from vitalsd.sources.programs import main_script

__all__ = ["SpawnError", "spawn"]

MAX_ANSWER_BYTES = 65536
"""Limit of the ready line, and of the part of standard error that is searched for a reason, bytes."""


class SpawnError(RuntimeError):
    """Report that the sidecar did not get ready; ``str(error)`` is the reason, one sentence."""


def spawn(
    pid: int | None = None,
    *,
    exit_with_target: bool = DEFAULTS.exit_with_target,
    port: int | None = DEFAULTS.port,
    tcp: bool = DEFAULTS.tcp,
    uds: str | Path | None = DEFAULTS.uds,
    auth: Auth = DEFAULTS.auth,
    children: bool = DEFAULTS.children,
    app: str | None = DEFAULTS.app,
    app_version: str | None = DEFAULTS.app_version,
    options: Sequence[str] = (),
    command: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT.default,
) -> Spawned:
    """
    Start a sidecar for a process in a process of its own; return once it answers.

    The sidecar has a session of its own, so neither the signals of a terminal nor those of the client's process group
    reach it. Its standard streams are /dev/null, and its working directory is ``/``. It ends 30 s after the target
    (``--linger`` in `options`), so that clients can fetch what was recorded before the exit.

    Args:
        pid: target; default: this process.
        exit_with_target: whether the sidecar ends at once when the target does.
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        tcp: whether to listen on TCP at all.
        uds: path of the Unix socket; default: in the runtime directory.
        auth: ``"token"`` demands the token of the runtime file over TCP.
        children: whether the processes that the target has started, and theirs, are recorded, with their names.
        app: application id, 1 to 64 of ``A-Z a-z 0-9 . _ -``: reports with this id find the runs of this program, from
            wherever and however it is started. Without it, the file of the main module decides.
        app_version: up to 64 printable characters.
        options: more options of ``vitalsd serve``.
        command: how ``vitalsd`` is run; default: by this Python, or by a frozen application itself if that has called
            `vitalsd.freeze_support`.
        env: its environment; default: that of this process, without the variables of a service manager, and for another
            `command` without the library paths of a frozen application.
        timeout_s: limit of the time until it is ready.

    Raises:
        SpawnError: it did not get ready; no process is left behind.
        ValueError: `timeout_s` is out of range, `command` is empty, or `app` or `app_version` cannot be one.
    """
    TIMEOUT.check("timeout_s", timeout_s)
    if command is not None and not command:
        raise ValueError("command is empty")
    application = Application.checked(app, app_version)
    if (reason := why_second_generation()) is not None:
        raise SpawnError(reason)
    own_sidecars()  # Those that have ended are collected.
    program, environ = _program(command, env)
    own = pid is None or pid == os.getpid()
    arguments = serve_arguments(
        pid=os.getpid() if pid is None else pid,
        auth=auth,
        children=children,
        exit_with_target=exit_with_target,
        port=port,
        tcp=tcp,
        uds=None if uds is None else absolute(os.fspath(uds)),
        app=application.app,
        app_version=application.app_version,
        target_script=main_script() if own else None,
    )
    if own:
        publish_names()  # first: the sidecar reads names at once, and those of sleeping threads again much later
    with ExitStack() as opened:
        try:
            pipes = _open_pipes(opened)
            process = _launch([*program, "serve", *arguments], options, pipes, environ, notes_exit=own)
        except OSError as error:
            raise SpawnError(f"cannot run {program[0]}: {error.strerror or error}") from None
        pipes.ready_writer.close()
        import_module("vitalsd.discovery.http_connection")  # `Spawned.mark` needs it; the sidecar starts meanwhile
        spawned = _ready(process, pipes, time.monotonic() + timeout_s, is_launcher=command is None and is_one_file())
        if own:
            spawned.watches_this_process(pipes.note_writer)
        return spawned


def _program(command: Sequence[str] | None, env: Mapping[str, str] | None) -> tuple[list[str], dict[str, str]]:
    """Return how ``vitalsd`` is run, and with what environment; see `spawn`. Raise `SpawnError`: it cannot be run."""
    try:
        program = own_command() if command is None else list(command)
    except NotRunnableError as error:
        raise SpawnError(str(error)) from None
    environ = child_environment(os.environ, own=command is None) if env is None else dict(env)
    if command is None:
        with_own_files(environ)
        program = with_own_path(program, environ)
    if os.sep in program[0]:
        program[0] = absolute(program[0])
    return program, environ


class _Pipes(NamedTuple):
    """Hold the pipes between a client and its sidecar."""

    ready_reader: IO[bytes]
    ready_writer: IO[bytes]
    note_reader: IO[bytes]
    note_writer: IO[bytes]
    log: IO[bytes]
    """Gets the standard error of the sidecar until it is ready."""


def _open_pipes(opened: ExitStack) -> _Pipes:
    """Open the pipes, which `opened` closes. Raise `OSError`."""
    ready_reader, ready_writer = (opened.enter_context(end) for end in _pipe())
    note_reader, note_writer = (opened.enter_context(end) for end in _pipe())
    return _Pipes(ready_reader, ready_writer, note_reader, note_writer, opened.enter_context(_log_file()))


def _launch(
    command: Sequence[str], options: Sequence[str], pipes: _Pipes, environ: dict[str, str], *, notes_exit: bool
) -> SidecarProcess:
    """
    Start the process of a sidecar.

    Args:
        command: the program, with the options that come first.
        options: those that come last, and so take precedence.
        pipes: what the sidecar inherits.
        environ: the environment, without the marker.
        notes_exit: whether this process is the target, and notes on the pipe that it exits by itself.

    Raises:
        OSError: the system starts no process.
    """
    ready_fd, note_fd = pipes.ready_writer.fileno(), pipes.note_reader.fileno()
    descriptors = serve_arguments(ready_fd=ready_fd, exit_note_fd=note_fd if notes_exit else None)
    return SidecarProcess(
        [*command, *descriptors, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=pipes.log,
        pass_fds=(ready_fd, note_fd) if notes_exit else (ready_fd,),
        start_new_session=True,
        cwd="/",  # or a volume of the client could not be unmounted
        env=environ | marker_of(ready_fd),
    )


def _log_file() -> IO[bytes]:
    """Return a file for the standard error of the sidecar; on Linux in memory, for `/tmp` may be read-only."""
    if sys.platform == "linux":
        with suppress(OSError):
            return open(os.memfd_create("vitalsd-stderr"), "w+b")
    return tempfile.TemporaryFile()


def _pipe() -> tuple[FileIO, FileIO]:
    """Return a pipe with both ends above 2: `subprocess` gives 0 to 2 of a sidecar to its standard streams."""
    ends = list(os.pipe())
    try:
        for at, end in enumerate(ends):
            if end <= 2:
                ends[at] = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
                os.close(end)
    except OSError:
        for end in ends:
            os.close(end)
        raise
    return open(ends[0], "rb", buffering=0), open(ends[1], "wb", buffering=0)


def _ready(process: SidecarProcess, pipes: _Pipes, deadline: float, *, is_launcher: bool) -> Spawned:
    """
    Wait until the sidecar answers. If it does not, no process is left behind.

    Args:
        process: the process that was started.
        pipes: those on which the sidecar reports.
        deadline: on the monotonic clock, s.
        is_launcher: whether `process` is the launcher of a one-file application, and the sidecar its child.

    Raises:
        SpawnError: it did not get ready.
    """
    try:
        ready = _answer(process, pipes.ready_reader.fileno(), pipes.log, deadline)
        if not is_launcher:
            ready["pid"] = process.pid  # the pid in the answer may be of another pid namespace
            ready["signals"] = _with_pid(ready["signals"], process.pid)
        return Spawned(process, ready)
    except BaseException:
        process.kill_all()
        process.wait()
        raise


def _answer(process: SidecarProcess, reader: int, log_file: IO[bytes], deadline: float) -> dict[str, Any]:
    """Return the line that the sidecar writes to its ready-fd."""
    # eventlet removes poll(2) from select, select(2) takes no descriptor above 1023, and eventlet's os.read has no
    # time limit.
    os.set_blocking(reader, False)
    content, pause_s = b"", 0.001
    while not content.endswith(b"\n"):
        try:
            chunk = posix.read(reader, 4096)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise SpawnError(f"the sidecar was not ready in time{_last_line(log_file)}") from None
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.01)
            continue
        if not chunk:
            raise SpawnError(_early_end(process, deadline) + _last_line(log_file))
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise SpawnError("the sidecar said more than it should")
    try:
        answer: dict[str, Any] = json.loads(content)
        if (reason := answer.get("error")) is not None:
            raise SpawnError(_one_line(str(reason)))
        ready = {key: answer[key] for key in ("pid", "url", "socket", "runtime_file")}
        notes = tuple(_one_line(str(note)) for note in answer.get("notes") or ())
        return ready | {"notes": notes, "token": answer.get("token"), "signals": answer.get("signals")}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise SpawnError(f"this is no sidecar, it said {content[:80]!r}") from None


def _with_pid(signals: Any, pid: int) -> Any:
    """Return how to find the page of a sidecar, with its pid in our pid namespace."""
    if isinstance(signals, dict) and isinstance(signals.get("path"), str):
        return {"path": re.sub(r"^/proc/[0-9]+/", f"/proc/{pid}/", signals["path"])}
    return signals


def _early_end(process: SidecarProcess, deadline: float) -> str:
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "the sidecar closed its ready-fd and did not end"
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"the sidecar ended {how} before it was ready"


def _last_line(log_file: IO[bytes]) -> str:
    """Return the last line that the sidecar wrote to its standard error, for a sentence."""
    size = log_file.seek(0, os.SEEK_END)
    log_file.seek(max(0, size - MAX_ANSWER_BYTES))
    lines = log_file.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {_one_line(last, 400)}" if last else ""


def _one_line(text: str, *limit: int) -> str:
    """Call `vitalsd.text.one_line`, which is imported only for an error."""
    from vitalsd.text import one_line

    return one_line(text, *limit)
