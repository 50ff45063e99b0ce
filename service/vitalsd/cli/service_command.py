"""What ``vitalsd serve`` and ``vitalsd replay`` share: a quick start, where to listen, serving until a signal."""

import gc
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import click

from vitalsd.cli.logging_setup import logging_as
from vitalsd.cli.options import Failed, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vitalsd.contract.application import Application
    from vitalsd.discovery.runtime_file import Target
    from vitalsd.recording.run_directory import RunDirectory
    from vitalsd.sampling.target_pool import Targets
    from vitalsd.sidecar.listeners import Listeners
    from vitalsd.sidecar.service import Companion
    from vitalsd.sidecar.spawn import ReadyFd
    from vitalsd.sources.base import ProcessEntry
    from vitalsd.sources.process_identity import Births

__all__ = ["Serving", "Where", "import_service", "serve_until_signal", "starts"]

log = logging.getLogger("vitalsd")

P = ParamSpec("P")


class Serving(click.Command):
    """A command that serves: a mistake that is found before there are any options is told as they say all the same."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        given = "\0".join(args)
        try:
            return super().make_context(info_name, args, *more, **extra)
        except click.UsageError as error:
            if fd := re.search(r"(?:^|\0)--ready-fd[=\0]([0-9]{1,9})(?:$|\0)", given):
                from vitalsd.sidecar.spawn import ReadyFd
                from vitalsd.text import one_line

                with suppress(OSError):
                    ReadyFd(int(fd[1])).send(error=one_line(error.format_message()))
            as_json = re.search(r"(?:^|\0)--log-format[=\0]json(?:$|\0)", given)
            with logging_as("json" if as_json else "text"):
                raise


def starts(command: Callable[P, None]) -> Callable[P, None]:
    """Until it is ready, see `sidecar.serve`, a command runs without the collector: what is made until then is kept."""

    @wraps(command)
    def starting(*args: "P.args", **kwargs: "P.kwargs") -> None:
        gc.disable()
        try:
            command(*args, **kwargs)
        finally:
            gc.enable()

    return starting


def import_service() -> None:
    """
    Import what serving takes, at the bottom of a stack: on a thread, which ends with that.

    CPython keeps frames in chunks of 16 KiB, and maps and unmaps one whenever a call crosses the end of
    the last (push_chunk in Python/pystate.c). As deep as click calls us, the imports of a web framework do
    so thousands of times, and take a tenth longer.

    A sidecar takes no part in what the application beside it has pydantic's models do: that would be imported
    before the first answer, and fail with it.

    FastAPI's models of an OpenAPI document, which take a twelfth of the start, are built when they are
    used: here they never are. Only a process of our own may say so for all models that come.
    """
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"

    def load() -> None:
        with suppress(Exception):  # whoever imports it next is told
            from pydantic import BaseModel

            BaseModel.model_config["defer_build"] = True
            try:
                import_module("vitalsd.http.app")
                import_module("vitalsd.sidecar.service")
            finally:
                del BaseModel.model_config["defer_build"]

    thread = Thread(target=load, name="vitalsd-import", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread can be had
        load()
    else:
        thread.join()


class Where(NamedTuple):
    """Where to listen, as the options say."""

    host: str
    port: int | None
    tcp: bool = True
    uds: str | None = None
    token: bool = False
    allow_remote: bool = False


def serve_until_signal(
    targets: "Targets",
    list_processes: "Callable[[], Iterable[ProcessEntry]]",
    runs: "RunDirectory | None",
    whom: str,
    where: Where,
    *,
    published: bool = True,
    watched: "Target | None" = None,
    companions: "Sequence[Companion]" = (),
    waiting: "ReadyFd | None" = None,
    thread_metrics: int = 256,
    kernel: "Births | None" = None,
    application: "Application | None" = None,
    spawned: bool = False,
    hides_processes: "Callable[[], bool]" = lambda: False,
) -> None:
    """
    Listen and serve until a signal ends it.

    Args:
        hides_processes: whether the kernel hides processes from other users.
        spawned: `spawn` reads standard error until the sidecar is ready, and not after that.
    """
    from vitalsd.contract.application import Application
    from vitalsd.discovery.runtime_file import new_token
    from vitalsd.http.app import create_app
    from vitalsd.recording.run_directory_reader import RunDirectoryReader
    from vitalsd.sidecar import service as sidecar
    from vitalsd.sidecar.service import Service
    from vitalsd.text import one_line

    application = application or Application()
    notes: list[str] = []
    directory = sidecar.runtime_directory(notes) if published else None
    listeners = _listeners(where, directory)
    try:
        app = create_app(
            targets,
            list_processes,
            shelf=RunDirectoryReader(runs) if runs else None,
            thread_metrics=thread_metrics,
            application=application,
            hides_processes=hides_processes,
        )
    except BaseException:
        listeners.close()
        raise
    service = Service(
        app,
        listeners,
        directory=directory,
        target=watched,
        token=new_token() if where.token else None,
        kernel=kernel,
        application=application,
    )

    def ready() -> None:
        all_notes = (*notes, *service.notes)
        for note in all_notes:
            log.warning("%s", note)
        page = "/metrics" if published else "/"  # of a replay the page is what its reader wants
        places = [f"{service.endpoint.url}{page}" if service.endpoint.url else None, service.endpoint.socket]
        log.info("serving %s on %s", whom, " and ".join(filter(None, places)))
        if waiting is not None:
            file = service.runtime_file
            waiting.send(
                pid=service.endpoint.pid,
                url=service.endpoint.url,
                socket=service.endpoint.socket,
                runtime_file=file and str(file),
                notes=[one_line(note) for note in all_notes],
                # To `spawn` alone: another program may print or store the line.
                **({"token": service.endpoint.token} if spawned and service.endpoint.token is not None else {}),
            )
        if spawned:
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, 2)
            os.close(null)

    try:
        sidecar.serve(service, ready=ready, companions=companions)
    except sidecar.NotStarted as error:
        raise Failed(str(error)) from None


def _listeners(where: Where, directory: Path | None) -> "Listeners":
    """Those a supervisor handed over, or new ones. Raises `Refused`."""
    from vitalsd.sidecar.listeners import ListenError, PortInUse, adopt, listen
    from vitalsd.sidecar.socket_activation import activated

    try:
        given = activated(os.environ)
        if given:
            for option, value in (("--port", where.port), ("--uds", where.uds), ("--no-tcp", not where.tcp or None)):
                if value is not None:
                    raise Refused(f"{option} does nothing where a supervisor hands the sockets over; leave it out")
            return adopt(given, guarded=where.token, allow_remote=where.allow_remote)
        return listen(
            host=where.host,
            port=where.port,
            tcp=where.tcp,
            uds=where.uds,
            directory=directory,
            guarded=where.token,
            allow_remote=where.allow_remote,
        )
    except PortInUse as error:
        raise Refused(f"{error}; choose another with --port, or 0 for a free one") from None
    except ListenError as error:
        raise Refused(str(error)) from None
