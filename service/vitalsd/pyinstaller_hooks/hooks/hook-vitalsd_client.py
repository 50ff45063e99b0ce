"""Collect the modules that a client imports by name."""

from PyInstaller.utils.hooks import collect_submodules  # type: ignore[import-untyped]

hiddenimports = collect_submodules("vitalsd_client")
