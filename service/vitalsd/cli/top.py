"""Run ``vitalsd top``: show a process live."""

from typing import TYPE_CHECKING, Any

import click

from vitalsd.cli.options import (
    CommandFailed,
    Number,
    UsageRefused,
    complain,
    exclude,
    find_target,
    name_option,
    pid_option,
    platform_of,
    proc_root_option,
    raise_descriptor_limit,
)
from vitalsd.sidecar.config import SETTINGS

if TYPE_CHECKING:
    from vitalsd.sources.platform import Platform
    from vitalsd.top.feed import Feed

__all__ = ["top"]


@click.command()
@pid_option
@name_option
@click.option("--url", metavar="URL", help="Ask the sidecar at this URL, for example http://127.0.0.1:9779.")
@click.option(
    "--interval",
    type=Number(0.1, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Sample at this interval.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Print N lines instead of the full screen, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print each answer of /metrics on a line of its own.")
@proc_root_option
@click.pass_context
def top(
    context: click.Context,
    pid: int | None,
    name: str | None,
    url: str | None,
    interval: float,
    count: int | None,
    as_json: bool,
    proc_root: str,
) -> None:
    """Show a process live: CPU, memory, waits, its threads, the machine, marks and events.

    Without --pid, --name or --url it shows the target of your newest sidecar. If a sidecar watches the
    target, it provides the samples; otherwise the target is sampled directly. With --name, the next process
    of that name is shown when this one has ended.

    On a terminal it fills the screen (? shows the keys, q quits); into a pipe or a file it writes a line
    for each sample. The exit status is 1 if the target ended before N samples.
    """
    exclude(context, "url", "name")
    exclude(context, "pid", "name")
    exclude(context, "url", "proc_root")
    raise_descriptor_limit()
    from vitalsd.discovery.http_connection import ExchangeError
    from vitalsd.sources.base import SourceError
    from vitalsd.top import fullscreen, line_output
    from vitalsd_client.locate import NoSidecarError

    full_screen = fullscreen.fits() and count is None and not as_json
    # A sidecar may follow a name; a caller that wants N lines does not wait for the next process of it.
    follow = name is not None or (url is not None and count is None)
    try:
        feed = _feed(
            platform_of(context, proc_root),
            _watched() if (pid, name, url) == (None, None, None) else pid,
            name,
            url,
            interval_s=interval,
            first_s=0.25 if full_screen else interval,
            follow=follow,
            detail="full" if full_screen else "basic",
            sidecars=proc_root == SETTINGS["proc_root"].default,
        )
        if full_screen:
            _end_by(fullscreen.show(feed))
        elif not line_output.lines(feed, count=count, as_json=as_json, say=click.echo, note=complain):
            raise SystemExit(1)
    except (SourceError, ExchangeError) as error:
        raise CommandFailed(str(error)) from None
    except NoSidecarError as error:
        raise UsageRefused(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _feed(platform: "Platform", pid: int | None, name: str | None, url: str | None, **more: Any) -> "Feed":
    """Return the feed of the process with this pid or name, or of the sidecar at `url`; see `Feed` for the rest."""
    from vitalsd.top.feed import Feed

    def find() -> int:
        found = find_target(pid, name, platform)
        assert found is not None
        return found

    return Feed(find, platform.open_source, url=url, pid=pid, **more)


def _end_by(number: int) -> None:
    """End by the signal `number`, so that the parent process sees it in the exit status; return if it is 0."""
    import os
    import signal

    if number == signal.SIGINT:
        raise SystemExit(130)
    if number:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _watched() -> int:
    """Return the target of this user's newest sidecar. Raise `NoSidecarError`."""
    from vitalsd.discovery.runtime_file import discover
    from vitalsd_client.locate import NoSidecarError

    for each in discover():
        if each.target is not None:
            return each.target.pid
    raise NoSidecarError("no sidecar of yours watches a process; name one with --pid or --name")
