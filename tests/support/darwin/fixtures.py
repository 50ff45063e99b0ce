"""Provide fixtures over the simulated libSystem."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.darwin.simulator import Simulator, build
from support.target import OwnWorkload
from support.workload import ChildWorkload


@pytest.fixture(scope="session")
def simulated_libsystem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the library, built once per run."""
    return build(tmp_path_factory.mktemp("libsystem"))


@pytest.fixture
def simulator(simulated_libsystem: Path, tmp_path: Path) -> Iterator[Simulator]:
    """Yield a new kernel; check after the test that no reference is leaked and no rule is broken."""
    simulator = Simulator(simulated_libsystem, tmp_path)
    yield simulator
    assert simulator.violations == []
    assert (simulator.arrays, simulator.references_owed) == (0, 0)


@pytest.fixture
def lawless_simulator(simulated_libsystem: Path, tmp_path: Path) -> Simulator:
    """Return a new kernel for a test that breaks its rules."""
    return Simulator(simulated_libsystem, tmp_path)


@pytest.fixture
def child() -> Iterator[ChildWorkload]:
    """Yield a child process with threads on command."""
    workload = ChildWorkload()
    yield workload
    workload.close()


@pytest.fixture
def threads() -> Iterator[OwnWorkload]:
    """Yield threads on command of this process."""
    workload = OwnWorkload()
    yield workload
    workload.close()
