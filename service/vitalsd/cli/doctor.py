"""Run ``vitalsd doctor``: check on this machine what vitalsd promises."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import CommandFailed, Number, complain, platform_of, raise_descriptor_limit
from vitalsd.sidecar.frozen import NotRunnableError, own_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vitalsd.doctor.finding import Finding
    from vitalsd.doctor.runner import Progress
    from vitalsd.sources.platform import Platform

__all__ = ["burn", "doctor"]

STYLES = {"pass": "green", "fail": "bold red", "not here": "dim"}
"""Style of each verdict on a terminal, in terms of rich."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--soak",
    type=Number(1, 7 * 86400),
    metavar="SECONDS",
    help="Also take snapshots without a pause for this long, and check for leaks.",
)
@click.option(
    "--tape",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write each call of libSystem and its reply to FILE (macOS), without names, paths, arguments and user ids.",
)
@click.pass_context
def doctor(context: click.Context, as_json: bool, soak: float | None, tape: Path | None) -> None:
    """Compare what vitalsd measures on this machine with known values, in about 10 seconds.

    The doctor runs threads that use a known part of a core, allocates and frees memory, starts and ends
    threads, and starts, queries, kills and restarts a sidecar. Each line gives the expected and the measured
    value, and a failed one the next step. The doctor leaves no files and no processes.

    On a Mac, --tape FILE makes a test of the run: the file contains the replies of the kernel, with `x` for
    each byte of a name. It must not exist before.

    Exit status: 0 all checks passed, 1 a check failed, 130 interrupted.
    """
    try:
        with _taped(platform_of(context), tape) as platform:
            healthy = _examine(platform, as_json, soak)
    except KeyboardInterrupt:
        complain("interrupted")
        raise SystemExit(130) from None
    except NotRunnableError as error:
        raise CommandFailed(str(error)) from None
    raise SystemExit(0 if healthy else 1)


@contextmanager
def _taped(platform: "Platform", tape: Path | None) -> "Iterator[Platform]":
    """Yield `platform`; with `tape`, record its calls in that new file. Raise `CommandFailed`."""
    if tape is None:
        yield platform
        return
    if platform.taped is None:
        raise CommandFailed(f"--tape records the calls of macOS, and this is {platform.name}")
    import os

    from vitalsd.sources.darwin.tape import Tape

    try:
        file = tape.open("x", encoding="ascii")
    except OSError as error:
        raise CommandFailed(f"cannot write {tape}: {error.strerror}") from None
    with file:
        yield platform.taped(Tape(file, os.getpid()))._replace(command=platform.command)


def _examine(platform: "Platform", as_json: bool, soak_s: float | None) -> bool:
    """Examine, print, and return whether no check has failed."""
    import json
    import signal
    import time
    from contextlib import closing
    from dataclasses import asdict

    from vitalsd import __version__
    from vitalsd.doctor.runner import examine

    raise_descriptor_limit()
    own_command()  # before anything is examined: without it most of the checks cannot be made
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    begun = time.monotonic()
    found: list[Finding] = []
    with (
        _progress(quiet=as_json) as (progress, show),
        closing(examine(platform, soak_s=soak_s, progress=progress)) as findings,
    ):
        for finding in findings:
            found.append(finding)
            show(finding)
    failed = sum(finding.verdict == "fail" for finding in found)
    passed = sum(finding.verdict == "pass" for finding in found)
    if as_json:
        report = {
            "version": __version__,
            "platform": platform.name,
            "healthy": not failed,
            "seconds": round(time.monotonic() - begun, 1),
            "findings": [asdict(finding) for finding in found],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(f"\n{passed} passed, {failed} failed, {len(found) - passed - failed} not here")
    return not failed


@click.command(hidden=True)
@click.argument("duties", nargs=-1, type=click.IntRange(0, 100))
def burn(duties: tuple[int, ...]) -> None:
    """Burn so many percent of a core each, for the doctor, which says when on standard input."""
    from vitalsd.doctor.cpu_load import burn_for_doctor

    burn_for_doctor(duties)


def _end(number: int, frame: object) -> None:
    """Handle a signal: raise, so that each context ends the process that it started."""
    raise SystemExit(128 + number)


@contextmanager
def _progress(*, quiet: bool) -> "Iterator[tuple[Progress, Callable[[Finding], None]]]":
    """Yield a function that shows the progress, and one that prints a finding."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from vitalsd.text import one_line

    out = Console(highlight=False, soft_wrap=True)
    # If findings and progress go to one terminal, one console has to draw both.
    console = out if out.is_terminal and not quiet else Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: float | None) -> None:
            bar.update(task, description=what, total=None if done is None else 1.0, completed=done or 0)

        def show(finding: "Finding") -> None:
            if quiet:
                return
            line = Text()
            line.append(f"{finding.verdict:8}", STYLES[finding.verdict])
            line.append(f"  {finding.what:42}  {one_line(finding.measured)}")
            if finding.verdict != "not here":
                line.append(f"   (expected: {one_line(finding.expected)})", style="dim")
            out.print(line)
            if finding.next_step:
                out.print(Text(f"          {one_line(finding.next_step)}", style="yellow"))

        yield progress, show
