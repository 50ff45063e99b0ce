"""``vitalsd serve``: a living process over HTTP."""

import logging
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from vitalsd.cli.logging_setup import log_format_option, logging_as
from vitalsd.cli.options import (
    Failed,
    Number,
    Refused,
    app_option,
    app_version_option,
    application_of,
    choose_process,
    exclude,
    find_target,
    host_option,
    name_option,
    needs,
    pid_option,
    platform_of,
    port_option,
    proc_root_option,
    raise_descriptor_limit,
)
from vitalsd.cli.otlp import otlp_options, push_to
from vitalsd.cli.service_command import Serving, Where, import_service, serve_until_signal, starts

if TYPE_CHECKING:
    from vitalsd.contract.application import Application
    from vitalsd.sidecar.spawn import ExitNote, ReadyFd
    from vitalsd.sources.platform import Platform

__all__ = ["check", "serve"]

log = logging.getLogger("vitalsd")


def check(context: click.Context) -> None:
    """
    Whether options of `serve` make sense together.

    Raises:
        click.UsageError: they do not.
        Refused: what they take is not installed.
    """
    given = context.params
    exclude(context, "pid", "name")
    exclude(context, "exit_with_target", "linger")
    for parameter in ("exit_with_target", "linger"):
        needs(context, parameter, "without --pid", met=given["pid"] is not None)
    recorded = given["record_interval"] > 0
    needs(context, "retention", "with --record-interval 0", met=recorded)
    needs(context, "black_box", "with --record-interval 0", met=recorded or not given["black_box"])
    for parameter in ("host", "port", "allow_remote"):
        needs(context, parameter, "with --no-tcp", met=not given["no_tcp"])
    needs(context, "max_thread_metrics", "with --no-thread-metrics", met=given["thread_metrics"])
    needs(context, "otlp_interval", "without --otlp", met=given["otlp"] is not None)
    if 0 < given["record_interval"] < 0.01:
        raise click.UsageError("--record-interval is 0 or at least 0.01 seconds")
    if given["otlp"] is not None:
        from vitalsd.exporters.otlp import NotInstalled, check_installed, endpoint_of

        try:
            endpoint_of(given["otlp"])
            check_installed()
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        except NotInstalled as error:
            raise Refused(str(error)) from None


