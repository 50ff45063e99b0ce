"""Run the sidecar inside its client: one thread with an event loop of its own."""

import asyncio
import atexit
import logging
import os
import selectors
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from vitalsd.contract.labels import clean_label
from vitalsd.contract.signals import Gauge, Heartbeat, connect_signals, signals_in, signals_of_this_process
from vitalsd.discovery.own_sidecars import OwnSidecar, announce, withdraw
from vitalsd.discovery.runtime_file import Endpoint
from vitalsd.recording.recorder import NotRecordingError
from vitalsd.sidecar.builder import InProcess, build_in_process
from vitalsd.sidecar.config import DEFAULTS, TIMEOUT, Auth, SidecarConfig
from vitalsd.sidecar.exit_note import died_of_exception
from vitalsd.sidecar.fork import ForkHooks, Pausable, PausableLoop, pause_all
from vitalsd.sources.process_identity import IdentityUnknownError
from vitalsd.worker_thread import start_thread

__all__ = ["Sidecar", "StartError", "start"]

log = logging.getLogger("vitalsd")

STOP_S = 2.0
"""The sidecar delays the exit of the host at most this long, s. A thread that has not ended then is a daemon."""


class StartError(RuntimeError):
    """The sidecar could not be started, and nothing of it is left; ``str(error)`` says why."""


