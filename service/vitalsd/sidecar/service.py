"""
Serve one sidecar: its listeners, the server on them, and the runtime file by which clients find it.

`vitalsd.sidecar.in_process` runs it on a thread of the host program, `serve` on the main thread of its own
process, which `vitalsd.sidecar.spawn` starts.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from starlette.types import ASGIApp

from vitalsd import __version__
from vitalsd.contract.application import Application
from vitalsd.contract.signals_page import SignalsPage
from vitalsd.discovery import directories
from vitalsd.discovery import runtime_file as endpoints
from vitalsd.discovery.atomic_file import is_gone
from vitalsd.discovery.directories import EndpointError, private_directory
from vitalsd.discovery.runtime_file import Endpoint, ProcessRun
from vitalsd.http.server.server import Server
from vitalsd.sidecar.listeners import Listeners
from vitalsd.sources.platform import process_identities
from vitalsd.sources.process_identity import ProcessIdentityReader

__all__ = ["BackgroundTask", "NotStartedError", "Service", "serve"]

log = logging.getLogger("vitalsd")

GRACE_S = 1.0
"""Windows under way at SIGTERM may take this long to finish, s; the whole end then takes less than 3 s."""
SIGNAL_DEBOUNCE_S = 0.3
"""A second signal within this time counts as the first, s: timeout(1) signals the process and then its group."""
FILE_CHECK_S = 60.0
"""Interval of the checks that the runtime file is still there, s: many systems clean up temporary files."""


class NotStartedError(RuntimeError):
    """Report that the web application failed at its start; the log has the reason."""


class Service:
    """
    Serve an application on listeners, and keep its runtime file.

    Args:
        app: the application.
        listeners: open ones; they are closed at the end.
        directory: where the runtime file goes; ``None`` writes none.
        target: the process that is watched, for the runtime file.
        token: what clients on TCP must send; ``None``: nothing.
        grace_s: see `Server`.
        kernel: determines the run of this process, for the runtime file.
        application: the application that the client named, for the runtime file.
        page: where clients signal heartbeats and gauges; closed at the end. ``None``: there is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        listeners: Listeners,
        *,
        directory: Path | None = None,
        target: ProcessRun | None = None,
        token: str | None = None,
        grace_s: float = GRACE_S,
        kernel: ProcessIdentityReader | None = None,
        application: Application = Application(),
        page: SignalsPage | None = None,
    ) -> None:
        kernel = kernel or process_identities()
        host, port = listeners.address
        self.listeners = listeners
        self.endpoint = Endpoint(
            version=__version__,
            pid=os.getpid(),
            start=kernel.start_key(os.getpid()) or 0,
            boot_id=kernel.boot_id(),
            host_scope=kernel.host_scope(),
            uid=os.geteuid(),
            target=target,
            socket=listeners.socket_path,
            host=host,
            port=port,
            token=token,
            started_at=endpoints.now(),
            app=application.app,
            app_version=application.app_version,
            signals=None if page is None else page.reference,
        )
        self._page = page
        self.runtime_file: Path | None = None
        self.notes = listeners.notes
        self._app = app
        self._directory = directory
        self._grace_s = grace_s
        self._kernel = kernel
        self._server: Server | None = None
        self._stopping = False
        self._pid = os.getpid()

    async def run(self, ready: Callable[[], None], background_tasks: Sequence["BackgroundTask"] = ()) -> None:
        """
        Serve until `stop`, then remove the sockets and the runtime file.

        Args:
            ready: called once requests are answered and the runtime file is there.
            background_tasks: run while the sidecar serves; cancelled at the end.

        Raises:
            NotStartedError: the application did not start.
            Exception: whatever a background task raised.
        """
        tasks: list[asyncio.Task[None]] = []

        def serving() -> None:
            self._publish()
            self._note_unknown_users()
            alongside = (*background_tasks, _stay_findable)
            tasks.extend(asyncio.create_task(_run(task, self)) for task in alongside)
            ready()

        self._server = Server(self._app, token=self.endpoint.token, grace_s=self._grace_s, ready=serving)
        if self._stopping:
            self._server.stop()  # it then closes what has been opened for it
        try:
            await self._server.serve(sockets=self.listeners.sockets)
        except SystemExit:  # by it uvicorn reports a failed start
            raise NotStartedError("the application did not start; the log says why") from None
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            self.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def stop(self) -> None:
        """Begin the end; to be called on the event loop. A second call does nothing."""
        self._stopping = True
        self._withdraw()
        if self._server is not None:
            self._server.stop()

    def set_target(self, target: ProcessRun | None) -> None:
        """Publish in the runtime file that another run is watched; ``None``: no process for now."""
        self.endpoint = replace(self.endpoint, target=target)
        if self.runtime_file is not None:
            self._publish()

    def close(self) -> None:
        """Remove the runtime file and the sockets; in a forked child it does nothing."""
        if os.getpid() == self._pid:
            self._withdraw()
            self.listeners.close()
            if self._page is not None:
                self._page.close()

    def close_in_child(self) -> None:
        """Close listeners and connections in a forked child; those of the parent stay open."""
        self.listeners.close_in_child()
        if self._page is not None:
            self._page.close()
        if self._server is not None:
            self._server.close_in_child()

    def _publish(self) -> None:
        if self._directory is None:
            return
        reasons: list[str] = []
        # The preferred directory may be read-only or out of inodes; clients look into the others as well.
        for directory in dict.fromkeys((self._directory, *directories.runtime_directories())):
            try:
                if directory != self._directory:
                    private_directory(directory)
                endpoints.sweep(directory, self._kernel)
                self.runtime_file = endpoints.publish(self.endpoint, directory)
            except OSError as error:
                reasons.append(f"cannot write to {directory}: {error.strerror}")
            except EndpointError as error:
                reasons.append(str(error))
            else:
                self._directory = directory
                return
        self.notes.append(f"no runtime file, so clients need the address of this sidecar: {'; '.join(reasons)}")

    def _note_unknown_users(self) -> None:
        """Note that other users of this machine cannot be distinguished from the owner, if so."""
        host, port = self.listeners.address
        if self._server is None or host is None or port is None or self.endpoint.token is not None:
            return
        if (why := self._server.why_users_are_unknown((host, port))) is not None:
            self.notes.append(
                f"the users of TCP connections cannot be determined, because {why}: other users of this machine can use"
                ' every route over TCP; --auth token (in Python auth="token") keeps them out'
            )

    def publish_again(self) -> None:
        """Write the runtime file if it was removed. A socket that went with it cannot be brought back."""
        if self._directory is None or self.runtime_file is None or not is_gone(self.runtime_file):
            return
        if self.endpoint.socket is not None and not os.path.exists(self.endpoint.socket):
            self.endpoint = replace(self.endpoint, socket=None)
        log.warning("%s was removed; it is written again", self.runtime_file)
        try:
            self.runtime_file = endpoints.publish(self.endpoint, private_directory(self._directory))
        except (OSError, EndpointError) as error:
            log.warning("no runtime file, so clients need the address of this sidecar: %s", error)
            self.runtime_file = None

    def _withdraw(self) -> None:
        if self.runtime_file is not None:
            endpoints.withdraw(self.runtime_file, self.endpoint)
            self.runtime_file = None


