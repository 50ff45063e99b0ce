"""Find programs that pip cannot install. Without one its tests are skipped; CI, which installs all, fails."""

import os
import shutil

import pytest

__all__ = ["program"]


def program(*names: str, package: str) -> str:
    """Return the path of the first of `names` that is installed."""
    for name in names:
        if found := shutil.which(name):
            return found
    missing = f"{names[0]} is not installed; on Debian: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
