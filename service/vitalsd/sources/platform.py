"""Bundle the functions of one operating system in a value, so that tests can run the program over another one."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vitalsd.sources import hides_processes, list_processes, open_source, platform_name
from vitalsd.sources.base import ProcessEntry, Source
from vitalsd.sources.linux.process_identity import LinuxProcessIdentityReader
from vitalsd.sources.process_identity import ProcessIdentityReader
from vitalsd.sources.programs import ProgramOf, no_program

if TYPE_CHECKING:
    from vitalsd.sources.darwin.libsystem import LibSystem
    from vitalsd.sources.darwin.tape import Tape

__all__ = ["OpenSource", "Platform", "macos", "over_libsystem", "process_identities", "this_platform"]


class OpenSource(Protocol):
    """The type of a function that opens the source of one process."""

    def __call__(self, pid: int | None = None, *, program_of: ProgramOf = no_program) -> Source:
        """Open the source of `pid`; see `vitalsd.sources.open_source`."""
        ...


class Platform(NamedTuple):
    """The functions that open, list and identify the processes of one operating system."""

    name: str
    """Name in answers: ``"linux"`` or ``"macos"``."""
    open_source: OpenSource
    """Open the source of a pid, or of this process (``None``). Raises `SourceError`."""
    list_processes: Callable[[], Iterable[ProcessEntry]]
    process_identities: Callable[[], ProcessIdentityReader]
    holdings: Callable[[], Mapping[str, int]]
    """Count the resources of this process in the kernel besides descriptors: on macOS ports and their references."""
    hides_processes: Callable[[], bool] = lambda: False
    """Return whether the kernel hides processes from other users."""
    command: Sequence[str] | None = None
    """Command with which another process runs ``vitalsd`` over this platform; ``None``: the usual command."""
    taped: "Callable[[Tape], Platform] | None" = None
    """Return the same platform with the calls of this process on a tape; ``None``: it does not call libSystem."""


def macos(library: str | None = None, tape: "Tape | None" = None) -> Platform:
    """
    Return the platform macOS over libSystem or another library.

    Args:
        library: path of the library; default: libSystem.
        tape: records every call and its reply.

    Raises:
        UnsupportedError: the library does not load or lacks a function.
    """
    from vitalsd.sources.darwin.libsystem import load

    return over_libsystem(load(library, tape))._replace(taped=partial(macos, library))


def over_libsystem(lib: "LibSystem") -> Platform:
    """Return the platform macOS over a loaded library."""
    from vitalsd.sources.darwin import processes as darwin
    from vitalsd.sources.darwin.process_identity import DarwinProcessIdentityReader

    return Platform(
        name="macos",
        open_source=partial(darwin.open_process, lib=lib),
        list_processes=partial(darwin.list_processes, lib),
        process_identities=lambda: DarwinProcessIdentityReader(lib),
        holdings=partial(darwin.holdings, lib),
    )


def this_platform(proc_root: str = "/proc") -> Platform:
    """
    Return the platform of the running kernel.

    Args:
        proc_root: Linux only: mount point of procfs.
    """
    return Platform(
        name=platform_name(),
        open_source=partial(open_source, proc_root=proc_root),
        list_processes=partial(list_processes, proc_root=proc_root),
        process_identities=process_identities,
        holdings=_holdings,
        hides_processes=partial(hides_processes, proc_root=proc_root),
        taped=partial(macos, None) if platform_name() == "macos" else None,
    )


def _holdings() -> Mapping[str, int]:
    if platform_name() != "macos":
        return {}
    from vitalsd.sources.darwin.processes import holdings

    return holdings()


def process_identities() -> ProcessIdentityReader:
    """
    Return the reader of the running kernel.

    Platform limit: on a system other than Linux and macOS it identifies no process.
    """
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.libsystem import load
        from vitalsd.sources.darwin.process_identity import DarwinProcessIdentityReader

        return DarwinProcessIdentityReader(load())
    return LinuxProcessIdentityReader()
