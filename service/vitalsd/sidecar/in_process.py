"""The sidecar inside its client: one thread with an event loop of its own."""

import asyncio
import atexit
import logging
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

from vitalsd.contract.application import Application
from vitalsd.contract.labels import clean_label
from vitalsd.discovery import runtime_file as endpoints
from vitalsd.discovery.own_sidecars import OwnSidecar, announce, withdraw
from vitalsd.discovery.program_key import program_key
from vitalsd.discovery.runtime_file import Endpoint, Target
from vitalsd.http.app import create_app
from vitalsd.recording.recorder import NotRecording, RecorderConfig
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.sidecar.listeners import listen
from vitalsd.sidecar.service import Service, run_directory, runtime_directory
from vitalsd.sidecar.spawn import died_of_exception
from vitalsd.sources import hides_processes, list_processes, open_source
from vitalsd.sources.base import Source
from vitalsd.sources.names import PythonNames
from vitalsd.sources.platform import births
from vitalsd.sources.process_identity import Undecided
from vitalsd.sources.programs import ProgramDigest, main_script
from vitalsd.worker_thread import Worker, start_thread

__all__ = ["Sidecar", "StartError", "start"]

log = logging.getLogger("vitalsd")

IMPORTLIB = "<frozen importlib._bootstrap>"
"""File name of the frames of an import."""
GRACE_S = 0.5
FORK_S = 0.5
"""A fork waits so long for each who reads or writes; one that hangs does not hold it up for more."""
IMPORT_S = 5.0
"""A fork waits so long for a thread of the sidecar that imports: the lock of that import would stay in the child."""
STOP_S = 2.0
"""How long the exit of the host may be held up. A thread that does not end is left behind: it is a daemon."""


class StartError(RuntimeError):
    """The sidecar could not be started, and nothing of it is left; ``str(error)`` says why."""


class _PausableLoop:
    """
    The event loop of a sidecar, which rests while the host forks.

    Args:
        loop: runs on another thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._resting = threading.Lock()
        """Held until `resume`. Not an Event, which has a lock of its own that could stay held in the child."""

    def pause(self, timeout_s: float) -> bool:
        """Let the callback under way end and none begin until `resume`; False if it takes longer."""
        rests, resting = threading.Event(), threading.Lock()
        resting.acquire()

        def rest() -> None:
            rests.set()
            resting.acquire()

        try:
            self._loop.call_soon_threadsafe(rest)
        except RuntimeError:  # it is closed
            return False
        if rests.wait(timeout_s):
            self._resting = resting
            return True
        resting.release()
        return False

    def resume(self) -> None:
        """After a `pause` that was granted; in the child as well."""
        self._resting.release()


Pausable = Worker | _PausableLoop
"""What is in SQLite, the kernel or an import on a thread of its own, and rests while the host forks."""


def _imports() -> bool:
    """Return whether another thread of the sidecar is importing a module now."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name.startswith("vitalsd") and thread is not threading.current_thread():
            frame = frames.get(thread.ident or 0)
            while frame is not None:
                if frame.f_code.co_filename == IMPORTLIB:
                    return True
                frame = frame.f_back
    return False


