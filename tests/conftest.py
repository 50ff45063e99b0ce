"""Shared fixtures."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for that of a Unix socket, which pytest's own on macOS does not."""
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as path:
        yield Path(path).resolve()
