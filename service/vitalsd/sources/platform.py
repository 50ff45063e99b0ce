"""What one operating system offers, as a value: so that a whole program can be run over another one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from vitalsd.sources import ProcessEntry, Source, hides_processes, list_processes, open_source, platform_name
from vitalsd.sources.birth import Births, births
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["OpenSource", "Platform", "this_platform"]


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
    )


def _holdings() -> Mapping[str, int]:
    if platform_name() != "macos":
        return {}
    from vitalsd.sources.darwin import holdings

    return holdings()