class Sidecar:
    """
    A sidecar running in this process; made by `start`.

    A context manager that stops it. In a forked child it is closed, and the child may `start` its own.
    """

    def __init__(
        self, service: Service, sampler: Sampler, shelf: RunDirectoryReader | None, workers: Sequence[Worker]
    ) -> None:
        self._service = service
        self._sampler = sampler
        self._shelf = shelf
        self._workers = workers
        self._own = OwnSidecar.at(
            service.endpoint.socket, service.endpoint.url, service.endpoint.token, lambda: self.running
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._stopping = False
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="vitalsd", daemon=True)

    @property
    def endpoint(self) -> Endpoint:
        """All that the runtime file says."""
        return self._service.endpoint

    @property
    def url(self) -> str | None:
        """Base URL over TCP; ``None`` without TCP."""
        return self.endpoint.url

    @property
    def socket(self) -> str | None:
        """Path of the Unix socket; ``None`` if there is none."""
        return self.endpoint.socket

    @property
    def notes(self) -> tuple[str, ...]:
        """What is other than was to be expected, such as a port that was taken, in sentences."""
        return tuple(self._service.notes)

    @property
    def running(self) -> bool:
        """Whether it answers, in this process."""
        return os.getpid() == self._pid and self._thread.is_alive()

    def mark(self, label: str) -> bool:
        """
        Put a label on the recorder's clock; from any thread. It never raises.

        Args:
            label: text; what a label cannot have is replaced, see `clean_label`.

        Returns:
            Whether it was recorded; if not, the logger ``vitalsd`` has the reason.
        """
        cleaned = clean_label(label)
        if cleaned is None or not self.running:
            return False
        try:
            self._sampler.recorder.mark(cleaned)
        except NotRecording as error:
            if not self._stopping:
                log.warning("the mark %r was not recorded: %s", cleaned, error)
            return False
        return True

    def stop(self) -> None:
        """End it, within 2 s. A second call does nothing, and neither does one in a forked child."""
        atexit.unregister(self._exit)
        withdraw(self._own)
        if os.getpid() != self._pid:
            return
        self._stopping = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._service.stop)
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        self._service.close()
        # FastAPI keeps the functions of thousands of routes, and with them all that ours know.
        self._sampler.discard()

    def __enter__(self) -> "Sidecar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _pause(self) -> "list[Pausable]":
        """
        Return what rests now until its `resume`.

        First the event loop, which gives calls to the others; then the sampler, which may be opening the black box.
        """
        paused: list[Pausable] = []
        deadline = time.monotonic() + IMPORT_S

        def pause(each: Pausable | None) -> None:
            while each is not None:
                if each.pause(FORK_S):
                    paused.append(each)
                    return
                if time.monotonic() >= deadline or not _imports():
                    return

        if self._loop is not None and threading.current_thread() is not self._thread:
            pause(_PausableLoop(self._loop))
        pause(self._sampler.worker)
        blackbox = self._sampler.recorder.blackbox
        pause(None if blackbox is None else blackbox.worker)
        for each in (None if self._shelf is None else self._shelf.worker, *self._workers):
            pause(each)
        while _imports() and time.monotonic() < deadline:  # a thread of the client, which does not rest
            time.sleep(0.001)
        return paused

    def _forget(self) -> None:
        self._service.forget()
        self._sampler.recorder.forget()

    def _exit(self) -> None:
        """End it with the interpreter: an exception that the program did not catch is a crash of it."""
        if died_of_exception() and self.running:
            self._sampler.recorder.crashed("an exception that was not caught ended the program")
        self.stop()

    def _start(self, timeout_s: float) -> None:
        try:
            start_thread(self._thread)
            wait((self._started,), timeout_s)
            if not self._started.done():
                raise TimeoutError(f"the sidecar was not ready within {timeout_s:g} s")
            self._started.result()
        except BaseException:
            self.stop()
            # A thread that still runs closes the record of its sampler itself, for which it needs a worker.
            if not self._thread.is_alive():
                self._abandon()
            raise
        atexit.register(self._exit)
        announce(self._own)

    def _abandon(self) -> None:
        """End the workers of a sidecar if its event loop never ran; an event loop ends them itself."""
        self._sampler.worker.stop(0)
        for worker in self._workers:
            worker.stop(0)
        if self._shelf is not None:
            self._shelf.worker.stop(0)

    def _run(self) -> None:
        try:
            # With a factory neither the loop policy nor the current loop of the host is touched.
            with asyncio.Runner(loop_factory=_EventLoop) as runner:
                self._loop = runner.get_loop()
                if self._stopping:
                    self._service.stop()
                runner.run(self._service.run(partial(self._started.set_result, None)))
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)


class _EventLoop(asyncio.SelectorEventLoop):
    """
    An event loop that leaves nothing if it cannot be made, for want of descriptors.

    Python closes such a one when it is collected, and prints that it lacks an attribute.
    """

    _made = False

    def __init__(self) -> None:
        selector = selectors.DefaultSelector()
        try:
            super().__init__(selector)
        except BaseException:
            selector.close()
            raise
        self._made = True

    def __del__(self) -> None:
        if self._made:
            super().__del__()


