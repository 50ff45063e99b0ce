"""Shared fixtures."""

pytest_plugins = ["darwin.fixtures"]