BackgroundTask = Callable[[Service], Awaitable[None]]
"""A coroutine function that runs while the sidecar serves; what it raises ends the sidecar."""


async def _run(task: BackgroundTask, sidecar: Service) -> None:
    try:
        await task(sidecar)
    except asyncio.CancelledError:
        raise
    except BaseException:
        sidecar.stop()
        raise


async def _stay_findable(sidecar: Service) -> None:
    while True:
        await asyncio.sleep(FILE_CHECK_S)
        sidecar.publish_again()


def serve(sidecar: Service, *, ready: Callable[[], None], background_tasks: Sequence[BackgroundTask] = ()) -> None:
    """
    Serve on the main thread until a signal or a background task ends it.

    SIGTERM, SIGINT and SIGHUP end it cleanly; another signal more than `SIGNAL_DEBOUNCE_S` later ends it at once, by
    that signal.
    SIGINT or SIGHUP that was ignored at the start (nohup, a shell's background job) stays ignored. SIGTERM is handled
    in any case. None of them stays blocked, as a parent that uses signalfd may leave them.

    The process must be ours alone: objects that exist when the sidecar is ready are exempt from garbage collection from
    then on, because a walk through those of all modules takes longer than many answers.
    """

    def settled() -> None:
        gc.freeze()
        gc.enable()
        ready()

    try:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_serve(sidecar, settled, background_tasks))
    finally:
        sidecar.close()


async def _serve(sidecar: Service, ready: Callable[[], None], background_tasks: Sequence[BackgroundTask]) -> None:
    loop = asyncio.get_running_loop()
    stopping_s: float | None = None

    def stop(number: signal.Signals) -> None:
        nonlocal stopping_s
        if stopping_s is not None:
            if loop.time() - stopping_s < SIGNAL_DEBOUNCE_S:
                return
            sidecar.close()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stopping_s = loop.time()
        sidecar.stop()

    taken = [signal.SIGTERM] + [
        number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN
    ]
    for number in taken:
        loop.add_signal_handler(number, stop, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)
    try:
        await sidecar.run(ready, background_tasks)
    finally:
        for number in taken:
            with suppress(ValueError):
                loop.remove_signal_handler(number)
            if stopping_s is not None:  # the rest is short, and the same signal once more would interrupt it
                signal.signal(number, signal.SIG_IGN)
