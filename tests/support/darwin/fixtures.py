"""Fixtures over the simulated libSystem."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.darwin.simulator import Simulator, build
from support.target import OwnWorkload
from support.workload import ChildWorkload


@pytest.fixture(scope="session")
def simulated_libsystem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built once per run."""
    return build(tmp_path_factory.mktemp("libsystem"))


@pytest.fixture
def simulator(simulated_libsystem: Path, tmp_path: Path) -> Iterator[Simulator]:
    """A fresh kernel; at the end of the test nothing may be owed to it and no rule may have been broken."""
    simulator = Simulator(simulated_libsystem, tmp_path)
    yield simulator
    assert simulator.violations == []
    assert (simulator.arrays, simulator.references_owed) == (0, 0)


@pytest.fixture
def lawless_simulator(simulated_libsystem: Path, tmp_path: Path) -> Simulator:
    """A fresh kernel whose rules the test means to break."""
    return Simulator(simulated_libsystem, tmp_path)


@pytest.fixture
def child() -> Iterator[ChildWorkload]:
    """A process that does as it is told."""
    workload = ChildWorkload()
    yield workload
    workload.close()


@pytest.fixture
def threads() -> Iterator[OwnWorkload]:
    """Threads of ours that do as they are told."""
    workload = OwnWorkload()
    yield workload
    workload.close()
