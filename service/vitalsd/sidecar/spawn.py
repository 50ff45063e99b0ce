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
import posix
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from vitalsd.contract.application import Application
from vitalsd.contract.labels import clean_label
from vitalsd.discovery.own_sidecars import OwnSidecar, announce, own_sidecars, withdraw
from vitalsd.sidecar.frozen import (
    NotRunnableError,
    absolute,
    child_environment,
    is_one_file,
    own_command,
    with_own_files,
    with_own_path,
)
from vitalsd.sources.names import publish_names
from vitalsd.sources.programs import main_script

__all__ = ["ExitNote", "ReadyFd", "SpawnError", "Spawned", "died_of_exception", "spawn", "taken_for_sidecar"]

log = logging.getLogger("vitalsd")

MAX_ANSWER_BYTES = 65536
EXIT_NOTE = b"exit"
MARKER = "VITALSD_SPAWNED"
"""
Variable in the environment of a sidecar that `spawn` started: the pid of its client, the number and the inode of its
ready-fd.
"""
MARK_S = 0.25
"""For a mark to be recorded: the thread that sets it may be that of a user interface."""


class SpawnError(RuntimeError):
    """Report that the sidecar did not get ready; ``str(error)`` is the reason, one sentence."""


class ReadyFd:
    """
    The sidecar's end of the agreement: one line of JSON on a descriptor, which is then closed.

    ``{"pid": ..., "url": ..., "socket": ..., "runtime_file": ..., "notes": [...]}`` or ``{"error": "a sentence"}``; for
    `spawn` also the token.

    Args:
        fd: ``None``: no process reads an answer.

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
        """Write the answer once; a reader that has closed the pipe is ignored."""
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


class _ExitNoteWriter:
    """
    The client's end of that pipe: the note is written at the exit of the interpreter.

    Args:
        fd: it is kept open until `close`, or until this process ends.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._file = os.fstat(fd)
        self._owner = os.getpid()
        atexit.register(self._write)

    def close(self) -> None:
        """Close the pipe; nothing is written. A second call does nothing."""
        atexit.unregister(self._write)
        if self._is_ours():
            os.close(self._fd)
        self._owner = -1

    def _is_ours(self) -> bool:
        """Return False in a forked child, or if the descriptor is another file now."""
        try:
            return os.getpid() == self._owner and os.path.samestat(os.fstat(self._fd), self._file)
        except OSError:
            return False

    def _write(self) -> None:
        if not died_of_exception() and self._is_ours():
            with suppress(OSError):
                posix.write(self._fd, EXIT_NOTE)  # that of os waits for ever under eventlet, if the sidecar has ended


def died_of_exception() -> bool:
    """Return whether this interpreter exits because of an exception that no code caught; SystemExit is none."""
    return getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")


