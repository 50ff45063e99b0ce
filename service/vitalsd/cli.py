"""The command line. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import sys

import click

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
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Loopback address to bind.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port; 0 takes a free one.  [default: 9779, or a free one]",
)
def serve(pid: int | None, name: str | None, proc_root: str, host: str, port: int | None) -> None:
    """Serve the metrics of a process on http://127.0.0.1:9779 until Ctrl-C.

    Without --pid or --name it samples itself; any other process of yours can be asked for with
    /metrics?pid=N.
    """
    from vitalsd.http.app import create_app
    from vitalsd.sampler import Sampler, Targets
    from vitalsd.sidecar import DEFAULT_PORT, PortInUse, bind_tcp
    from vitalsd.sidecar import serve as serve_forever
    from vitalsd.sources import SourceError, list_processes, open_source

    _raise_descriptor_limit()
    try:
        target = _target(pid, name, proc_root)
        open_source(target, proc_root=proc_root).close()
    except SourceError as error:
        raise SystemExit(f"vitalsd: {error}") from None
    try:
        listener = bind_tcp(host, DEFAULT_PORT if port is None else port)
    except PortInUse as error:
        if port is not None:
            raise click.UsageError(f"{error.strerror}; choose another with --port, or 0 for a free one") from None
        click.echo(f"vitalsd: {error.strerror}; taking a free one", err=True)
        listener = bind_tcp(host, 0)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"cannot listen on {host}: {error}") from None

    sampler = Sampler(lambda: open_source(target, proc_root=proc_root))
    targets = Targets(sampler, lambda other: open_source(other, proc_root=proc_root))
    app = create_app(targets, lambda: list_processes(proc_root=proc_root))
    address, bound_port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    whom = f"process {target}" if target else "itself"

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
