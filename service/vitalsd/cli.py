"""The command line. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.reporting import report, spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import IO, Any

    from vitalsd.agent import Agent
    from vitalsd.alongside import ReadyFd
    from vitalsd.endpoint import Target
    from vitalsd.runs import RunDirectory
    from vitalsd.sampler import Targets
    from vitalsd.sidecar import Companion, Listeners
    from vitalsd.sources import ProcessEntry

__all__ = ["main"]

EPILOG = """\b
Exit status: 0 done, 1 the numbers cannot be had, 2 wrong usage, 130 interrupted."""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vitalsd", message="%(prog)s %(version)s")
def main() -> None:
    """What is this process doing? CPU, memory and every thread, on Linux and macOS.

    \b
    vitalsd sample --pid 4242          one answer, no server
    vitalsd serve --pid 4242           serve it on http://127.0.0.1:9779
    curl -s localhost:9779/metrics     ask the server
    """


_pid = click.option("--pid", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Target process.")
_name = click.option("--name", metavar="NAME", help="Target: your newest process of that name.")
_proc_root = click.option(
    "--proc-root",
    default="/proc",
    show_default=True,
    metavar="DIR",
    help="Linux: where procfs is mounted, e.g. /host/proc in a container.",
)


_host = click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
_port = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port; 0 takes a free one.  [default: 9779, or a free one]",
)


@main.command()
@_pid
@_name
@_proc_root
@click.option(
    "--window-ms", type=click.IntRange(10, 60_000), default=1000, show_default=True, help="Window to measure, ms."
)
@click.option("--detail", type=click.Choice(["basic", "full"]), default="basic", show_default=True)
@click.option("--sort", type=click.Choice(["tid", "cpu", "name"]), default="tid", show_default=True)
@click.option("--limit", type=click.IntRange(0), metavar="N", help="At most N threads, after sorting.")
def sample(
    pid: int | None, name: str | None, proc_root: str, window_ms: int, detail: str, sort: str, limit: int | None
) -> None:
    """Measure one window and print the answer as JSON, without a server.

    Without --pid or --name it measures itself, which shows what an answer looks like.
    """
    from vitalsd.sampler import sample as sample_window
    from vitalsd.sources import SourceError, open_source
    from vitalsd.wire import encode, unavailable

    _raise_descriptor_limit()
    try:
        with closing(open_source(_target(pid, name, proc_root), proc_root=proc_root)) as source:
            measurement = sample_window(source, window_ms, extras=detail == "full")
            answer = encode(
                measurement,
                source.identity(),
                requested_ms=window_ms,
                detail=detail,  # type: ignore[arg-type]
                sort=sort,  # type: ignore[arg-type]
                limit=limit,
            )
    except SourceError as error:
        click.echo(unavailable(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    click.echo(answer)


@main.command()
@_pid
@_name
@_proc_root
@_host
@_port
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
def serve(
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
    try:
        if 0 < record_interval < 0.01:
            raise click.UsageError("--record-interval is 0 or at least 0.01 seconds")
        os.umask(0o077)
        _raise_descriptor_limit()
        _serve_target(
            pid,
            name,
            proc_root,
            (record_interval, retention * 60, black_box),
            _Where(host, port, tcp=not no_tcp, uds=uds, token=auth == "token", allow_remote=allow_remote),
            0.0 if exit_with_target else linger,
            waiting,
            max_thread_metrics if thread_metrics else 0,
        )
    except click.ClickException as error:
        waiting.send(error=error.message)
        raise


def _serve_target(
    pid: int | None,
    name: str | None,
    proc_root: str,
    record: tuple[float, float, bool],
    where: "_Where",
    linger_s: float,
    waiting: "ReadyFd",
    thread_metrics: int,
) -> None:
    import os

    from vitalsd.activation import Notifier
    from vitalsd.endpoint import Target
    from vitalsd.recorder import Recording
    from vitalsd.runs import RunDirectory
    from vitalsd.sampler import Sampler, Targets
    from vitalsd.sidecar import Companion, end_with, follow
    from vitalsd.sources import NoSuchProcess, Source, SourceError, list_processes, open_source

    if pid is not None and name is not None:
        raise click.UsageError("--pid and --name exclude each other")
    interval_s, retention_s, black_box = record
    runs = RunDirectory(_runs_path())
    recording = Recording(interval_s, retention_s, runs=runs if black_box else None)
    poll = proc_root != "/proc"
    watched: Target | None = None
    companions: list[Companion] = []

    def open_target() -> Source:
        try:
            return open_source(_target(pid, name, proc_root), proc_root=proc_root)
        except NoSuchProcess as error:
            raise NoSuchProcess(f"{error}; waiting for one" if name is not None else str(error)) from None

    def next_run() -> Sampler:
        return Sampler(open_target, recording=recording)

    if name is None:
        try:
            with closing(open_target()) as source:
                found = source.identity()
        except SourceError as error:
            raise _Failed(str(error)) from None
        watched = Target(found.pid, found.start_key)
    targets = Targets(next_run(), lambda other: open_source(other, proc_root=proc_root))
    if name is not None:
        companions.append(follow(targets, next_run, poll=poll))
    elif pid is not None and watched is not None:
        companions.append(end_with(watched, linger_s=linger_s, poll=poll))

    async def alive() -> None:
        if isinstance(targets.default, Sampler):
            await targets.default.responds()

    companions.append(Notifier(os.environ, alive).companion)
    whom = f"the newest process called {name}" if name else f"process {pid}" if pid else "itself"
    _serve(
        targets,
        lambda: list_processes(proc_root=proc_root),
        runs,
        whom,
        where,
        watched=watched,
        companions=companions,
        waiting=waiting,
        thread_metrics=thread_metrics,
    )


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_host
@_port
def replay(file: Path, host: str, port: int | None) -> None:
    """Serve a dead run, from a black box or a bug report, as if it were alive.

    FILE is a .sqlite file (see `vitalsd runs`) or the .zip of a report. /history and
    /metrics?mode=trailing answer for its end.
    """
    from vitalsd.replay import Replay, load
    from vitalsd.runs import RunDirectory, UnreadableRun
    from vitalsd.sampler import Targets
    from vitalsd.sources import NoSuchProcess, Source

    try:
        record = load(file)
    except (UnreadableRun, OSError) as error:
        raise click.ClickException(str(error)) from None

    def nobody(pid: int) -> Source:
        raise NoSuchProcess(f"this is a replay of {file.name}; it has no process {pid}")

    _serve(
        Targets(Replay(record), nobody),
        list,
        RunDirectory(_runs_path()),
        f"a replay of {file.name}",
        _Where(host, port),
        published=False,
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs(as_json: bool) -> None:
    """List the runs on disk: crashed ones first, then the newest first."""
    import json

    from vitalsd.http.past import run_json
    from vitalsd.runs import RunDirectory

    path = _runs_path()
    found = RunDirectory(path).runs()
    if as_json:
        click.echo(json.dumps([run_json(run) for run in found], indent=2))
        return
    if not found:
        click.echo(f"no runs in {path}")
        return
    rows = [
        [run.state, run.identity.name, str(run.identity.pid), _last_seen(run.last_wall_ns), run.ended or "", run.id]
        for run in found
    ]
    _table(["STATE", "NAME", "PID", "LAST SEEN", "ENDED", "ID"], rows)
    click.echo(f"\nreplay one with: vitalsd replay {path}/ID.sqlite")


def _last_seen(wall_ns: int | None) -> str:
    from vitalsd.wire import iso

    return "never" if wall_ns is None else iso(wall_ns)


def _table(head: list[str], rows: list[list[str]]) -> None:
    """Aligned columns; what a stranger named is shown escaped."""
    shown = [head, *([cell if cell.isprintable() else ascii(cell)[1:-1] for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _runs_path() -> Path:
    from vitalsd.endpoint import EndpointError, state_directory

    try:
        return state_directory() / "runs"
    except EndpointError as error:
        raise _Failed(str(error)) from None


class _Failed(click.ClickException):
    """It cannot be done: one line and exit status 1."""

    def show(self, file: "IO[Any] | None" = None) -> None:
        click.echo(f"vitalsd: {self.message}", err=True)


class _Refused(_Failed):
    """It was asked for what cannot be: one line and exit status 2."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class _Where:
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
    )

    def ready() -> None:
        for note in (*notes, *service.notes):
            click.echo(f"vitalsd: {note}", err=True)
        places = [f"{service.endpoint.url}/metrics" if service.endpoint.url else None, service.endpoint.socket]
        click.echo(f"vitalsd: serving {whom} on {' and '.join(filter(None, places))}", err=True)
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
    """Those a supervisor handed over, or new ones. Raises `_Refused`."""
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
        raise _Refused(f"{error}; choose another with --port, or 0 for a free one") from None
    except ListenError as error:
        raise _Refused(str(error)) from None


