"""What one operating system offers, as a value: so that a whole program can be run over another one."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vitalsd.sources import hides_processes, list_processes, open_source, platform_name
from vitalsd.sources.base import ProcessEntry, Source
from vitalsd.sources.linux.process_identity import LinuxBirths
from vitalsd.sources.process_identity import Births
from vitalsd.sources.programs import ProgramOf, no_program

if TYPE_CHECKING:
    from vitalsd.sources.darwin.libsystem import LibSystem
    from vitalsd.sources.darwin.tape import Tape

__all__ = ["OpenSource", "Platform", "births", "macos", "over_libsystem", "this_platform"]


class OpenSource(Protocol):
    """Open the source of one process; see `vitalsd.sources.open_source`."""

    def __call__(self, pid: int | None = None, *, program_of: ProgramOf = no_program) -> Source: ...


class Platform(NamedTuple):
    """Who opens, lists and tells apart the processes of a system."""

    name: str
    """As in answers: ``"linux"`` or ``"macos"``."""
    open_source: OpenSource
    """For a pid, or ``None`` for this process. Raises `SourceError`."""
    list_processes: Callable[[], Iterable[ProcessEntry]]
    births: Callable[[], Births]
    holdings: Callable[[], Mapping[str, int]]
    """What this process holds in the kernel besides descriptors, counted: on macOS ports and references on them."""
    hides_processes: Callable[[], bool] = lambda: False
    """Whether the kernel hides processes from other users."""
    command: Sequence[str] | None = None
    """How another process runs ``vitalsd`` over this platform; ``None``: as always."""
    taped: "Callable[[Tape], Platform] | None" = None
    """Return the same platform with the calls of this process on a tape; ``None``: it calls no libSystem."""


def macos(library: str | None = None, tape: "Tape | None" = None) -> Platform:
    """
    Return macOS over libSystem, or over the library at the path `library`.

    Args:
        tape: gets every call and its reply.

    Raises:
        UnsupportedError: the library does not load or lacks a function.
    """
    from vitalsd.sources.darwin.libsystem import load

    return over_libsystem(load(library, tape))._replace(taped=partial(macos, library))


def over_libsystem(lib: "LibSystem") -> Platform:
    """Return macOS over a library that is loaded already."""
    from vitalsd.sources.darwin import processes as darwin
    from vitalsd.sources.darwin.process_identity import DarwinBirths

    return Platform(
        name="macos",
        open_source=partial(darwin.open_process, lib=lib),
        list_processes=partial(darwin.list_processes, lib),
        births=lambda: DarwinBirths(lib),
        holdings=partial(darwin.holdings, lib),
    )


def this_platform(proc_root: str = "/proc") -> Platform:
    """
    That of the running kernel.

    Args:
        proc_root: Linux only: where procfs is mounted.
    """
    return Platform(
        name=platform_name(),
        open_source=partial(open_source, proc_root=proc_root),
        list_processes=partial(list_processes, proc_root=proc_root),
        births=births,
        holdings=_holdings,
        hides_processes=partial(hides_processes, proc_root=proc_root),
        taped=partial(macos, None) if platform_name() == "macos" else None,
    )


def _holdings() -> Mapping[str, int]:
    if platform_name() != "macos":
        return {}
    from vitalsd.sources.darwin.processes import holdings

    return holdings()


def births() -> Births:
    """Of the running kernel. Another system than Linux and macOS is undecided about everything."""
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.libsystem import load
        from vitalsd.sources.darwin.process_identity import DarwinBirths

        return DarwinBirths(load())
    return LinuxBirths()
