"""Hold what a source reads at one instant (`Snapshot`), and compute the difference of two snapshots (`measure`)."""

from vitalsd.snapshot.comparison import allowance_ns, idle_allowance_ns
from vitalsd.snapshot.measurement import Measurement, contradiction, measure
from vitalsd.snapshot.reading import (
    HALTED,
    MEMORY_PRESSURE_LEVELS,
    SUSPEND_GRAIN_NS,
    THERMAL_STATES,
    Child,
    Identity,
    MachineFigures,
    Part,
    ProcessFigures,
    ProcessTree,
    Snapshot,
    ThreadFigures,
    ThreadRoster,
)
from vitalsd.snapshot.reasons import MachineUse, TreeUse, reaped_within

__all__ = [
    "HALTED",
    "MEMORY_PRESSURE_LEVELS",
    "SUSPEND_GRAIN_NS",
    "THERMAL_STATES",
    "Child",
    "Identity",
    "MachineFigures",
    "MachineUse",
    "Measurement",
    "Part",
    "ProcessFigures",
    "ProcessTree",
    "Snapshot",
    "ThreadFigures",
    "ThreadRoster",
    "TreeUse",
    "allowance_ns",
    "contradiction",
    "idle_allowance_ns",
    "measure",
    "reaped_within",
]