@main.command("endpoints")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_endpoints(as_json: bool) -> None:
    """List your sidecars that are running, the newest first, and clear away what dead ones left.

    A token is never printed; it is in the FILE.
    """
    import json
    from dataclasses import asdict

    from vitalsd.endpoint import published, runtime_directories, sweep

    found = []
    for directory in runtime_directories():
        sweep(directory)
        found += [entry for entry in published(directory) if entry.liveness != "dead"]
    found.sort(key=lambda entry: entry.endpoint.started_at, reverse=True)
    if as_json:
        shown = [
            asdict(entry.endpoint)
            | {
                "url": entry.endpoint.url,
                "token": entry.endpoint.token is not None,
                "state": entry.liveness,
                "file": str(entry.path),
            }
            for entry in found
        ]
        click.echo(json.dumps(shown, indent=2))
        return
    if not found:
        click.echo("no sidecar of yours is running")
        return
    rows = [
        [
            str(entry.endpoint.pid),
            str(entry.endpoint.target.pid) if entry.endpoint.target else "-",
            entry.liveness,
            entry.endpoint.started_at[:19] + "Z",
            entry.endpoint.url or "-",
            entry.endpoint.socket or "-",
            str(entry.path),
        ]
        for entry in found
    ]
    _table(["PID", "TARGET", "STATE", "STARTED", "URL", "SOCKET", "FILE"], rows)


