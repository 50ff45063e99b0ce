"""Check what vitalsd finds on this machine: the platform, what it may read, and where it may write."""

import os
import platform as python_platform
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import closing

from vitalsd.discovery.directories import EndpointError, runtime_directory, state_directory
from vitalsd.doctor.cpu_load import CpuLoadProcess
from vitalsd.doctor.finding import Finding, make_finding
from vitalsd.sources.base import SourceError
from vitalsd.sources.platform import Platform

__all__ = ["descriptors", "directories", "permission", "source"]

DESCRIPTORS = 64
"""Descriptors for a sidecar with a few clients; on Linux each thread of the target needs one more."""


def source(platform: Platform) -> Iterator[Finding]:
    """Check that the platform is supported and its kernel interface answers."""
    here = f"{platform.name} {python_platform.machine()}, {python_platform.release()}, Python {sys.version.split()[0]}"
    try:
        with closing(platform.open_source(None)) as own:
            counted_by, why = own.snapshot().source, ""
    except SourceError as error:
        counted_by, why = "", str(error)
    yield make_finding(
        "platform",
        "platform and source",
        "linux or macos, and the source can be opened",
        f"{here}, {counted_by or why}",
        bool(counted_by) and platform.name in ("linux", "macos"),
        "vitalsd reads Linux through /proc and macOS through libSystem: mount /proc, or name another with --proc-root",
    )


def permission(platform: Platform) -> Iterator[Finding]:
    """Check that another process of this user may be read, and count the processes."""
    try:
        with CpuLoadProcess(()) as other:
            with closing(platform.open_source(other.pid)) as opened:
                counted_by = opened.snapshot().source
            listed = list(platform.list_processes())
            good = any(entry.pid == other.pid for entry in listed)
        mine = sum(entry.is_of(os.geteuid()) for entry in listed)
        measured = f"{counted_by}; {len(listed)} processes, {mine} of this user"
        measured += "" if good else ", without the one just started"
    except SourceError as error:
        good, measured = False, str(error)
    yield make_finding(
        "permission",
        "another process of this user",
        "may be read, and is listed",
        measured,
        good,
        "a sandbox, hidepid or a seccomp filter hides processes of the same user: run vitalsd outside it",
    )


def descriptors(platform: Platform) -> Iterator[Finding]:
    """Check the limit of open descriptors."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    yield make_finding(
        "descriptors",
        "file descriptors allowed",
        f"at least {DESCRIPTORS}",
        limit,
        soft == resource.RLIM_INFINITY or soft >= DESCRIPTORS,
        "raise the limit: ulimit -n 1024",
    )


def directories(platform: Platform) -> Iterator[Finding]:
    """Check the directories of runtime files, and of the black box and the spool."""
    for check, what, find, variable in (
        ("directory.runtime", "directory of runtime files", runtime_directory, "VITALSD_RUNTIME_DIR"),
        ("directory.state", "directory of black box and spool", state_directory, "VITALSD_STATE_DIR"),
    ):
        try:
            path = find()
            mode = stat.S_IMODE(path.stat().st_mode)
            os.close(os.open(path, os.O_RDONLY))
            writable = os.access(path, os.W_OK | os.X_OK)
            measured, good = f"{mode:04o} {path}{'' if writable else ', not writable'}", mode == 0o700 and writable
        except (EndpointError, OSError) as error:
            measured, good = str(error), False
        yield make_finding(
            check,
            what,
            "mode 0700, writable",
            measured,
            good,
            f"name a directory of yours in {variable}",
        )
