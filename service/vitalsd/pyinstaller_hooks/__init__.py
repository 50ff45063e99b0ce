"""
Provide the hooks for PyInstaller, which finds this package by the entry point ``pyinstaller40``.

The hooks themselves import PyInstaller, so they are in a directory that is no package.
"""

import os

__all__ = ["get_hook_dirs"]


def get_hook_dirs() -> list[str]:
    """Return the directories of the hooks."""
    return [os.path.join(os.path.dirname(os.path.abspath(__file__)), "hooks")]