@click.command(cls=Serving)
@pid_option
@name_option
@app_option
@app_version_option
@click.option("--exit-note-fd", type=click.IntRange(0), hidden=True, help="Of spawn(), see ExitNote.")
@click.option("--target-script", hidden=True, help="What the target runs, from spawn(), which knows.")
@proc_root_option
@host_option
@port_option
@click.option(
    "--record-interval",
    type=Number(0, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two recorded snapshots; 0 records nothing.",
)
@click.option(
    "--retention",
    type=Number(1, 1440),
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
    type=Number(0),
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
@starts
@click.pass_context
def serve(
    context: click.Context,
    pid: int | None,
    name: str | None,
    app: str | None,
    app_version: str | None,
    exit_note_fd: int | None,
    target_script: str | None,
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

    Without --pid or --name it samples itself; any other process that you may look at can be asked for
    with /metrics?pid=N. With --name it waits for the process to start, and goes on with the next one
    when it has ended.

    SIGTERM, SIGINT and SIGHUP end it cleanly with status 0; a second one, a moment later, at once.
    """
    import os

    from vitalsd.sidecar.spawn import ExitNote, ReadyFd, taken_for_sidecar
    from vitalsd.text import one_line
    from vitalsd.worker_thread import NoThread

    spawned = taken_for_sidecar(ready_fd)
    try:
        waiting = ReadyFd(ready_fd)
        exit_note = ExitNote(exit_note_fd)
    except OSError as error:
        raise click.UsageError(f"--ready-fd {ready_fd}: {error.strerror}") from None
    with logging_as(log_format):
        try:
            check(context)
            os.umask(0o077)
            raise_descriptor_limit()
            _serve_target(
                pid,
                name,
                platform_of(context, proc_root),
                Where(host, port, tcp=not no_tcp, uds=uds, token=auth == "token", allow_remote=allow_remote),
                waiting,
                application=application_of(app, app_version),
                target_script=target_script,
                exit_note=exit_note,
                spawned=spawned,
                poll=proc_root != "/proc",
                interval_s=record_interval,
                retention_s=retention * 60,
                black_box=black_box,
                linger_s=0.0 if exit_with_target else linger,
                thread_metrics=max_thread_metrics if thread_metrics else 0,
                otlp_url=otlp,
                otlp_interval_s=otlp_interval,
            )
        except (click.ClickException, NoThread) as error:
            failure = Failed(str(error)) if isinstance(error, NoThread) else error
            waiting.send(error=one_line(failure.message))
            raise failure from None


def _serve_target(
    pid: int | None,
    name: str | None,
    platform: "Platform",
    where: "Where",
    waiting: "ReadyFd",
    *,
    application: "Application",
    target_script: str | None,
    exit_note: "ExitNote",
    spawned: bool,
    poll: bool,
    interval_s: float,
    retention_s: float,
    black_box: bool,
    linger_s: float,
    thread_metrics: int,
    otlp_url: str | None,
    otlp_interval_s: float,
) -> None:
    import os

    from vitalsd.discovery.program_key import program_key
    from vitalsd.snapshot import Identity
    from vitalsd.sources.base import NoSuchProcess, Source, SourceError
    from vitalsd.sources.programs import ProgramDigest

    called = ""
    program_of = ProgramDigest(program_key(), target_script)

    def open_target() -> Source:
        nonlocal called
        try:
            source = platform.open_source(find_target(pid, name, platform), program_of=program_of)
        except NoSuchProcess as error:
            raise NoSuchProcess(f"{error}; waiting for one" if name is not None else str(error)) from None
        called = source.identity().name
        return source

    found = None
    try:
        if name is not None:
            next(iter(platform.list_processes()), None)  # or it would wait for ever where nothing can be listed
        else:
            with closing(open_target()) as source:
                found = source.identity()
                if pid is not None:
                    source.snapshot()  # a zombie can be opened
    except SourceError as error:
        raise Failed(str(error)) from None

    import_service()
    from vitalsd.discovery.runtime_file import Target
    from vitalsd.recording.recorder import RecorderConfig
    from vitalsd.sampling.sampler import Sampler
    from vitalsd.sampling.target_pool import Targets
    from vitalsd.sidecar.service import Companion, end_with, follow, run_directory
    from vitalsd.sidecar.socket_activation import Notifier
    from vitalsd.worker_thread import Hung, Worker

    notes: list[str] = []
    runs = run_directory(notes)
    for note in notes:
        log.warning("%s", note)
    recording = RecorderConfig(
        interval_s,
        retention_s,
        runs=runs if black_box else None,
        application=application,
        exits_itself=exit_note.received,
    )
    watched = Target(found.pid, found.start_key) if found else None
    companions: list[Companion] = []

    def next_run() -> Sampler:
        return Sampler(open_target, recording=recording, platform=platform.name)

    targets = Targets(next_run(), platform.open_source, name=name)
    if name is not None:
        finder = Worker("vitalsd-finder")

        async def has_successor(now: Identity) -> bool:
            # All processes are looked at only if that one is called otherwise than when it was opened.
            if now.name != called:
                with suppress(SourceError, Hung):
                    taken = await finder.ask(lambda: choose_process(name, platform), "the list of processes: a read")
                    return now.pid not in taken.called
            return False

        companions.append(follow(targets, next_run, has_successor, platform.births(), poll=poll))
    elif pid is not None and watched is not None:
        companions.append(end_with(watched, targets, platform.births(), linger_s=linger_s, poll=poll))

    async def alive() -> None:
        if isinstance(targets.default, Sampler):
            await targets.default.worker.result(lambda: None)

    companions.append(Notifier(os.environ, alive).companion)
    if otlp_url is not None:
        push = push_to(otlp_url, otlp_interval_s, thread_metrics, targets)
        companions.append(push.companion)
        log.info("pushing to %s every %g s", push.url, otlp_interval_s)
    whom = f"the process called {name}" if name else f"process {pid}" if pid else "itself"
    serve_until_signal(
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
        application=application,
        spawned=spawned,
        hides_processes=platform.hides_processes,
    )
