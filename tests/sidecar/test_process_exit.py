"""Noticing a death: `vitalsd.sidecar.process_exit`."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from vitalsd.sidecar.process_exit import death_of
from vitalsd.sources.platform import process_identities
from vitalsd.sources.process_identity import IdentityUnknownError


@pytest.fixture
def target() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


async def latency_s(target: "subprocess.Popen[bytes]", *, poll: bool) -> float:
    start = process_identities().start_key(target.pid)
    assert start is not None
    watching = asyncio.create_task(death_of(target.pid, start, process_identities(), poll=poll))
    await asyncio.sleep(0.2)
    assert not watching.done()
    begun = time.monotonic()
    target.kill()
    await asyncio.wait_for(watching, 5)
    return time.monotonic() - begun


@pytest.mark.parametrize(("poll", "limit_s"), [(False, 0.3), (True, 1.5)])
def test_watch_of_a_process_that_exits_returns(target: "subprocess.Popen[bytes]", poll: bool, limit_s: float) -> None:
    """The kernel tells it at once; polling takes up to a second more."""
    assert asyncio.run(latency_s(target, poll=poll)) < limit_s


def test_watch_of_a_reused_pid_returns(target: "subprocess.Popen[bytes]") -> None:
    """The pid lives with another start time: the watched process has exited, and the watch returns."""
    asyncio.run(asyncio.wait_for(death_of(target.pid, 1, process_identities()), 1))
    asyncio.run(asyncio.wait_for(death_of(2**22 + 1, 1, process_identities()), 1))


def test_watch_cancelled_leaks_no_descriptor(target: "subprocess.Popen[bytes]") -> None:
    """A watch that is given up closes what it opened."""
    import os

    async def watch() -> None:
        start = process_identities().start_key(target.pid)
        assert start is not None
        before = len(os.listdir("/dev/fd"))
        watching = asyncio.create_task(death_of(target.pid, start, process_identities()))
        await asyncio.sleep(0.05)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert len(os.listdir("/dev/fd")) == before

    asyncio.run(watch())


def test_watch_of_an_undecided_process_continues() -> None:
    """As long as the kernel reports no exit, the watch continues."""

    class Silent:
        def host_scope(self) -> str:
            return ""

        def boot_id(self) -> str:
            return ""

        def booted_unix_ns(self) -> int:
            return 0

        def start_key(self, pid: int) -> int | None:
            raise IdentityUnknownError("hidden")

    async def watch() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(death_of(2**22 + 1, 1, Silent(), poll=True), 0.1)

    asyncio.run(watch())
