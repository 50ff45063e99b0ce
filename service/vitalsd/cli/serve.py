"""Run ``vitalsd serve``: serve the metrics of a process over HTTP."""

from typing import TYPE_CHECKING, Any

import click

from vitalsd.cli.logging_setup import logging_as
from vitalsd.cli.options import (
    CommandFailed,
    UsageRefused,
    all_setting_options,
    config_of,
    exclude,
    needs,
    platform_of,
    raise_descriptor_limit,
)
from vitalsd.cli.service_command import Serving, import_service, refusing, serve_until_signal, starts

if TYPE_CHECKING:
    from vitalsd.sidecar.config import SidecarConfig
    from vitalsd.sidecar.exit_note import ExitNoteReader
    from vitalsd.sidecar.ready_fd import ReadyFd
    from vitalsd.sources.platform import Platform

__all__ = ["check", "serve"]


def check(context: click.Context) -> "SidecarConfig":
    """
    Return the configuration of the options of `serve`.

    Raises:
        click.UsageError: the options contradict each other.
        UsageRefused: what they need is not installed.
    """
    config = config_of(context)
    exclude(context, "pid", "name")
    exclude(context, "exit_with_target", "linger_s")
    for name in ("exit_with_target", "linger_s"):
        needs(context, name, "without --pid", met=config.pid is not None)
    recorded = config.record_interval_s > 0
    needs(context, "retention_s", "with --record-interval 0", met=recorded)
    needs(context, "black_box", "with --record-interval 0", met=recorded or not config.black_box)
    needs(context, "children", "with --record-interval 0", met=recorded)
    for name in ("host", "port", "allow_remote"):
        needs(context, name, "with --no-tcp", met=config.tcp)
    needs(context, "max_thread_metrics", "with --no-thread-metrics", met=config.thread_metrics)
    needs(context, "otlp_interval_s", "without --otlp", met=config.otlp is not None)
    if config.otlp is not None:
        _check_otlp(config.otlp)
    return config


def _check_otlp(url: str) -> None:
    from vitalsd.exporters.otlp import NotInstalledError, check_installed, endpoint_of

    try:
        endpoint_of(url)
        check_installed()
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except NotInstalledError as error:
        raise UsageRefused(str(error)) from None


@click.command(cls=Serving)
@all_setting_options
@starts
@click.pass_context
def serve(context: click.Context, /, ready_fd: int | None, exit_note_fd: int | None, log_format: str, **_: Any) -> None:
    """Serve the metrics of a process on http://127.0.0.1:9779 until Ctrl-C.

    Without --pid or --name it samples itself; /metrics?pid=N measures any other process that you may
    read. With --name it waits for the process to start, and after its exit for the next one of that name.

    SIGTERM, SIGINT and SIGHUP end it cleanly with status 0; a second signal ends it at once.
    """
    from vitalsd.sidecar.exit_note import ExitNoteReader
    from vitalsd.sidecar.marker import take_marker
    from vitalsd.sidecar.ready_fd import ReadyFd
    from vitalsd.text import one_line
    from vitalsd.worker_thread import NoThreadError

    spawned = take_marker(ready_fd)
    try:
        waiting = ReadyFd(ready_fd)
        exit_note = ExitNoteReader(exit_note_fd)
    except OSError as error:
        raise click.UsageError(f"--ready-fd {ready_fd}: {error.strerror}") from None
    with logging_as(log_format):
        try:
            config = check(context)
            _serve(config, platform_of(context, config.proc_root), waiting, exit_note, spawned=spawned)
        except (click.ClickException, NoThreadError) as error:
            failure = CommandFailed(str(error)) if isinstance(error, NoThreadError) else error
            waiting.send(error=one_line(failure.message))
            raise failure from None


def _serve(
    config: "SidecarConfig", platform: "Platform", ready_fd: "ReadyFd", exit_note: "ExitNoteReader", *, spawned: bool
) -> None:
    """Find the target, assemble the sidecar, and serve; see `serve_until_signal`."""
    import os

    from vitalsd.sidecar.target_process import TargetProcess
    from vitalsd.sources.base import SourceError

    os.umask(0o077)
    raise_descriptor_limit()
    process = TargetProcess(config, platform)
    try:
        watched = process.check()
    except SourceError as error:
        raise CommandFailed(str(error)) from None
    import_service()
    from vitalsd.sidecar.builder import build_service

    with refusing():
        service, background_tasks = build_service(config, process, watched, os.environ, exits_itself=exit_note.received)
    serve_until_signal(service, str(process), background_tasks=background_tasks, ready_fd=ready_fd, spawned=spawned)
