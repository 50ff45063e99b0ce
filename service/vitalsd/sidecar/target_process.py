"""Find the process that `vitalsd serve` watches, by its pid or its name."""

import logging
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import NamedTuple

from vitalsd.discovery.program_key import program_key
from vitalsd.discovery.runtime_file import ProcessRun
from vitalsd.sidecar.config import SidecarConfig
from vitalsd.snapshot import Identity
from vitalsd.sources.base import NoSuchProcessError, ProcessEntry, Source, SourceError
from vitalsd.sources.platform import Platform
from vitalsd.sources.programs import ProgramDigest
from vitalsd.worker_thread import HungError, Worker

__all__ = ["Taken", "TargetProcess", "choose_process"]

log = logging.getLogger("vitalsd")


class TargetProcess:
    """
    Find and open the process of `SidecarConfig.pid` or `SidecarConfig.name`; without either, this one.

    Args:
        config: the settings, which have the pid or the name.
        platform: opens and lists processes.
    """

    def __init__(self, config: SidecarConfig, platform: Platform) -> None:
        self.platform = platform
        self._pid, self._name = config.pid, config.name
        self._program_of = ProgramDigest(program_key(), config.target_script)
        self._opened_as = ""
        """Name of the process when it was opened."""

    def __str__(self) -> str:
        """Return it as a line of the log names it."""
        return f"the process called {self._name}" if self._name else f"process {self._pid}" if self._pid else "itself"

    def check(self) -> ProcessRun | None:
        """
        Return the run of the process; ``None`` for a name, of which there need not be a process yet.

        Raises:
            SourceError: it cannot be read, or with a name, processes cannot be listed.
        """
        if self._name is not None:
            next(iter(self.platform.list_processes()), None)  # where this fails, the wait would never end
            return None
        with closing(self.open()) as source:
            found = source.identity()
            if self._pid is not None:
                source.snapshot()  # a zombie can be opened
        return ProcessRun(found.pid, found.start_key)

    def open(self) -> Source:
        """
        Open the process; with a name, the one that has the name now.

        Raises:
            SourceError: there is none, or it cannot be read.
        """
        try:
            pid = self._pid if self._name is None else self._choose(self._name)
            source = self.platform.open_source(pid, program_of=self._program_of)
        except NoSuchProcessError as error:
            raise NoSuchProcessError(f"{error}; waiting for one" if self._name is not None else str(error)) from None
        self._opened_as = source.identity().name
        return source

    def _choose(self, name: str) -> int:
        taken = choose_process(name, self.platform)
        if len(taken.called) > 1:
            count = len(taken.called)
            log.info("%d processes are called %s; process %d is taken: %s", count, name, taken.pid, taken.why)
        return taken.pid

    async def has_successor(self, now: Identity, finder: Worker) -> bool:
        """
        Return whether `now` has lost the name, and another process has it.

        Args:
            now: the process that is watched.
            finder: the thread that lists the processes, because that may hang.
        """
        if self._name is None or now.name == self._opened_as:  # without a change of name no list is needed
            return False
        name = self._name
        with suppress(SourceError, HungError):
            taken = await finder.run(lambda: choose_process(name, self.platform), "the list of processes: a read")
            return now.pid not in taken.called
        return False


class Taken(NamedTuple):
    """Name the process that was chosen, and the reason."""

    pid: int
    called: frozenset[int]
    """All processes of that name."""
    why: str


def choose_process(name: str, platform: Platform) -> Taken:
    """
    Choose one of this user's processes by its name.

    Of several, choose the one from which the others descend; of several such, the newest. On macOS the case of letters
    does not count, as in its file systems: a framework build of Python runs as ``Python``.

    Raises:
        NoSuchProcessError: none has this name.
    """
    fold = str.casefold if platform.name == "macos" else str
    every = {entry.pid: entry for entry in platform.list_processes()}
    called = frozenset(
        entry.pid
        for entry in every.values()
        if entry.is_of(os.geteuid()) and entry.pid != os.getpid() and fold(name) in map(fold, entry.names)
    )
    if not called:
        raise NoSuchProcessError(
            f"no process of yours is named {name}; a process has the names of its main thread (on Linux its first 15"
            " bytes), its program and its #! script; `python app.py` is named python"
        )
    eldest = [pid for pid in called if not _descends(pid, called, every)]
    # They may all descend from each other if a pid was given to a new process while they were listed.
    pid = max(eldest or called, key=lambda pid: (every[pid].started_unix_ns, pid))
    why = "the others descend from it" if len(eldest) == 1 else "it descends from none of them and is the newest such"
    return Taken(pid, called, why)


def _descends(pid: int, called: frozenset[int], every: Mapping[int, ProcessEntry]) -> bool:
    """Return whether `pid` descends from one of `called`."""
    above: set[int] = set()
    while pid in every and pid not in above:
        above.add(pid)
        pid = every[pid].parent
        if pid in called:
            return True
    return False
