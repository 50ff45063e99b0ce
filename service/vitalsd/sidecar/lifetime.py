"""Handle the end of the target: end the sidecar too, or continue with the next process of the same name."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vitalsd.discovery.runtime_file import ProcessRun
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import PooledTarget, Targets
from vitalsd.sidecar.process_exit import death_of
from vitalsd.sidecar.service import BackgroundTask, Service
from vitalsd.snapshot import Identity
from vitalsd.sources.base import SourceError
from vitalsd.sources.process_identity import ProcessIdentityReader
from vitalsd.worker_thread import NoThreadError

__all__ = ["end_with", "follow"]

RENAMED_S = 5.0
"""Interval of the checks whether a target that executed another program has been replaced by another process, s."""
SEARCH_S = 1.0
"""Interval of the searches for a target that has not started yet, s."""


def end_with(
    target: ProcessRun, targets: Targets, kernel: ProcessIdentityReader, *, linger_s: float, poll: bool = False
) -> BackgroundTask:
    """
    Record the exit of the target at once, and end the sidecar `linger_s` seconds later.

    Args:
        target: the process.
        targets: the pool; its default target measures that process.
        kernel: reports whether the process lives.
        linger_s: clients can request the last minutes of the target for so long.
        poll: see `death_of`.
    """

    async def background_task(sidecar: Service) -> None:
        await death_of(target.pid, target.start, kernel, poll=poll)
        with suppress(
            SourceError
        ):  # TargetGoneError, which the recorder notes: a client that starts again requests it now
            await targets.default.check_alive()
        await asyncio.sleep(linger_s)
        sidecar.stop()

    return background_task


def follow(
    targets: Targets,
    next_run: Callable[[], Sampler],
    has_successor: Callable[[Identity], Awaitable[bool]],
    kernel: ProcessIdentityReader,
    *,
    poll: bool = False,
) -> BackgroundTask:
    """
    Keep the default target on the newest process of one name, through its restarts.

    A process that executes another program stays the target until there is another process of the name.

    Args:
        targets: the pool; its default target is a sampler from `next_run`.
        next_run: makes a sampler that looks for the process when it opens, and raises as long as there is none. Each
            sampler measures and records one run.
        has_successor: returns whether the measured process has lost the name and `next_run` would open another one.
        kernel: reports whether a process lives.
        poll: see `death_of`.
    """

    async def background_task(sidecar: Service) -> None:
        while True:
            try:
                found = await targets.default.identity()
            except (SourceError, NoThreadError):
                await asyncio.sleep(SEARCH_S)
                continue
            sidecar.set_target(ProcessRun(found.pid, found.start_key))
            dead = asyncio.create_task(death_of(found.pid, found.start_key, kernel, poll=poll))
            replaced = asyncio.create_task(_replaced(targets.default, has_successor))
            try:
                (over, *_), _ = await asyncio.wait((dead, replaced), return_when=asyncio.FIRST_COMPLETED)
                over.result()
            finally:
                dead.cancel()
                replaced.cancel()
            targets.set_default(await _made(next_run))
            sidecar.set_target(None)

    return background_task


async def _made(next_run: Callable[[], Sampler]) -> Sampler:
    """Return what `next_run` makes, as soon as the system gives the thread that it needs."""
    while True:
        try:
            return next_run()
        except NoThreadError:
            await asyncio.sleep(SEARCH_S)


async def _replaced(target: PooledTarget, has_successor: Callable[[Identity], Awaitable[bool]]) -> None:
    """Return once another process has the name of `target`."""
    while True:
        await asyncio.sleep(RENAMED_S)
        with suppress(SourceError):
            if await has_successor(await target.identity()):
                return
