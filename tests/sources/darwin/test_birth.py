"""Which run of a process a pid names, on macOS: `vitalsd.sources.darwin.process_identity` over the simulated kernel."""

import errno
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from support.darwin.simulator import Simulator
from vitalsd.discovery.runtime_file import liveness
from vitalsd.sidecar.listeners import Listeners
from vitalsd.sidecar.service import Service
from vitalsd.sources.darwin.process_identity import DarwinProcessIdentityReader
from vitalsd.sources.darwin.processes import open_process
from vitalsd.sources.process_identity import ANY_MACHINE, UNKNOWN_BOOT, IdentityUnknownError


def test_process_identity_equals_that_of_the_source(simulator: Simulator) -> None:
    """A runtime file and a Source name one run of a process by the same numbers."""
    kernel = DarwinProcessIdentityReader(simulator.lib)
    with closing(open_process(lib=simulator.lib)) as source:
        identity = source.identity()
    assert (kernel.boot_id(), kernel.start_key(os.getpid())) == (identity.boot_id, identity.start_key)


def test_process_identity_of_no_process_or_a_zombie_is_none(simulator: Simulator) -> None:
    """An unused pid and a zombie have no start; after a reuse of the pid the start differs."""
    kernel = DarwinProcessIdentityReader(simulator.lib)
    assert kernel.start_key(2**22 + 1) is None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        start = kernel.start_key(child.pid)
        simulator.reuse_pid(child.pid)
        assert None is not start != kernel.start_key(child.pid) is not None
    finally:
        child.kill()
        child.wait()
    assert kernel.start_key(child.pid) is None


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL])
def test_process_identity_of_a_refused_process_is_undecided(simulator: Simulator, code: int) -> None:
    """Another user's process, or an error of the kernel, is undecided and not dead."""
    simulator.fault("proc_pidinfo", code)
    with pytest.raises(IdentityUnknownError):
        DarwinProcessIdentityReader(simulator.lib).start_key(os.getpid())


def test_process_identity_without_boot_or_machine_id_is_unknown(simulator: Simulator) -> None:
    """Without a boot id the boot is not known; without a host UUID this machine is not known among others."""
    kernel = DarwinProcessIdentityReader(simulator.lib)
    known = kernel.host_scope()
    assert not known.startswith(ANY_MACHINE)
    simulator.fault("sysctlbyname", errno.ENOENT)
    simulator.fault("gethostuuid", errno.EWOULDBLOCK)
    assert kernel.boot_id() == UNKNOWN_BOOT
    assert kernel.host_scope().startswith(ANY_MACHINE)
    simulator.clear_faults()
    assert kernel.host_scope() == known


def test_service_without_a_boot_id_starts_and_is_found(simulator: Simulator) -> None:
    """A sandbox may hide kern.bootsessionuuid; the start time in microseconds says which run has the pid."""

    async def app(*_: object) -> None: ...

    kernel = DarwinProcessIdentityReader(simulator.lib)
    simulator.fault("sysctlbyname", errno.EPERM, every=1)
    endpoint = Service(app, Listeners(), kernel=kernel).endpoint
    assert endpoint.boot_id == "unknown"
    simulator.clear_faults()
    assert liveness(endpoint, kernel) == "alive"
    assert liveness(replace(endpoint, start=endpoint.start + 1), kernel) == "unknown"  # It may be of another boot.
