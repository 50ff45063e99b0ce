"""Shared fixtures."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from support.as_darwin.emulation import COUNTED
from support.target import Target

pytest_plugins = ["support.darwin.fixtures"]

# Two busy cores make any deadline per example a flake.
settings.register_profile("vitalsd", deadline=None)
settings.load_profile("vitalsd")

# In the background of a script SIGINT is ignored, and would be by all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran as on a Mac; the dots show one for each group of files."""
    passed = terminalreporter.stats.get("passed", ())
    ran = [value for report in passed for key, value in report.user_properties if key == COUNTED]
    if ran:
        terminalreporter.write_line(f"{sum(ran)} tests passed as on a Mac (tests/support/as_darwin)")


@pytest.fixture(autouse=True)
def _same_umask_and_directory() -> Iterator[None]:
    """Restore what a command sets for the whole process when a test runs it in this one."""
    umask, directory = os.umask(0o022), Path.cwd()
    os.umask(umask)
    yield
    os.umask(umask)
    os.chdir(directory)


@pytest.fixture
def start() -> Iterator[Callable[..., Target]]:
    """Starts target programs that end with the test."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Target:
            return stack.enter_context(Target(*arguments))

        yield start


def _short_path() -> Iterator[Path]:
    """A directory whose path leaves room for that of a Unix socket, which pytest's own on macOS does not."""
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as path:
        yield Path(path).resolve()


short_path = pytest.fixture(_short_path)
module_path = pytest.fixture(_short_path, scope="module")