@main.group()
def agent() -> None:
    """Have launchd or systemd start a sidecar when somebody connects to port 9779.

    \b
    vitalsd agent install --name myapp    follow myapp, from the login on
    vitalsd agent status                  exit status 1 if it is not loaded
    """


def _agent_options(command: "Callable[..., None]") -> "Callable[..., None]":
    default = "launchd" if sys.platform == "darwin" else "systemd"
    kinds = click.Choice(["launchd", "systemd"])
    command = click.option("--supervisor", "kind", type=kinds, default=default, show_default=True)(command)
    command = click.option("--port", type=click.IntRange(1, 65535), default=9779, show_default=True)(command)
    return click.option("--name", metavar="TARGET", help="Follow your newest process of that name.")(command)


def _agent(kind: str, name: str | None, port: int) -> "Agent":
    import os

    from vitalsd.agent import OVERRIDES, Plan, supervisor
    from vitalsd.endpoint import EndpointError, runtime_directory, state_directory

    try:
        plan = Plan(
            home=Path.home(),
            runtime=runtime_directory(),
            state=state_directory(),
            name=name,
            port=port,
            environment={each: os.path.abspath(os.environ[each]) for each in OVERRIDES if os.environ.get(each)},
        )
    except EndpointError as error:
        raise _Failed(str(error)) from None
    return supervisor(kind, plan)  # type: ignore[arg-type]


@agent.command("install")
@_agent_options
def agent_install(kind: str, name: str | None, port: int) -> None:
    """Install the agent, or bring a change into effect."""
    from vitalsd.agent import AgentError

    try:
        installed = _agent(kind, name, port)
        installed.install()
    except AgentError as error:
        raise _Failed(str(error)) from None
    for path in installed.files():
        click.echo(f"installed {path}")
    click.echo(f"try: curl -s http://127.0.0.1:{port}/info")


@agent.command("uninstall")
@_agent_options
def agent_uninstall(kind: str, name: str | None, port: int) -> None:
    """End the agent and remove its files."""
    from vitalsd.agent import AgentError

    try:
        removed = _agent(kind, name, port).uninstall()
    except AgentError as error:
        raise _Failed(str(error)) from None
    click.echo("removed" if removed else "it was not installed")


@agent.command("status")
@_agent_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def agent_status(kind: str, name: str | None, port: int, as_json: bool) -> None:
    """Say whether the agent is installed, loaded and running. Exit status 1 if it is not loaded."""
    import json
    from dataclasses import asdict

    from vitalsd.agent import AgentError

    try:
        found = _agent(kind, name, port).status()
    except AgentError as error:
        raise _Failed(str(error)) from None
    if as_json:
        click.echo(json.dumps(asdict(found)))
    elif found.loaded:
        click.echo(f"running as process {found.pid}" if found.pid else "waiting for somebody to connect")
    else:
        click.echo("installed, but not loaded" if found.installed else "not installed")
    if not found.loaded:
        raise SystemExit(1)


@agent.command("print")
@_agent_options
def agent_print(kind: str, name: str | None, port: int) -> None:
    """Print the files that install would write."""
    from vitalsd.agent import AgentError

    try:
        files = _agent(kind, name, port).files()
    except AgentError as error:
        raise _Failed(str(error)) from None
    for path, content in files.items():
        if len(files) > 1:
            click.echo(f"# {path}")
        click.echo(content)


def _target(pid: int | None, name: str | None, proc_root: str) -> int | None:
    """The pid that ``--pid`` or ``--name`` means. Raises `NoSuchProcess`."""
    if name is None:
        return pid
    if pid is not None:
        raise click.UsageError("--pid and --name exclude each other")
    import os

    from vitalsd.sources import NoSuchProcess, list_processes

    mine = [
        entry
        for entry in list_processes(proc_root=proc_root)
        if entry.uid == os.geteuid() and entry.pid != os.getpid() and name in entry.names
    ]
    if not mine:
        raise NoSuchProcess(f"no process of yours is called {name}")
    return max(mine, key=lambda entry: entry.started_unix_ns).pid


def _raise_descriptor_limit() -> None:
    """One descriptor per thread of the target is kept open, so take all that the system grants."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "linux" and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


main.add_command(report)
main.add_command(spool)
