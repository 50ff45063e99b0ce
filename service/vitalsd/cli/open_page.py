"""Run ``vitalsd open``: open the page of a running sidecar in a browser, with its token."""

from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vitalsd.discovery.runtime_file import Endpoint

__all__ = ["open_page"]

REDIRECT = """<!doctype html>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}">
<title>vitalsd</title>
<a href="{url}">To the page</a>
"""
"""Content of the file that leads to the page: it sends no referrer, because the URL has the token."""


@click.command("open")
@click.option(
    "--pid",
    type=click.IntRange(1, 2**31 - 1),
    metavar="N",
    help="Open the page of the sidecar that watches this process.",
)
@click.option("--no-browser", is_flag=True, help="Print the address and open no browser.")
def open_page(pid: int | None, no_browser: bool) -> None:
    """Open the page of your newest sidecar in a browser.

    If the sidecar requires a token, the command opens and prints the address of a file that only you can
    read and that redirects to the page: while the browser starts, every user of this machine could read a
    token in the address of the page.
    """
    import os

    from vitalsd.discovery.directories import EndpointError, runtime_directory
    from vitalsd.discovery.runtime_file import discover

    served = [each for each in discover(pid) if each.url and (pid is None or (each.target and each.target.pid == pid))]
    if not served:
        which, how = ("", "") if pid is None else (f" of process {pid}", f" --pid {pid}")
        raise CommandFailed(f"no sidecar{which} listens on TCP; start one with: vitalsd serve{how}")
    try:
        address = _address(served[0], runtime_directory)
    except (OSError, EndpointError) as error:
        raise CommandFailed(f"the file that leads to the page could not be written: {error}") from None
    click.echo(address)
    if not no_browser:
        import webbrowser

        from vitalsd.sidecar.frozen import restore_libraries

        restore_libraries(os.environ)
        if not webbrowser.open(address):
            raise CommandFailed("no browser could be started; open this address in one")


def _address(endpoint: "Endpoint", directory: "Callable[[], Path]") -> str:
    """Return the URL of the page, or of a file in `directory` that leads to it with the token."""
    import os
    from tempfile import NamedTemporaryFile

    from vitalsd.discovery.runtime_file import PAGE_FILE

    if endpoint.token is None:
        return f"{endpoint.url}/"
    path = directory() / PAGE_FILE  # one file for all sidecars: the token of another one is overwritten
    with NamedTemporaryFile("w", dir=path.parent, prefix=".open-", delete=False) as file:  # mode 0600
        file.write(REDIRECT.format(url=f"{endpoint.url}/#token={endpoint.token}"))
    os.replace(file.name, path)
    return path.as_uri()