class _Process:
    """What is one per process and not per caller: the sidecar that was started first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sidecar: Sidecar | None = None
        self._parents: list[Sidecar] = []
        self._fork_hook = False
        self._forking = threading.local()

    def start(self, make: Callable[[], Sidecar], timeout_s: float) -> Sidecar:
        with self._lock:
            if self._sidecar is None or not self._sidecar.running:
                if not self._fork_hook:
                    os.register_at_fork(
                        before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._forked
                    )
                    self._fork_hook = True
                try:
                    sidecar = make()
                    self._sidecar = sidecar  # before the start: a child that is forked meanwhile lets go of it
                    sidecar._start(timeout_s)
                except TimeoutError:  # is an OSError
                    self._sidecar = None
                    raise
                except (RuntimeError, Undecided, OSError) as error:
                    self._sidecar = None
                    why = error.strerror if isinstance(error, OSError) and error.filename is None else None
                    raise StartError(f"the sidecar could not be started: {why or error}") from error
                except BaseException:
                    self._sidecar = None
                    raise
            return self._sidecar

    def _before_fork(self) -> None:
        """What SQLite locks for what is under way would stay locked in the child, for all who use SQLite."""
        forks: list[list[Pausable]] = self._forking.__dict__.setdefault("forks", [])
        # A signal handler may fork in the middle of a fork: then all rests already.
        forks.append([] if self._sidecar is None or any(forks) else self._sidecar._pause())

    def _after_fork(self) -> None:
        forks = self._forking.__dict__.get("forks")
        for paused in reversed(forks.pop() if forks else []):
            paused.resume()

    def _forked(self) -> None:
        self._after_fork()
        self._lock = threading.Lock()  # another thread of the parent may have held it
        sidecar, self._sidecar = self._sidecar, None
        if sidecar is not None:
            sidecar._forget()
            # Kept for ever: to close its event loop here would empty the epoll set that is the parent's too.
            self._parents.append(sidecar)


_process = _Process()


def start(
    *,
    port: int | None = None,
    host: str = "127.0.0.1",
    tcp: bool = True,
    uds: str | Path | None = None,
    auth: Literal["none", "token"] = "none",
    allow_remote: bool = False,
    record_interval_s: float = 1.0,
    retention_s: float = 900.0,
    black_box: bool = True,
    app: str | None = None,
    app_version: str | None = None,
    timeout_s: float = 10.0,
) -> Sidecar:
    """
    Serve this process's own metrics from a thread of it; return once requests are answered.

    Started again while it runs, the first one is returned, whatever the arguments. No signal handler,
    logging configuration, event loop policy or environment variable of the host is touched. It
    ends with the process, or by `Sidecar.stop`.

    Args:
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        host: loopback address to listen on.
        tcp: whether to listen on TCP at all.
        uds: path of the Unix socket; default: in the runtime directory.
        auth: ``"token"`` demands the token of the runtime file over TCP.
        allow_remote: with a token, `host` may be an address that other machines reach.
        record_interval_s: time between two recorded snapshots; 0 records nothing.
        retention_s: how far back the recorder reaches.
        black_box: keep the record on disk, to survive a crash.
        app: application id, 1 to 64 of ``A-Z a-z 0-9 . _ -``: reports with this id find the runs of this program, from
            wherever and however it is started. Without it, the file of the main module decides.
        app_version: up to 64 printable characters.
        timeout_s: for the start as a whole.

    Raises:
        ListenError: it cannot be listened there, or `port` is taken.
        StartError: the system gives no more threads or descriptors, or does not tell what this process is.
        TimeoutError: it was not ready in time.
        ValueError: an argument is out of range.
    """
    if auth not in ("none", "token"):
        raise ValueError(f"auth is 'none' or 'token', not {auth!r}")
    if record_interval_s != 0 and not 0.01 <= record_interval_s <= 3600:
        raise ValueError("record_interval_s is 0 or from 0.01 to 3600")
    if not 1 <= retention_s <= 86400:
        raise ValueError("retention_s is from 1 to 86400")
    if not 0 <= timeout_s <= 3600:
        raise ValueError("timeout_s is from 0 to 3600")
    if port is not None and not 0 <= port <= 65535:
        raise ValueError("port is from 0 to 65535")
    application = Application.checked(app, app_version)

    def make() -> Sidecar:
        with ExitStack() as undo:
            return _opened(undo)

    def _opened(undo: ExitStack) -> Sidecar:
        _fill_standard_descriptors()
        notes: list[str] = []
        directory = runtime_directory(notes)
        me = Target(os.getpid(), births().start_key(os.getpid()) or 0)
        token = endpoints.new_token() if auth == "token" else None
        listeners = listen(
            host=host,
            port=port,
            tcp=tcp,
            uds=uds,
            directory=directory,
            guarded=token is not None,
            allow_remote=allow_remote,
        )
        undo.callback(listeners.close)
        listeners.notes[:0] = notes
        runs = run_directory(listeners.notes)
        recording = RecorderConfig(
            record_interval_s, retention_s, runs=runs if black_box else None, application=application
        )
        sampler = Sampler(_own_source, recording=recording)
        undo.callback(sampler.worker.stop, 0)
        targets = Targets(sampler, open_source)
        shelf = None if runs is None else RunDirectoryReader(runs)
        if shelf is not None:
            undo.callback(shelf.worker.stop, 0)
        asgi = create_app(
            targets, list_processes, shelf=shelf, application=application, hides_processes=hides_processes
        )
        workers: Sequence[Worker] = asgi.state.workers
        for worker in workers:
            undo.callback(worker.stop, 0)
        service = Service(
            asgi,
            listeners,
            directory=directory,
            target=me,
            token=token,
            grace_s=GRACE_S,
            application=application,
        )
        undo.pop_all()
        return Sidecar(service, sampler, shelf, workers)

    return _process.start(make, timeout_s)


def _fill_standard_descriptors() -> None:
    """
    Open /dev/null for those of the descriptors 0 to 2 that the host has closed.

    Otherwise a listener or a lock of the sidecar would have the number, and a ``printf`` of the host would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _own_source() -> Source:
    return PythonNames(open_source(program_of=ProgramDigest(program_key(), main_script())))