class _Process(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """Suppress the ResourceWarning: a sidecar may outlive this object, and the next Popen reaps it."""
        super().__del__(_warn=lambda *_, **__: None)  # type: ignore[call-arg]

    def kill_all(self) -> None:
        """Send SIGKILL to its process group: a one-file application is a launcher and the child that it waits for."""
        if self.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Spawned:
    """
    A sidecar running alongside; made by `spawn`.

    It need not be kept. As a context manager it stops the sidecar at the end.
    """

    def __init__(self, process: _Process, ready: Mapping[str, Any]) -> None:
        self._process = process
        self.pid: int = ready["pid"]
        """The sidecar's own process id; that of a one-file application is not that of its launcher."""
        self.url: str | None = ready["url"]
        """Base URL over TCP; ``None`` without TCP."""
        self.socket: str | None = ready["socket"]
        """Path of the Unix socket; ``None`` if there is none."""
        self.runtime_file: Path | None = ready["runtime_file"] and Path(ready["runtime_file"])
        """Where the token is, if there is one."""
        self.notes: tuple[str, ...] = ready["notes"]
        """What is other than was to be expected, such as a port that was taken, in sentences."""
        self._token: str | None = ready.get("token")
        self._owner = os.getpid()
        self._own_target = False
        """Whether it watches this process."""
        self._exit_note: _ExitNoteWriter | None = None
        self._own = OwnSidecar.at(self.socket, self.url, self._token, lambda: self.running)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        if self._owner != os.getpid():  # In a forked child it is no child.
            with suppress(PermissionError):
                try:
                    os.kill(self.pid, 0)
                except ProcessLookupError:
                    return False
            return True
        if self._process.poll() is None:
            return True
        self._release()
        return False

    def _release(self) -> None:
        """Forget a sidecar that has ended. A second call does nothing."""
        withdraw(self._own)
        if self._exit_note is not None:
            self._exit_note.close()

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
        if self._own_target:
            publish_names()
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
                if self._token is not None:
                    headers["Authorization"] = f"Bearer {self._token}"
            with Connection(place, time.monotonic() + MARK_S) as connection:
                content = json.dumps(body).encode()
                answer = connection.request(path, method="POST", headers=headers, body=content, max_bytes=4096)
        except (ExchangeError, OSError) as error:
            return str(error)
        return None if answer.status < 300 else f"the sidecar answered {answer.status}"

    def stop(self, timeout_s: float = 5.0) -> int:
        """
        End it by SIGTERM and, after `timeout_s`, by SIGKILL. A second call does nothing.

        Returns:
            Its exit status; negative: the signal.
        """
        if self.running:
            # Of a one-file application not to the launcher, which may be removing the unpacked files already.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill_all()
            return self._process.wait()
        finally:
            self._release()

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
    process group reach it, its standard streams are /dev/null, and its working directory is ``/``. When the
    target has exited it goes on for 30 s (``--linger`` in `options`), so that what led up to it can be fetched, and
    then ends.

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
        command: how ``vitalsd`` is run; default: by this Python, or by a frozen application itself if that has called
            `vitalsd.freeze_support`.
        env: its environment; default: that of this process, without the variables of a service manager, and for another
            `command` without the library paths of a frozen application.
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
    _refuse_second_generation()
    own_sidecars()  # Those that have ended are collected.
    try:
        program = own_command() if command is None else list(command)
    except NotRunnableError as error:
        raise SpawnError(str(error)) from None
    child = child_environment(os.environ, own=command is None) if env is None else dict(env)
    if command is None:
        with_own_files(child)
        program = with_own_path(program, child)
    if os.sep in program[0]:
        program[0] = absolute(program[0])
    arguments = ["serve", "--pid", str(os.getpid() if pid is None else pid), "--auth", auth]
    arguments += ["--exit-with-target"] if exit_with_target else []
    arguments += ["--port", str(port)] if port is not None else []
    arguments += [] if tcp else ["--no-tcp"]
    arguments += ["--uds", absolute(os.fspath(uds))] if uds is not None else []
    arguments += ["--app", application.app] if application.app is not None else []
    arguments += ["--app-version", application.app_version] if application.app_version is not None else []
    own = pid is None or pid == os.getpid()
    if own and (script := main_script()) is not None:
        arguments += ["--target-script", script]

    if own:
        publish_names()  # first: the sidecar reads names at once, and those of sleeping threads again much later
    with ExitStack() as opened:
        try:
            reader, writer = (opened.enter_context(end) for end in _pipe())
            note_reader, note_writer = (opened.enter_context(end) for end in _pipe())
            log_file = opened.enter_context(_log_file())
            child[MARKER] = f"{os.getpid()}:{writer.fileno()}:{os.fstat(writer.fileno()).st_ino}"
            arguments += ["--exit-note-fd", str(note_reader.fileno())] if own else []
            process = _Process(
                [*program, *arguments, "--ready-fd", str(writer.fileno()), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log_file,
                pass_fds=(writer.fileno(), note_reader.fileno()) if own else (writer.fileno(),),
                start_new_session=True,
                cwd="/",  # or a volume of the client could not be unmounted
                env=child,
            )
        except OSError as error:
            raise SpawnError(f"cannot run {program[0]}: {error.strerror or error}") from None
        writer.close()
        import_module("vitalsd.discovery.http_connection")  # for `Spawned.mark`, while the sidecar starts
        try:
            ready = _answer(process, reader.fileno(), log_file, time.monotonic() + timeout_s)
            if not (command is None and is_one_file()):
                ready["pid"] = process.pid  # what another command says may be of another pid namespace
            spawned = Spawned(process, ready)
        except BaseException:
            process.kill_all()
            process.wait()
            raise
        if own:
            spawned._own_target = True
            spawned._exit_note = _ExitNoteWriter(fcntl.fcntl(note_writer, fcntl.F_DUPFD_CLOEXEC, 3))
            announce(spawned._own)
        return spawned


class _SecondGeneration:
    """What is one per process."""

    reason: str | None = None
    """Why this process may start no sidecar."""
    known = False
    """Whether the variable in the environment has been judged."""
    lock = Lock()
    """It is held in a process that is the application once more, and in no other."""


def _refuse_second_generation() -> None:
    """
    Raise `SpawnError` if this process was to be a sidecar, and is the application once more.

    That is so where `sys.executable` is the application though nothing says that it is frozen. The first process, which
    waits for its sidecar, is given the reason. Each later call is refused too, and so are processes that this one
    starts while the first one lives.
    """
    if not _SecondGeneration.known and (marker := _marker()) is not None:
        with _SecondGeneration.lock:
            if not _SecondGeneration.known:
                _SecondGeneration.reason, _SecondGeneration.known = _why_refused(marker), True
    if _SecondGeneration.reason is not None:
        raise SpawnError(_SecondGeneration.reason)


def _why_refused(marker: tuple[int, int, int]) -> str | None:
    """Return the reason, and give it to the process that waits for it; ``None``: that one has ended long ago."""
    waits = _is_ready_fd(marker)
    if not waits and not _lives(marker[0]):
        return None
    reason = (
        f"to run {sys.executable} as a sidecar starts the application again, so it is no Python interpreter: call"
        ' vitalsd.freeze_support() first in its main module, or pass command=["/path/to/vitalsd"]'
    )
    if waits:
        with suppress(OSError):
            ReadyFd(marker[1]).send(error=reason)
    return reason


def taken_for_sidecar(fd: int | None) -> bool:
    """
    Return whether `spawn` started this process, and forget it, so that no process started from here believes it.

    Args:
        fd: the ready-fd.
    """
    marker = _marker()
    os.environ.pop(MARKER, None)
    return marker is not None and marker[1] == fd and _is_ready_fd(marker)


def _marker() -> tuple[int, int, int] | None:
    """Return pid, descriptor and inode; ``None`` if there are none, or `spawn` did not write them."""
    found = re.fullmatch(r"(\d{1,10}):(\d{1,9}):(\d{1,20})", os.environ.get(MARKER, ""))
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def _is_ready_fd(marker: tuple[int, int, int]) -> bool:
    """Return whether the pipe to the client is open here."""
    _, fd, inode = marker
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return fd > 2 and stat.S_ISFIFO(status.st_mode) and status.st_ino == inode


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return pid != os.getpid()


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


def _answer(process: _Process, reader: int, log_file: IO[bytes], deadline: float) -> dict[str, Any]:
    """Return the line that the sidecar writes to its ready-fd."""
    # Not poll(2), which eventlet removes from select, nor select(2), which knows no descriptor above 1023. The read
    # of eventlet's os waits without an end.
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
        return ready | {"notes": notes, "token": answer.get("token")}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise SpawnError(f"this is no sidecar, it said {content[:80]!r}") from None


def _early_end(process: _Process, deadline: float) -> str:
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
    """See `vitalsd.text.one_line`, which is imported only for an error."""
    from vitalsd.text import one_line

    return one_line(text, *limit)
