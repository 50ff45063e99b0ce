"""
What the tests of `make test-hosts` share.

They need packages and programs that are too heavy for `make test`, from an environment of their own. On the machine of
a user a test without its packages or programs is skipped with the reason; in CI, where all are installed, it fails.
"""

import os
from collections.abc import Generator

import pytest

IN_CI = os.environ.get("CI") == "true"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker by which a test may be skipped in CI as well."""
    config.addinivalue_line("markers", "optional: needs what the project cannot install, as another Python")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failed one in CI."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("optional") is None:
        report.outcome = "failed"
        report.longrepr = f"in CI everything must run: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a file that was skipped as a whole into a failure in CI."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"in CI everything must run: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why it was skipped."""
    longrepr = report.longrepr
    return longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
