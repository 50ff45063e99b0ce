"""
One sidecar: its listeners, the server on them, and the runtime file by which clients find it.

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
from vitalsd.discovery import directories
from vitalsd.discovery import runtime_file as endpoints
from vitalsd.discovery.atomic_file import is_gone
from vitalsd.discovery.directories import EndpointError, private_directory
from vitalsd.discovery.runtime_file import Endpoint, ProcessRun
from vitalsd.http.server.server import Server
from vitalsd.sidecar.listeners import Listeners
from vitalsd.sources.platform import births
from vitalsd.sources.process_identity import Births

__all__ = ["Companion", "NotStartedError", "Service", "serve"]

log = logging.getLogger("vitalsd")

GRACE_S = 1.0
"""Windows under way at SIGTERM may finish for so long. With all the rest the end takes under 3 s."""
SAME_S = 0.3
"""A signal so soon after another is the same one: some send it to the process and to its group, as timeout(1) does."""
LOOK_S = 60.0
"""Between two looks whether the runtime file is still there: temporary files are cleaned up on many systems."""


class NotStartedError(RuntimeError):
    """The web application failed at its start; the log has the reason."""


class Service:
    """
    An application being served on listeners, and its runtime file.

    Args:
        app: the application.
        listeners: open ones; they are closed at the end.
        directory: where the runtime file goes; ``None`` writes none.
        target: what it watches, for the runtime file.
        token: to be asked for over TCP; ``None`` for none.
        grace_s: see `Server`.
        kernel: determines the run of this process, for the runtime file.
        application: what the client says it is, for the runtime file.
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
        kernel: Births | None = None,
        application: Application = Application(),
    ) -> None:
        kernel = kernel or births()
        host, port = listeners.address
        self.listeners = listeners
        self.endpoint = Endpoint(
            version=__version__,
            pid=os.getpid(),
            start=kernel.start_key(os.getpid()) or 0,
            boot_id=kernel.boot_id(),
            realm=kernel.realm(),
            uid=os.geteuid(),
            target=target,
            socket=listeners.socket_path,
            host=host,
            port=port,
            token=token,
            started_at=endpoints.now(),
            app=application.app,
            app_version=application.app_version,
        )
        self.runtime_file: Path | None = None
        self.notes = listeners.notes
        self._app = app
        self._directory = directory
        self._grace_s = grace_s
        self._kernel = kernel
        self._server: Server | None = None
        self._stopping = False
        self._pid = os.getpid()

    async def run(self, ready: Callable[[], None], companions: Sequence["Companion"] = ()) -> None:
        """
        Serve until `stop`, then remove every trace.

        Args:
            ready: called once requests are answered and the runtime file is there.
            companions: run alongside; cancelled at the end.

        Raises:
            NotStartedError: the application did not start.
            Exception: whatever a companion raised.
        """
        tasks: list[asyncio.Task[None]] = []

        def serving() -> None:
            self._publish()
            self._note_unknown_users()
            alongside = (*companions, _stay_findable)
            tasks.extend(asyncio.create_task(_run(companion, self)) for companion in alongside)
            ready()

        self._server = Server(self._app, token=self.endpoint.token, grace_s=self._grace_s, ready=serving)
        if self._stopping:
            self._server.stop()  # what has been opened for it is closed on the way
        try:
            await self._server.serve(sockets=self.listeners.sockets)
        except SystemExit:  # uvicorn's way to say it
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

    def retarget(self, target: ProcessRun | None) -> None:
        """Tell clients that another run is being watched, or none for now."""
        self.endpoint = replace(self.endpoint, target=target)
        if self.runtime_file is not None:
            self._publish()

    def close(self) -> None:
        """Remove the runtime file and the sockets; in a forked child it does nothing."""
        if os.getpid() == self._pid:
            self._withdraw()
            self.listeners.close()

    def forget(self) -> None:
        """In a forked child: let go of listeners and connections, which stay the parent's."""
        self.listeners.forget()
        if self._server is not None:
            self._server.forget()

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


Companion = Callable[[Service], Awaitable[None]]
"""Runs alongside the serving; what it raises ends the sidecar."""


async def _run(companion: Companion, sidecar: Service) -> None:
    try:
        await companion(sidecar)
    except asyncio.CancelledError:
        raise
    except BaseException:
        sidecar.stop()
        raise


async def _stay_findable(sidecar: Service) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        sidecar.publish_again()


def serve(sidecar: Service, *, ready: Callable[[], None], companions: Sequence[Companion] = ()) -> None:
    """
    Serve on this, the main thread, until a signal or a companion ends it.

    SIGTERM, SIGINT and SIGHUP end it cleanly; one of them again, later than `SAME_S`, ends it at once, by that
    signal. SIGINT or SIGHUP that was ignored at the start (nohup, a shell's background job) stays ignored. SIGTERM
    is taken in any case, and none of them stays blocked, as a parent may leave them that uses signalfd.

    The process is taken to be ours alone: whatever is there once it is ready, the garbage collector
    leaves alone from then on. To walk all the modules takes it longer than many an answer.
    """

    def settled() -> None:
        gc.freeze()
        gc.enable()
        ready()

    try:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_serve(sidecar, settled, companions))
    finally:
        sidecar.close()


async def _serve(sidecar: Service, ready: Callable[[], None], companions: Sequence[Companion]) -> None:
    loop = asyncio.get_running_loop()
    stopping_s: float | None = None

    def stop(number: signal.Signals) -> None:
        nonlocal stopping_s
        if stopping_s is not None:
            if loop.time() - stopping_s < SAME_S:
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
        await sidecar.run(ready, companions)
    finally:
        for number in taken:
            with suppress(ValueError):
                loop.remove_signal_handler(number)
            if stopping_s is not None:  # what is left is short, and the same signal once more would spoil it
                signal.signal(number, signal.SIG_IGN)
