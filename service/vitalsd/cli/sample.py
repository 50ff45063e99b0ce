"""Run ``vitalsd sample``: print one answer, without a server."""

from contextlib import closing

import click

from vitalsd.cli.options import (
    exclude,
    find_target,
    name_option,
    pid_option,
    platform_of,
    proc_root_option,
    raise_descriptor_limit,
)
from vitalsd.snapshot import Part

__all__ = ["sample"]


@click.command()
@pid_option
@name_option
@proc_root_option
@click.option(
    "--window-ms",
    type=click.IntRange(10, 60_000),
    default=1000,
    show_default=True,
    help="Measure over this window, in ms.",
)
@click.option(
    "--detail",
    type=click.Choice(["basic", "full"]),
    default="basic",
    show_default=True,
    help="Print the basic or the full answer.",
)
@click.option(
    "--sort",
    type=click.Choice(["tid", "cpu", "name"]),
    default="tid",
    show_default=True,
    help="Sort the threads by this.",
)
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Print at most N threads, after sorting.")
@click.pass_context
def sample(
    context: click.Context,
    pid: int | None,
    name: str | None,
    proc_root: str,
    window_ms: int,
    detail: str,
    sort: str,
    limit: int | None,
) -> None:
    """Measure one window and print the answer as JSON, without a server.

    Without --pid or --name it measures itself, which shows what an answer looks like.
    """
    from vitalsd.contract.encoding import encode, unavailable
    from vitalsd.sampling.sampler import sample as sample_window
    from vitalsd.sources.base import SourceError

    exclude(context, "pid", "name")
    raise_descriptor_limit()
    platform = platform_of(context, proc_root)
    try:
        with closing(platform.open_source(find_target(pid, name, platform))) as source:
            measurement = sample_window(source, window_ms, parts=Part.DETAIL if detail == "full" else Part.NONE)
            answer = encode(
                measurement,
                source.identity(),
                requested_ms=window_ms,
                detail=detail,  # type: ignore[arg-type]
                sort=sort,  # type: ignore[arg-type]
                limit=limit,
            )
    except SourceError as error:
        click.echo(unavailable(error, platform.name))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    click.echo(answer)
