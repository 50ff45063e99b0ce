"""Define paths of the checkout, for tests and the programs that they start."""

from pathlib import Path

__all__ = ["DATA", "ROOT", "SUPPORT", "TESTS"]

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
DATA = TESTS / "data"
"""Recorded output of kernels."""
