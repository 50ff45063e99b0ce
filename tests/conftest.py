"""Shared fixtures."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings

from target import Target

pytest_plugins = ["darwin.fixtures"]

# Two busy cores make any deadline per example a flake.
settings.register_profile("vitalsd", deadline=None)
settings.load_profile("vitalsd")


@pytest.fixture
def start() -> Iterator[Callable[..., Target]]:
    """Starts target programs that end with the test."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Target:
            return stack.enter_context(Target(*arguments))

        yield start
