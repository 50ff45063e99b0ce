"""
Load libSystem of macOS, and group its calls by subject.

Only `load` loads it, so this module can be imported on every system. The modules that it imports handle word counts,
sizes, releases and error codes, so that no module above has to.
"""

import ctypes
from ctypes import c_uint32
from typing import TYPE_CHECKING, Any

from vitalsd.sources.base import UnsupportedError
from vitalsd.sources.darwin.functions import DATA, bind
from vitalsd.sources.darwin.host_info import HostInfo
from vitalsd.sources.darwin.host_statistics import HostStatistics
from vitalsd.sources.darwin.libproc import Libproc
from vitalsd.sources.darwin.mach_task import MachTask

if TYPE_CHECKING:
    from vitalsd.sources.darwin.tape import Tape

__all__ = ["LibSystem", "load"]


class LibSystem:
    """
    The loaded library.

    Args:
        quick: the functions of libSystem, called with the interpreter lock held; errno is not saved.
        slow: the same functions, called with the interpreter lock released, and errno saved in ctypes' copy.
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
        """Calls on our own task."""
        self.proc = Libproc(slow)
        """Calls on any process of our effective user."""
        self.host = HostInfo(quick, slow)
        """Calls on the machine that need no port."""
        self.statistics = HostStatistics(slow, task)
        """Calls on the machine through its host port."""


def load(path: str | None = None, tape: "Tape | None" = None) -> LibSystem:
    """
    Load libSystem or another library with its functions.

    Args:
        path: of the library; default: libSystem.
        tape: records every call and its reply.

    Raises:
        UnsupportedError: the library does not load or lacks a function; the text names it.
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
