"""Run all checks of the doctor in order; a check that raises becomes a failed finding."""

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
from vitalsd.doctor import cpu_checks, machine_checks, process_checks
from vitalsd.doctor.finding import BUG, Finding
from vitalsd.doctor.sidecar_checks import sidecar
from vitalsd.doctor.soak import soak
from vitalsd.sources.platform import Platform

__all__ = ["Progress", "examine"]

Progress = Callable[[str, float | None], None]
"""Called with what is being checked, and the part of it that is done, from 0 to 1; ``None``: not known."""

OURS = re.compile(r"doctor-([0-9]{1,10})", re.ASCII)
"""Name of a directory that a doctor made, with its pid."""
MARKER = ".made-by-vitalsd-doctor"
"""Empty file in a directory that a doctor made: a directory without it is not removed."""


def examine(
    platform: Platform,
    *,
    soak_s: float | None = None,
    progress: Progress = lambda what, done: None,
) -> Generator[Finding, None, None]:
    """
    Yield the findings of all checks; they take about 10 s, plus the soak.

    When the iterator is closed or has ended, no file, process or socket of it is left.

    Args:
        platform: the platform; its sources are examined.
        progress: called as `Progress` describes.
        soak_s: duration of the soak, s; ``None``: no soak.
    """
    checks: list[tuple[str, Callable[[Platform], Iterator[Finding]]]] = [
        ("the platform", machine_checks.source),
        ("permissions", machine_checks.permission),
        ("descriptors", machine_checks.descriptors),
        ("directories", machine_checks.directories),
        ("CPU time, in process", cpu_checks.own_process),
        ("CPU time, another process", cpu_checks.another_process),
        ("memory", process_checks.memory),
        ("age", process_checks.age),
        ("threads", process_checks.threads),
        ("what snapshots leave behind", process_checks.check_leaks),
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
            except Exception as error:  # noqa: BLE001 - an unexpected error is a finding, and the other checks follow
                yield _broken(what, error)


def _broken(what: str, error: Exception) -> Finding:
    return Finding(
        f"broken.{what.replace(',', '').replace(' ', '-')}",
        what,
        "can be examined",
        f"{type(error).__name__}: {error}",
        "fail",
        f"check free descriptors, memory and disk space; otherwise {BUG}",
    )


@contextmanager
def _unmade() -> Iterator[None]:
    """Remove, at the end, the empty directories that did not exist before."""
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
    Yield two directories for the runtime files and the state of a sidecar, on the file systems of the real ones.

    They are apart from the real ones, so that no bug report contains the doctor's sidecar or its crash. ``None``: they
    cannot be made.
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
    """Make a directory in `parent`, and remove those of doctors that were killed."""
    for path in parent.iterdir():
        if (found := OURS.fullmatch(path.name)) and not _lives(int(found[1])) and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)
    place = parent / f"doctor-{os.getpid()}"
    check_socket_path(place / socket_name(2**22))
    place.mkdir(0o700)
    (place / MARKER).touch(0o600)
    return private_directory(place)


def _is_ours(place: Path) -> bool:
    """Return whether a doctor of this user made the directory."""
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
