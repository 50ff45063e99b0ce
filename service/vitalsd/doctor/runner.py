"""All that a doctor looks at, in order, and what becomes of a check that cannot be made."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from vitalsd.discovery.directories import (
    EndpointError,
    check_socket_path,
    private_directory,
    runtime_directories,
    runtime_directory,
    socket_name,
    state_directory,
    state_path,
)
from vitalsd.doctor import cpu_checks as calibration
from vitalsd.doctor import machine_checks as machine
from vitalsd.doctor import process_checks as process
from vitalsd.doctor.finding import BUG, Finding
from vitalsd.doctor.sidecar_checks import sidecar
from vitalsd.doctor.soak import soak
from vitalsd.sources.platform import Platform

__all__ = ["Progress", "examine"]

Progress = Callable[[str, float | None], None]
"""Told what is being looked at, and how much of that is done, if that is known."""

OURS = re.compile(r"doctor-([0-9]{1,10})", re.ASCII)
MARKER = ".made-by-vitalsd-doctor"
"""File in such a directory: without it the directory is not removed."""


def examine(
    platform: Platform,
    *,
    soak_s: float | None = None,
    progress: Progress = lambda what, done: None,
) -> Generator[Finding, None, None]:
    """
    Look at everything; about ten seconds, and the soak.

    When the iterator is closed or has ended, nothing is left of it: no file, process or socket.

    Args:
        platform: whose sources are examined.
        soak_s: also soak for so long.
    """
    checks: list[tuple[str, Callable[[Platform], Iterator[Finding]]]] = [
        ("the platform", machine.source),
        ("permissions", machine.permission),
        ("descriptors", machine.descriptors),
        ("directories", machine.directories),
        ("CPU time, in process", calibration.own_process),
        ("CPU time, another process", calibration.another_process),
        ("memory", process.memory),
        ("age", process.age),
        ("threads", process.threads),
        ("what snapshots leave behind", process.leftovers),
    ]
    with _unmade(), _places() as places:
        checks.append(("a sidecar", partial(sidecar, places=places)))
        if soak_s is not None:
            progressed = partial(progress, "soak")
            checks.append(("soak", partial(soak, seconds=soak_s, progress=progressed)))
        for what, check in checks:
            progress(what, None)
            try:
                yield from check(platform)
            except Exception as error:  # noqa: BLE001 - what a check did not reckon with is a finding, and the rest goes on
                yield _broken(what, error)


def _broken(what: str, error: Exception) -> Finding:
    return Finding(
        f"broken.{what.replace(',', '').replace(' ', '-')}",
        what,
        "can be examined",
        f"{type(error).__name__}: {error}",
        "fail",
        f"more descriptors, memory or room on disk? If not, {BUG}",
    )


@contextmanager
def _unmade() -> Iterator[None]:
    """Take away the empty directories that were not there before."""
    wanted = list(runtime_directories())
    with suppress(EndpointError):
        wanted.append(state_path())
    absent = {path for each in wanted for path in (each, *each.parents) if not path.exists()}
    try:
        yield
    finally:
        for path in sorted(absent, key=lambda path: -len(path.parts)):
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _places() -> Iterator[tuple[Path, Path] | None]:
    """
    Directories for a sidecar's runtime files and state, on the file systems where those of others go.

    Apart from those, so that no bug report takes the doctor's sidecar, or its crash, for a real one.
    """
    made: list[Path] = []
    try:
        for find in (runtime_directory, state_directory):
            with suppress(EndpointError, OSError):
                made.append(_place(find()))
                continue
            with suppress(OSError):
                made.append(Path(tempfile.mkdtemp(prefix=f"doctor-{os.getpid()}-")))
        yield (made[0], made[1]) if len(made) == 2 else None
    finally:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


def _place(parent: Path) -> Path:
    """A directory of ours in `parent`; those of doctors that were killed go."""
    for path in parent.iterdir():
        if (found := OURS.fullmatch(path.name)) and not _lives(int(found[1])) and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)
    place = parent / f"doctor-{os.getpid()}"
    check_socket_path(place / socket_name(2**22))
    place.mkdir(0o700)
    (place / MARKER).touch(0o600)
    return private_directory(place)


def _is_ours(place: Path) -> bool:
    """Whether a doctor made the directory."""
    try:
        found = place.lstat(), (place / MARKER).lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found[0].st_mode) and {each.st_uid for each in found} == {os.geteuid()}


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
