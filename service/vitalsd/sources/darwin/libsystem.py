"""
libSystem of macOS: loaded once, and its calls by subject.

Nothing is loaded before `load`, so the module imports on every system. Word counts, sizes, releases
and error channels are dealt with in the modules that this one joins, and nowhere above.
"""

import ctypes
from ctypes import c_uint32
from typing import TYPE_CHECKING, Any

from vitalsd.sources.base import UnsupportedError
from vitalsd.sources.darwin.functions import DATA, bind
from vitalsd.sources.darwin.host_info import HostInfo
from vitalsd.sources.darwin.libproc import Libproc
from vitalsd.sources.darwin.mach_task import MachTask

if TYPE_CHECKING:
    from vitalsd.sources.darwin.tape import Tape

__all__ = ["LibSystem", "load"]


class LibSystem:
    """
    The loaded library.

    Args:
        quick: the functions of libSystem, to be called with the interpreter lock; they leave errno alone.
        slow: the same, to be called without it, with ctypes' copy of errno.
        task: ``mach_task_self_``.

    Raises:
        UnsupportedError: a function is missing; the text names it.
    """

    def __init__(self, quick: Any, slow: Any, task: c_uint32) -> None:
        try:
            bind(quick)
            bind(slow)
        except AttributeError as error:
            raise UnsupportedError(f"libSystem lacks a symbol: {error}") from None
        self.mach = MachTask(quick, slow, task)
        """Our own task."""
        self.proc = Libproc(slow)
        """Any process of our effective user."""
        self.host = HostInfo(quick, slow)
        """The machine."""


def load(path: str | None = None, tape: "Tape | None" = None) -> LibSystem:
    """
    Load libSystem, or the library at `path`.

    Args:
        tape: gets every call and its reply.

    Raises:
        UnsupportedError: it does not load or lacks a function; the text names it.
    """
    try:
        quick: Any = ctypes.PyDLL(path)
        slow: Any = ctypes.CDLL(path, use_errno=True)
    except OSError as error:
        raise UnsupportedError(f"cannot load libSystem: {error}") from None
    try:
        task = DATA["mach_task_self_"].in_dll(quick, "mach_task_self_")
    except ValueError as error:
        raise UnsupportedError(f"libSystem lacks a symbol: {error}") from None
    if tape is not None:
        quick, slow = tape.of(quick), tape.of(slow)
    return LibSystem(quick, slow, task)
