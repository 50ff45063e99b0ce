"""Share between ``vitalsd serve`` and ``vitalsd replay``: a quick start, errors before it, serving until a signal."""

import gc
import logging
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec

import click

from vitalsd.cli.logging_setup import logging_as
from vitalsd.cli.options import CommandFailed, UsageRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vitalsd.sidecar.ready_fd import ReadyFd
    from vitalsd.sidecar.service import BackgroundTask, Service

__all__ = ["Serving", "import_service", "refusing", "serve_until_signal", "starts"]

log = logging.getLogger("vitalsd")

P = ParamSpec("P")


class Serving(click.Command):
    """Report wrong usage of a command that serves as its options demand, although not all of them could be read."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        """Parse the options. Raise `click.UsageError`, reported to ``--ready-fd`` and in ``--log-format``."""
        given = list(args)
        try:
            return super().make_context(info_name, args, *more, **extra)
        except click.UsageError as error:
            options = self._readable(given)
            if (fd := options.get("ready_fd")) is not None:
                from vitalsd.sidecar.ready_fd import ReadyFd
                from vitalsd.text import one_line

                with suppress(OSError):
                    ReadyFd(fd).send(error=one_line(error.format_message()))
            with logging_as(options.get("log_format") or "text"):
                raise

    def _readable(self, args: list[str]) -> dict[str, Any]:
        """Return the values of those options that can be read; an unknown option is skipped."""
        with click.Context(self, resilient_parsing=True, ignore_unknown_options=True, allow_extra_args=True) as context:
            self.parse_args(context, args)
        return context.params


def starts(command: Callable[P, None]) -> Callable[P, None]:
    """Switch the garbage collector off until the command is ready (`sidecar.serve`): all objects from then stay."""

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
    Import what serving needs, for a process of our own.

    The plugins that the application has installed for pydantic are disabled: a sidecar would import them before the
    first answer, and fail if one of them does.

    FastAPI's models of an OpenAPI document, a twelfth of the start, are built only when they are used, and here they
    never are. That applies to all models that are declared meanwhile, so only a process of our own may do it.
    """
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    from pydantic import BaseModel

    BaseModel.model_config["defer_build"] = True
    try:
        import_module("vitalsd.sidecar.builder")
    finally:
        del BaseModel.model_config["defer_build"]


@contextmanager
def refusing() -> "Iterator[None]":
    """Raise `UsageRefused` where this machine cannot do what the settings demand."""
    from vitalsd.sidecar.builder import BuildError
    from vitalsd.sidecar.listen_errors import ListenError, PortInUseError

    try:
        yield
    except PortInUseError as error:
        raise UsageRefused(f"{error}; choose another with --port, or 0 for a free one") from None
    except (ListenError, BuildError) as error:
        raise UsageRefused(str(error)) from None


def serve_until_signal(
    service: "Service",
    what: str,
    *,
    page: str = "/metrics",
    background_tasks: "Sequence[BackgroundTask]" = (),
    ready_fd: "ReadyFd | None" = None,
    spawned: bool = False,
) -> None:
    """
    Serve until a signal or a background task ends it.

    Args:
        service: the service.
        what: what the service shows, for the log.
        page: URL of the page, for the log.
        background_tasks: see `Service.run`.
        ready_fd: reports that the service is ready.
        spawned: whether `spawn` started this process: it gets the token, and reads standard error only until the
            service is ready.

    Raises:
        CommandFailed: the application did not start.
    """
    from vitalsd.sidecar.service import NotStartedError, serve

    def ready() -> None:
        for note in service.notes:
            log.warning("%s", note)
        endpoint = service.endpoint
        places = [f"{endpoint.url}{page}" if endpoint.url else None, endpoint.socket]
        log.info("serving %s on %s", what, " and ".join(filter(None, places)))
        if ready_fd is not None:
            ready_fd.send(**_ready_line(service, with_token=spawned))
        if spawned:
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, 2)
            os.close(null)

    try:
        serve(service, ready=ready, background_tasks=background_tasks)
    except NotStartedError as error:
        raise CommandFailed(str(error)) from None


def _ready_line(service: "Service", *, with_token: bool) -> dict[str, Any]:
    """Return the fields of the ready line; the token is for `spawn` alone, as other programs may print the line."""
    from vitalsd.text import one_line

    endpoint = service.endpoint
    line = {
        "pid": endpoint.pid,
        "url": endpoint.url,
        "socket": endpoint.socket,
        "runtime_file": service.runtime_file and str(service.runtime_file),
        "signals": endpoint.signals,
        "notes": [one_line(note) for note in service.notes],
    }
    return line | {"token": endpoint.token} if with_token and endpoint.token is not None else line
