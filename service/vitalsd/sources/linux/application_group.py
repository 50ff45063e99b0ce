"""
Find the control group in which a Linux desktop starts an application, to find its daemons.

A desktop with systemd starts each application in a unit of its own, ``app-NAME.scope`` or ``app-NAME.service``, see
https://systemd.io/DESKTOP_ENVIRONMENTS. A process stays in its control group when its parent exits.
"""

import os

from vitalsd.sources.linux.cpu_counters import read_file
from vitalsd.sources.linux.freezer import CGROUPS
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.procfs import group_paths

__all__ = ["application_group", "pids_in"]


def application_group(files: ProcessFiles) -> str | None:
    """Return the directory of the group if that of the process is one of an application; ``None``: it is not."""
    try:
        groups = group_paths(read_file("cgroup", files.directory), b"")
    except OSError:
        return None
    path = next((path for version, path in groups if version == 2), "")
    name = os.path.basename(path)
    if not (name.startswith("app-") and name.endswith((".scope", ".service"))) or path.startswith("/.."):
        return None
    return next((f"{mount}{path}" for mount in CGROUPS[2] if os.path.exists(f"{mount}{path}/cgroup.procs")), None)


def pids_in(group: str) -> frozenset[int]:
    """Return the processes of a group by their pids in our pid namespace; empty if they cannot be read."""
    try:
        with open(f"{group}/cgroup.procs", "rb") as file:
            return frozenset(map(int, file.read().split())) - {0}  # 0: of another pid namespace
    except OSError:
        return frozenset()
