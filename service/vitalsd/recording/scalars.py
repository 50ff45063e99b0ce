"""
Store what a snapshot has beside its threads and children as a row of integers, and restore it.

A figure that is unknown is `UNKNOWN`. The names derive from the types of `vitalsd.snapshot`: a new field of the machine
or of the tree needs nothing here, one of the process a name in `FIGURES`.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from vitalsd.snapshot import Child, MachineFigures, ProcessFigures, ProcessTree, Snapshot

__all__ = ["SCALARS", "UNKNOWN", "scalars_of", "snapshot_fields"]

UNKNOWN = -1
"""Stands for a figure that the platform, the permission or the interval does not give; any negative one is read so."""

COUNTERS = (
    "monotonic_ns",
    "boottime_ns",
    "wall_ns",
    "uptime_ns",
    "skew_ns",
    "cpu_ns",
    "exited_low_ns",
    "exited_high_ns",
    "rss_bytes",
    "vm_bytes",
)
"""Known in each snapshot."""
WAITS = ("wait_ns", "wait_error_ns")
FIGURES = (
    "anonymous_bytes",
    "footprint_bytes",
    "swap_bytes",
    "open_fds",
    "major_faults",
    "idle_wakeups",
    "interrupt_wakeups",
    "energy_nj",
    "reaped_ns",
)
"""Fields of `ProcessFigures` that are recorded."""
MACHINE = tuple(f"machine_{name}" for name in MachineFigures._fields)
TREE = tuple(f"tree_{name}" for name in ProcessTree._fields if name != "children")

SCALARS = COUNTERS + WAITS + FIGURES + MACHINE + TREE
"""Integers that are stored for each snapshot; their order is the format on disk, see `SCHEMA_VERSION`."""

NO_FIGURES, NO_MACHINE, NO_TREE = ((None,) * len(names) for names in (FIGURES, MACHINE, TREE))
figures_of = attrgetter(*FIGURES)
"""Returns the recorded fields of `ProcessFigures`."""


def scalars_of(snapshot: Snapshot) -> Sequence[int]:
    """Return the integers of a snapshot, in the order of `SCALARS`."""
    optional = (
        snapshot.wait_ns,
        snapshot.wait_error_ns,
        *(NO_FIGURES if snapshot.figures is None else figures_of(snapshot.figures)),
        *(NO_MACHINE if snapshot.machine is None else snapshot.machine),
        *(NO_TREE if snapshot.tree is None else snapshot.tree[: len(TREE)]),
    )
    return (
        snapshot.monotonic_ns,
        snapshot.boottime_ns,
        snapshot.wall_ns,
        snapshot.uptime_ns,
        snapshot.skew_ns,
        snapshot.cpu_ns,
        *snapshot.exited_cpu_ns,
        snapshot.rss_bytes,
        snapshot.vm_bytes,
        *[UNKNOWN if value is None else value for value in optional],
    )


def snapshot_fields(scalars: Sequence[int], children: tuple[Child, ...] = ()) -> dict[str, Any]:
    """Return the fields of a `Snapshot` that `scalars` and `children` hold."""
    known: dict[str, Any] = dict(zip(SCALARS, scalars, strict=True))
    fields: dict[str, Any] = {name: known[name] for name in COUNTERS}
    fields["exited_cpu_ns"] = fields.pop("exited_low_ns"), fields.pop("exited_high_ns")
    fields |= {name: _optional(known[name]) for name in WAITS}
    figures: dict[str, Any] = {name: _optional(known[name]) for name in FIGURES}
    fields["figures"] = None if all(value is None for value in figures.values()) else ProcessFigures(**figures)
    machine = [_optional(known[name]) for name in MACHINE]
    fields["machine"] = None if machine[0] is None else MachineFigures(bool(machine[0]), *machine[1:])
    tree = {name.removeprefix("tree_"): known[name] for name in TREE}
    fields["tree"] = None if min(tree.values()) < 0 else ProcessTree(**tree, children=children)
    return fields


def _optional(value: int) -> int | None:
    return None if value < 0 else value
