"""``vitalsd replay``: a dead process over HTTP."""

from pathlib import Path

import click

from vitalsd.cli.log import log_format_option, logging_as
from vitalsd.cli.options import Failed, host_option, port_option
from vitalsd.cli.serving import Serving, Where, import_service, serve_until_signal, starts

__all__ = ["replay"]


@click.command(cls=Serving)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@host_option
@port_option
@log_format_option
@starts
def replay(file: Path, host: str, port: int | None, log_format: str) -> None:
    """Serve a dead run, from a black box or a bug report, as if it were alive.

    FILE is a .sqlite file (see `vitalsd runs`) or the .zip of a report. /history and
    /metrics?mode=trailing answer for its end.
    """
    from vitalsd.replay import Replay, load
    from vitalsd.sources import NoSuchProcess, Source
    from vitalsd.stored_run import UnreadableRun
    from vitalsd.targets import Targets

    def nobody(pid: int) -> Source:
        raise NoSuchProcess(f"this is a replay of {file.name}; it has no process {pid}")

    with logging_as(log_format):
        try:
            record = load(file)
        except (UnreadableRun, OSError) as error:
            raise Failed(str(error)) from None
        import_service()
        serve_until_signal(
            Targets(Replay(record), nobody),
            list,
            None,  # nobody's crash is to be told of by a replay, and least of all the one that is replayed
            f"a replay of {file.name}",
            Where(host, port),
            published=False,
        )
