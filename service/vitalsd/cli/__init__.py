"""The command line. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import click

from vitalsd.cli.agent import agent
from vitalsd.cli.doctor import doctor
from vitalsd.cli.listing import endpoints, runs
from vitalsd.cli.report import report, spool
from vitalsd.cli.sample import sample
from vitalsd.cli.serve import replay, serve

__all__ = ["main"]

EPILOG = """\b
Exit status: 0 done, 1 the numbers cannot be had, 2 wrong usage, 130 interrupted."""


@click.group(
    commands=[sample, serve, replay, runs, endpoints, agent, doctor, report, spool],
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="vitalsd", message="%(prog)s %(version)s")
def main() -> None:
    """What is this process doing? CPU, memory and every thread, on Linux and macOS.

    \b
    vitalsd sample --pid 4242          one answer, no server
    vitalsd serve --pid 4242           serve it on http://127.0.0.1:9779
    curl -s localhost:9779/metrics     ask the server
    vitalsd doctor                     is it right on this machine?
    """
