"""``vitalsd serve`` and ``vitalsd replay``: a living process over HTTP, or a dead one."""

import gc
import logging
from contextlib import closing, suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

import click

from vitalsd.cli.log import log_format_option, logging_as
from vitalsd.cli.options import (
    Failed,
    Refused,
    find_target,
    host_option,
    name_option,
    pid_option,
    platform_of,
    port_option,
    proc_root_option,
    raise_descriptor_limit,
    runs_path,
)
from vitalsd.cli.otlp import otlp_options, push_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vitalsd.alongside import ReadyFd
    from vitalsd.endpoint import Target
    from vitalsd.runs import RunDirectory
    from vitalsd.sidecar import Companion, Listeners
    from vitalsd.sources import ProcessEntry
    from vitalsd.sources.birth import Births
    from vitalsd.sources.platform import Platform
    from vitalsd.targets import Targets

__all__ = ["replay", "serve"]

log = logging.getLogger("vitalsd")

P = ParamSpec("P")


def _starts(command: "Callable[P, None]") -> "Callable[P, None]":
    """Until it is ready, see `sidecar.serve`, a command runs without the collector: what is made until then is kept."""

    @wraps(command)
    def starting(*args: "P.args", **kwargs: "P.kwargs") -> None:
        gc.disable()
        try:
            command(*args, **kwargs)
        finally:
            gc.enable()

    return starting


def _import_service() -> None:
    """
    Import what serving takes, at the bottom of a stack: on a thread, which ends with that.

    CPython keeps frames in chunks of 16 KiB, and maps and unmaps one whenever a call crosses the end of
    the last (push_chunk in Python/pystate.c). As deep as click calls us, the imports of a web framework do
    so thousands of times, and take a tenth longer.
    """

    def load() -> None:
        with suppress(Exception):  # whoever imports it next is told
            import_module("vitalsd.http.app")
            import_module("vitalsd.sidecar")

    thread = Thread(target=load, name="vitalsd-import", daemon=True)
    thread.start()
    thread.join()


