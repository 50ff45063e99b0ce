"""Find out whether a cgroup freezer stops a Linux process, as ``docker pause`` does."""

from vitalsd.sources.linux.cpu_counters import read_file
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.procfs import group_paths

__all__ = ["is_frozen"]

FREEZING = ("get_signal", "do_freezer_trap")
"""Functions of the kernel in which a thread sleeps that the freezer of cgroup v2 stops (kernel/signal.c)."""
CGROUPS = {1: ("/sys/fs/cgroup/freezer",), 2: ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")}
"""Mount points of control groups, by version."""
FROZEN = {1: ("freezer.state", b"FROZEN"), 2: ("cgroup.events", b"\nfrozen 1")}
"""File of a control group, and its content while the group is frozen, by version."""


def is_frozen(files: ProcessFiles, state: str) -> bool:
    """
    Return whether a freezer stops the process; False if that cannot be read.

    Args:
        files: of the process.
        state: letter of the main thread: the freezer of cgroup v1 stops threads in state D, that of v2 in S.
    """
    try:
        if state == "S" and files.of_member(_wait_channel) in FREEZING:
            return True  # without control groups, which may not be mounted here
        groups = files.of_member(lambda path, directory: group_paths(read_file(f"{path}cgroup", directory), b"freezer"))
    except OSError:
        return False
    return any(_holds(version, path) for version, path in groups if version == (1 if state == "D" else 2))


def _wait_channel(path: str, directory: int) -> str:
    return read_file(f"{path}wchan", directory).decode("ascii", "replace")


def _holds(version: int, path: str) -> bool:
    """Return whether a control group, or one above it, is frozen."""
    file, word = FROZEN[version]
    for mount in CGROUPS[version]:
        try:
            with open(f"{mount}{path}/{file}", "rb") as opened:
                return word in b"\n" + opened.read()
        except OSError:
            continue
    return False
