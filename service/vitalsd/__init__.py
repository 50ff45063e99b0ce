"""A local metrics sidecar: one process's CPU, memory and threads, on Linux and macOS."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalsd.alongside import Spawned, SpawnError, spawn
    from vitalsd.inprocess import Sidecar, start

__version__ = "0.1.0"
"""A constant: where a program is vendored or frozen there may be no metadata of the distribution to read it from."""

__all__ = ["Sidecar", "SpawnError", "Spawned", "spawn", "start"]


def __getattr__(name: str) -> Any:
    # A host that only spawns, or a client that only reads runtime files, does not pay for a web framework.
    if name in ("Sidecar", "start"):
        from vitalsd import inprocess

        return getattr(inprocess, name)
    if name in ("SpawnError", "Spawned", "spawn"):
        from vitalsd import alongside

        return getattr(alongside, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