class Sidecar:
    """
    Control the sidecar that runs in this process; made by `start`.

    As a context manager it stops the sidecar at the end. In a forked child it is closed, and the child may `start` its
    own.
    """

    def __init__(self, parts: InProcess) -> None:
        self._service, self._sampler, self._run_directory, self._workers = parts
        service = self._service
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
        """What differs from what was requested or expected, such as a port that was taken, in sentences."""
        return tuple(self._service.notes)

    @property
    def running(self) -> bool:
        """Whether it answers requests; False in a forked child."""
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
        except NotRecordingError as error:
            if not self._stopping:
                log.warning("the mark %r was not recorded: %s", cleaned, error)
            return False
        return True

    def heartbeat(self, name: str, limit_s: float = 2.0) -> Heartbeat:
        """
        Return the heartbeat of this process with this name. The sidecar records its silences as hangs.

        Args:
            name: a letter and up to 31 of ``A-Z a-z 0-9 . _ -``.
            limit_s: longest time between two beats that is no hang, 0.25 to 3600 s.

        Raises:
            ValueError: the name or the limit is not valid, or there are 32 already.
        """
        return signals_in(self.endpoint.signals).heartbeat(name, limit_s)

    def gauge(self, name: str) -> Gauge:
        """
        Return the gauge of this process with this name. The sidecar records its values.

        Raises:
            ValueError: the name is not valid, or there are 32 already.
        """
        return signals_in(self.endpoint.signals).gauge(name)

    def stop(self) -> None:
        """End the sidecar within 2 s. A second call does nothing, nor does a call in a forked child."""
        atexit.unregister(self._exit)
        withdraw(self._own)
        if os.getpid() != self._pid:
            return
        signals_of_this_process().leave(self.endpoint.signals)
        self._stopping = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._service.stop)
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        self._service.close()
        # FastAPI caches the functions of thousands of routes, and with ours all objects that they refer to.
        self._sampler.discard()

    def __enter__(self) -> "Sidecar":
        """Return this sidecar, which runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the sidecar, see `stop`."""
        self.stop()

    def _pause(self) -> list[Pausable]:
        """Pause all threads before a fork; see `pause_all`."""
        return pause_all(self._threads())

    def _threads(self) -> Iterator[Pausable]:
        """Yield first the event loop, which gives calls to the others; then the sampler, which opens the black box."""
        if self._loop is not None and threading.current_thread() is not self._thread:
            yield PausableLoop(self._loop)
        yield self._sampler.worker
        if (blackbox := self._sampler.recorder.blackbox) is not None:
            yield blackbox.worker
        if self._run_directory is not None:
            yield self._run_directory.worker
        yield from self._workers

    def _close_in_child(self) -> None:
        self._service.close_in_child()
        self._sampler.recorder.close_in_child()

    def _exit(self) -> None:
        """End the sidecar with the interpreter; an exception that the program did not catch is recorded as a crash."""
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
        connect_signals(self.endpoint.signals)

    def _abandon(self) -> None:
        """End the workers of a sidecar if its event loop never ran; an event loop ends them itself."""
        self._sampler.worker.stop(0)
        for worker in self._workers:
            worker.stop(0)
        if self._run_directory is not None:
            self._run_directory.worker.stop(0)

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
    Run callbacks on a selector, and clean up without a message if no descriptor was left to make the loop.

    Python closes a loop that is only partly made when it is collected, and prints that it lacks an attribute.
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
    """Keep what is one per process and not per caller: the sidecar that was started first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sidecar: Sidecar | None = None
        self._parents: list[Sidecar] = []
        self._fork_hooks = ForkHooks(self._pause, self._in_child)

    def start(self, make: Callable[[], Sidecar], timeout_s: float) -> Sidecar:
        """Return the sidecar that runs, or start the one that `make` returns. Raise as `start` does."""
        with self._lock:
            if self._sidecar is None or not self._sidecar.running:
                self._fork_hooks.install()
                try:
                    self._sidecar = make()  # before the start: a child that is forked meanwhile releases it
                    self._sidecar._start(timeout_s)
                except BaseException as error:
                    self._sidecar = None
                    # TimeoutError is an OSError, and raised as it is.
                    if isinstance(error, TimeoutError) or not isinstance(
                        error, RuntimeError | IdentityUnknownError | OSError
                    ):
                        raise
                    why = error.strerror if isinstance(error, OSError) and error.filename is None else None
                    raise StartError(f"the sidecar could not be started: {why or error}") from error
            return self._sidecar

    def _pause(self) -> list[Pausable]:
        return [] if self._sidecar is None else self._sidecar._pause()

    def _in_child(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        sidecar, self._sidecar = self._sidecar, None
        if sidecar is not None:
            sidecar._close_in_child()
            # Kept until the child ends: to close its event loop would empty the epoll set that is the parent's too.
            self._parents.append(sidecar)


_process = _Process()


def start(
    *,
    port: int | None = DEFAULTS.port,
    host: str = DEFAULTS.host,
    tcp: bool = DEFAULTS.tcp,
    uds: str | Path | None = DEFAULTS.uds,
    auth: Auth = DEFAULTS.auth,
    allow_remote: bool = DEFAULTS.allow_remote,
    record_interval_s: float = DEFAULTS.record_interval_s,
    retention_s: float = DEFAULTS.retention_s,
    black_box: bool = DEFAULTS.black_box,
    children: bool = DEFAULTS.children,
    app: str | None = DEFAULTS.app,
    app_version: str | None = DEFAULTS.app_version,
    timeout_s: float = TIMEOUT.default,
) -> Sidecar:
    """
    Serve the metrics of this process from one of its threads; return once requests are answered.

    While a sidecar runs, another call returns that sidecar, whatever the arguments. It changes no signal handler,
    logging configuration, event loop policy or environment variable of the host. It ends with the process, or by
    `Sidecar.stop`.

    Args:
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        host: loopback address to listen on.
        tcp: whether to listen on TCP at all.
        uds: path of the Unix socket; default: in the runtime directory.
        auth: ``"token"`` demands the token of the runtime file over TCP.
        allow_remote: with a token, `host` may be an address that other machines reach.
        record_interval_s: time between two recorded snapshots; 0 records nothing.
        retention_s: how far back the recorder reaches.
        black_box: whether the record is kept on disk too, where it survives a crash.
        children: whether the processes that this one has started, and theirs, are recorded, with their names.
        app: application id, 1 to 64 of ``A-Z a-z 0-9 . _ -``: reports with this id find the runs of this program, from
            wherever and however it is started. Without it, the file of the main module decides.
        app_version: up to 64 printable characters.
        timeout_s: limit of the start as a whole.

    Raises:
        ListenError: the sidecar cannot listen there, or `port` is taken.
        StartError: the system gives no more threads or descriptors, or does not report which run of a process this is.
        TimeoutError: the sidecar was not ready in time.
        ValueError: an argument is out of range.
    """
    TIMEOUT.check("timeout_s", timeout_s)
    config = SidecarConfig.checked(
        port=port,
        host=host,
        tcp=tcp,
        uds=uds,
        auth=auth,
        allow_remote=allow_remote,
        record_interval_s=record_interval_s,
        retention_s=retention_s,
        black_box=black_box,
        children=children,
        app=app,
        app_version=app_version,
    )

    def make() -> Sidecar:
        _fill_standard_descriptors()
        return Sidecar(build_in_process(config))

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
