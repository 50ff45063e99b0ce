"""The options by which a service pushes to an OpenTelemetry Collector."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import Number, Refused

if TYPE_CHECKING:
    from vitalsd.exporters.otlp import Push
    from vitalsd.sampling.target_pool import Targets

__all__ = ["otlp_options", "push_to"]

log = logging.getLogger("vitalsd")


def otlp_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--otlp`` and ``--otlp-interval``."""
    command = click.option(
        "--otlp-interval",
        type=Number(1, 3600),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="Between two pushes.",
    )(command)
    return click.option(
        "--otlp",
        is_flag=False,
        flag_value="http://127.0.0.1:4318",
        metavar="[URL]",
        help="Push to the OpenTelemetry Collector there over OTLP/HTTP.  [http://127.0.0.1:4318]",
    )(command)


def push_to(url: str, interval_s: float, threads: int, targets: "Targets") -> "Push":
    """What pushes to the Collector at `url`. Raises `Refused`."""
    import os

    from vitalsd.exporters.otlp import NotInstalled, Push, endpoint_of, isolate

    ignored = isolate(os.environ)
    try:
        push = Push(targets, endpoint_of(url), interval_s=interval_s, threads=threads)
    except (ValueError, NotInstalled) as error:
        raise Refused(str(error)) from None
    if ignored:
        log.warning("options alone say what is sent and where; ignored: %s", ", ".join(ignored))
    return push