@click.command()
@pid_option
@name_option
@proc_root_option
@host_option
@port_option
@click.option(
    "--record-interval",
    type=click.FloatRange(0, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two recorded snapshots; 0 records nothing.",
)
@click.option(
    "--retention",
    type=click.FloatRange(1, 1440),
    default=15.0,
    show_default=True,
    metavar="MINUTES",
    help="Kept so long.",
)
@click.option(
    "--black-box/--no-black-box", default=True, show_default=True, help="Keep the record on disk, to survive a crash."
)
@click.option("--no-tcp", is_flag=True, help="Listen on the Unix socket alone.")
@click.option("--uds", metavar="PATH", help="Unix socket.  [default: in the runtime directory]")
@click.option(
    "--auth",
    type=click.Choice(["none", "token"]),
    default="none",
    show_default=True,
    help="token: demand the token of the runtime file over TCP.",
)
@click.option("--allow-remote", is_flag=True, help="With --auth token, --host may be reachable from other machines.")
@click.option("--ready-fd", type=click.IntRange(0), metavar="FD", help="Write a line of JSON there when ready.")
@click.option("--exit-with-target", is_flag=True, help="With --pid: end when the target does.")
@click.option(
    "--linger",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="With --pid: answer for so long after the target has ended, then end.",
)
@click.option(
    "--thread-metrics/--no-thread-metrics", default=True, show_default=True, help="Show scrapers a series per thread."
)
@click.option(
    "--max-thread-metrics",
    type=click.IntRange(1, 20_000),
    default=256,
    show_default=True,
    metavar="N",
    help="Of more threads, scrapers see the N with the most CPU time.",
)
@otlp_options
@log_format_option
@_starts
@click.pass_context
def serve(
    context: click.Context,
    pid: int | None,
    name: str | None,
    proc_root: str,
    host: str,
    port: int | None,
    record_interval: float,
    retention: float,
    black_box: bool,
    no_tcp: bool,
    uds: str | None,
    auth: str,
    allow_remote: bool,
    ready_fd: int | None,
    exit_with_target: bool,
    linger: float,
    thread_metrics: bool,
    max_thread_metrics: int,
    otlp: str | None,
    otlp_interval: float,
    log_format: str,
) -> None:
    """Serve the metrics of a process on http://127.0.0.1:9779 until Ctrl-C.

    Without --pid or --name it samples itself; any other process of yours can be asked for with
    /metrics?pid=N. With --name it waits for the process to start, and goes on with the next one
    when it has ended.

    SIGTERM, SIGINT and SIGHUP end it cleanly with status 0; a second one ends it at once.
    """
    import os

    from vitalsd.alongside import ReadyFd

    try:
        waiting = ReadyFd(ready_fd)
    except OSError as error:
        raise click.UsageError(f"--ready-fd {ready_fd}: {error.strerror}") from None
    with logging_as(log_format):
        try:
            if 0 < record_interval < 0.01:
                raise click.UsageError("--record-interval is 0 or at least 0.01 seconds")
            os.umask(0o077)
            raise_descriptor_limit()
            _serve_target(
                pid,
                name,
                platform_of(context, proc_root),
                proc_root != "/proc",
                (record_interval, retention * 60, black_box),
                _Where(host, port, tcp=not no_tcp, uds=uds, token=auth == "token", allow_remote=allow_remote),
                0.0 if exit_with_target else linger,
                waiting,
                max_thread_metrics if thread_metrics else 0,
                None if otlp is None else (otlp, otlp_interval),
            )
        except click.ClickException as error:
            waiting.send(error=error.message)
            raise


def _serve_target(
    pid: int | None,
    name: str | None,
    platform: "Platform",
    poll: bool,
    record: tuple[float, float, bool],
    where: "_Where",
    linger_s: float,
    waiting: "ReadyFd",
    thread_metrics: int,
    otlp: tuple[str, float] | None,
) -> None:
    import os

    from vitalsd.sources import NoSuchProcess, Source, SourceError

    if pid is not None and name is not None:
        raise click.UsageError("--pid and --name exclude each other")

    def open_target() -> Source:
        try:
            return platform.open_source(find_target(pid, name, platform))
        except NoSuchProcess as error:
            raise NoSuchProcess(f"{error}; waiting for one" if name is not None else str(error)) from None

    found = None
    if name is None:
        try:
            with closing(open_target()) as source:
                found = source.identity()
        except SourceError as error:
            raise Failed(str(error)) from None

    _import_service()
    from vitalsd.activation import Notifier
    from vitalsd.endpoint import Target
    from vitalsd.recorder import Recording
    from vitalsd.runs import RunDirectory
    from vitalsd.sampler import Sampler
    from vitalsd.sidecar import Companion, end_with, follow
    from vitalsd.targets import Targets

    interval_s, retention_s, black_box = record
    runs = RunDirectory(runs_path())
    recording = Recording(interval_s, retention_s, runs=runs if black_box else None)
    watched = Target(found.pid, found.start_key) if found else None
    companions: list[Companion] = []

    def next_run() -> Sampler:
        return Sampler(open_target, recording=recording, platform=platform.name)

    targets = Targets(next_run(), platform.open_source)
    if name is not None:
        companions.append(follow(targets, next_run, platform.births(), poll=poll))
    elif pid is not None and watched is not None:
        companions.append(end_with(watched, platform.births(), linger_s=linger_s, poll=poll))

    async def alive() -> None:
        if isinstance(targets.default, Sampler):
            await targets.default.responds()

    companions.append(Notifier(os.environ, alive).companion)
    if otlp is not None:
        push = push_to(*otlp, thread_metrics, targets)
        companions.append(push.companion)
        log.info("pushing to %s every %g s", push.url, otlp[1])
    whom = f"the newest process called {name}" if name else f"process {pid}" if pid else "itself"
    _serve(
        targets,
        platform.list_processes,
        runs,
        whom,
        where,
        watched=watched,
        companions=companions,
        waiting=waiting,
        thread_metrics=thread_metrics,
        kernel=platform.births(),
    )


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@host_option
@port_option
@log_format_option
@_starts
def replay(file: Path, host: str, port: int | None, log_format: str) -> None:
    """Serve a dead run, from a black box or a bug report, as if it were alive.

    FILE is a .sqlite file (see `vitalsd runs`) or the .zip of a report. /history and
    /metrics?mode=trailing answer for its end.
    """
    from vitalsd.replay import Replay, load
    from vitalsd.runs import RunDirectory, UnreadableRun
    from vitalsd.sources import NoSuchProcess, Source
    from vitalsd.targets import Targets

    def nobody(pid: int) -> Source:
        raise NoSuchProcess(f"this is a replay of {file.name}; it has no process {pid}")

    with logging_as(log_format):
        try:
            record = load(file)
        except (UnreadableRun, OSError) as error:
            raise Failed(str(error)) from None
        _import_service()
        _serve(
            Targets(Replay(record), nobody),
            list,
            RunDirectory(runs_path()),
            f"a replay of {file.name}",
            _Where(host, port),
            published=False,
        )


class _Where(NamedTuple):
    """Where to listen, as the options say."""

    host: str
    port: int | None
    tcp: bool = True
    uds: str | None = None
    token: bool = False
    allow_remote: bool = False


def _serve(
    targets: "Targets",
    list_processes: "Callable[[], Iterable[ProcessEntry]]",
    runs: "RunDirectory",
    whom: str,
    where: _Where,
    *,
    published: bool = True,
    watched: "Target | None" = None,
    companions: "Sequence[Companion]" = (),
    waiting: "ReadyFd | None" = None,
    thread_metrics: int = 256,
    kernel: "Births | None" = None,
) -> None:
    """Listen and serve until a signal ends it."""
    from vitalsd import sidecar
    from vitalsd.endpoint import new_token
    from vitalsd.http.app import create_app
    from vitalsd.sidecar import Sidecar

    notes: list[str] = []
    directory = sidecar.runtime_directory(notes) if published else None
    listeners = _listeners(where, directory)
    service = Sidecar(
        create_app(targets, list_processes, runs=runs, thread_metrics=thread_metrics),
        listeners,
        directory=directory,
        target=watched,
        token=new_token() if where.token else None,
        kernel=kernel,
    )

    def ready() -> None:
        for note in (*notes, *service.notes):
            log.warning("%s", note)
        places = [f"{service.endpoint.url}/metrics" if service.endpoint.url else None, service.endpoint.socket]
        log.info("serving %s on %s", whom, " and ".join(filter(None, places)))
        if waiting is not None:
            file = service.runtime_file
            waiting.send(
                pid=service.endpoint.pid,
                url=service.endpoint.url,
                socket=service.endpoint.socket,
                runtime_file=file and str(file),
            )

    sidecar.serve(service, ready=ready, companions=companions)


def _listeners(where: _Where, directory: Path | None) -> "Listeners":
    """Those a supervisor handed over, or new ones. Raises `Refused`."""
    import os

    from vitalsd.activation import activated
    from vitalsd.listeners import ListenError, PortInUse
    from vitalsd.sidecar import adopt, listen

    try:
        given = activated(os.environ)
        if given:
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
