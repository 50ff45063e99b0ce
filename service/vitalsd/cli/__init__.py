"""The command line. Each command imports what it needs when it runs, so that ``--help`` is quick."""

import click

from vitalsd.cli.agent import agent
from vitalsd.cli.completion import completion
from vitalsd.cli.doctor import doctor
from vitalsd.cli.listing import endpoints, runs
from vitalsd.cli.open import open_page
from vitalsd.cli.report import report, spool
from vitalsd.cli.sample import sample
from vitalsd.cli.serve import replay, serve
from vitalsd.cli.top import top

__all__ = ["main"]

EPILOG = """\b
Exit status: 0 done, 1 the numbers cannot be had, 2 wrong usage, 130 interrupted."""


@click.group(
    commands=[
        *(sample, top, serve, replay, runs, endpoints, open_page),
        *(agent, doctor, report, spool, completion),
    ],
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="vitalsd", message="%(prog)s %(version)s")
def main() -> None:
    """What is this process doing? CPU, memory and every thread, on Linux and macOS.

    \b
    vitalsd sample --pid 4242          one answer, no server
    vitalsd top --pid 4242             look on, live
    vitalsd serve --pid 4242           serve it on http://127.0.0.1:9779
    curl -s localhost:9779/metrics     ask the server
    vitalsd doctor                     is it right on this machine?
    """
