"""A local metrics sidecar: one process's CPU, memory and threads, on Linux and macOS."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalsd.__main__ import freeze_support
    from vitalsd.sidecar.in_process import Sidecar, StartError, start
    from vitalsd.sidecar.listen_errors import ListenError, PortInUseError
    from vitalsd.sidecar.spawn import SpawnError, spawn
    from vitalsd.sidecar.spawned import Spawned

__version__ = "0.1.0"
"""A constant, because a vendored or frozen program may have no metadata of the distribution to read it from."""

__all__ = [
    "ListenError",
    "PortInUseError",
    "Sidecar",
    "SpawnError",
    "Spawned",
    "StartError",
    "freeze_support",
    "spawn",
    "start",
]


def __getattr__(name: str) -> Any:
    # A host that only spawns, or a client that only reads runtime files, does not pay for a web framework.
    if name in ("ListenError", "PortInUseError"):
        from vitalsd.sidecar import listen_errors

        return getattr(listen_errors, name)
    if name in ("Sidecar", "StartError", "start"):
        from vitalsd.sidecar import in_process

        return getattr(in_process, name)
    if name == "freeze_support":
        from vitalsd import __main__ as program

        return program.freeze_support
    if name in ("SpawnError", "Spawned", "spawn"):
        from vitalsd.sidecar import spawn, spawned

        return getattr(spawned if name == "Spawned" else spawn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
