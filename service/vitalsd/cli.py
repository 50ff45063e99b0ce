"""The command line. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.reporting import report, spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vitalsd.runs import RunDirectory
    from vitalsd.sampler import Targets
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


_host = click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Loopback address.")
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
    from contextlib import closing

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
def serve(
    pid: int | None,
    name: str | None,
    proc_root: str,
    host: str,
    port: int | None,
    record_interval: float,
    retention: float,
    black_box: bool,
) -> None:
    """Serve the metrics of a process on http://127.0.0.1:9779 until Ctrl-C.

    Without --pid or --name it samples itself; any other process of yours can be asked for with
    /metrics?pid=N.
    """
    from vitalsd.recorder import Recording
    from vitalsd.runs import RunDirectory
    from vitalsd.sampler import Sampler, Targets
    from vitalsd.sources import SourceError, list_processes, open_source

    if 0 < record_interval < 0.01:
        raise click.UsageError("--record-interval is 0 or at least 0.01 seconds")
    _raise_descriptor_limit()
    try:
        target = _target(pid, name, proc_root)
        open_source(target, proc_root=proc_root).close()
    except SourceError as error:
        raise SystemExit(f"vitalsd: {error}") from None
    runs = RunDirectory(_runs_path())
    recording = Recording(record_interval, retention * 60, runs=runs if black_box else None)
    sampler = Sampler(lambda: open_source(target, proc_root=proc_root), recording=recording)
    targets = Targets(sampler, lambda other: open_source(other, proc_root=proc_root))
    whom = f"process {target}" if target else "itself"
    _serve(targets, lambda: list_processes(proc_root=proc_root), runs, whom, host, port)


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

    _serve(Targets(Replay(record), nobody), list, RunDirectory(_runs_path()), f"a replay of {file.name}", host, port)


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
    import os

    root = os.environ.get("VITALSD_STATE_DIR") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "vitalsd"
    )
    return Path(root) / "runs"


def _serve(
    targets: "Targets",
    list_processes: "Callable[[], Iterable[ProcessEntry]]",
    runs: "RunDirectory",
    whom: str,
    host: str,
    port: int | None,
) -> None:
    """Listen and serve until a signal ends it."""
    from vitalsd.http.app import create_app
    from vitalsd.sidecar import DEFAULT_PORT, PortInUse, bind_tcp
    from vitalsd.sidecar import serve as serve_forever

    try:
        listener = bind_tcp(host, DEFAULT_PORT if port is None else port)
    except PortInUse as error:
        if port is not None:
            raise click.UsageError(f"{error.strerror}; choose another with --port, or 0 for a free one") from None
        click.echo(f"vitalsd: {error.strerror}; taking a free one", err=True)
        listener = bind_tcp(host, 0)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"cannot listen on {host}: {error}") from None
    app = create_app(targets, list_processes, runs=runs)
    address, bound_port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address

    def ready() -> None:
        click.echo(f"vitalsd: serving {whom} on http://{shown}:{bound_port}/metrics", err=True)

    serve_forever(app, [listener], ready=ready)


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
