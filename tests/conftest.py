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
from support.paths import TESTS
from support.target import Target

pytest_plugins = ["support.darwin.fixtures"]

LONGEST = (
    "recording/test_hang_causes.py",
    "sources/darwin/test_as_on_a_mac.py",
    "sidecar/test_hosts.py",
    "client/test_spool.py",
    "http/test_page.py",
    "sidecar/test_in_process.py",
    "system/test_hangs.py",
    "recording/test_foreign_runs.py",
    "recording/test_black_box.py",
    "http/test_recordings_routes.py",
    "sidecar/test_service.py",
    "top/test_top.py",
    "doctor/test_doctor.py",
    "http/test_metrics_routes.py",
    "http/test_connection.py",
    "client/test_report.py",
    "client/test_fetch.py",
    "sources/linux/test_every_linux.py",
    "system/test_workflow.py",
    "system/test_disks.py",
    "http/test_neighbours.py",
    "http/test_signals_routes.py",
    "sidecar/test_no_thread.py",
)
"""Files that take more than 20 s, the longest first: begun last, one of them would leave the other workers idle."""

# Two busy cores make any deadline per example a flake.
settings.register_profile("vitalsd", deadline=None, max_examples=int(os.environ.get("VITALSD_EXAMPLES", "50")))
settings.load_profile("vitalsd")

# In the background of a script both are ignored, and would be by all programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; in a file, and among the others, the order stays."""
    rank = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


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
    """Yield a directory with a path short enough for a Unix socket below it; that of pytest on macOS is too long."""
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as path:
        yield Path(path).resolve()


short_path = pytest.fixture(_short_path)
module_path = pytest.fixture(_short_path, scope="module")
