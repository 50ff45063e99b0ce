"""What a sidecar does when its target ends: end with it, or go on with the next process of the same name."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vitalsd.discovery.runtime_file import ProcessRun
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import PooledTarget, Targets
from vitalsd.sidecar.process_exit import death_of
from vitalsd.sidecar.service import Companion, Service
from vitalsd.snapshot import Identity
from vitalsd.sources.base import SourceError
from vitalsd.sources.process_identity import Births
from vitalsd.worker_thread import NoThreadError

__all__ = ["end_with", "follow"]

RENAMED_S = 5.0
"""Between two looks whether a target that executed another program has made way for another process."""
SEARCH_S = 1.0
"""Between two looks for a target that has not started yet."""


def end_with(target: ProcessRun, targets: Targets, kernel: Births, *, linger_s: float, poll: bool = False) -> Companion:
    """
    Record the exit of the target at once, and end the sidecar `linger_s` seconds later.

    Args:
        target: the process.
        targets: the default one measures it.
        kernel: determines whether it lives.
        linger_s: until then the last minutes of the target can still be asked for.
        poll: see `death_of`.
    """

    async def companion(sidecar: Service) -> None:
        await death_of(target.pid, target.start, kernel, poll=poll)
        with suppress(
            SourceError
        ):  # TargetGoneError, which the recorder notes: a client that starts again asks for it now
            await targets.default.confirm()
        await asyncio.sleep(linger_s)
        sidecar.stop()

    return companion


def follow(
    targets: Targets,
    next_run: Callable[[], Sampler],
    has_successor: Callable[[Identity], Awaitable[bool]],
    kernel: Births,
    *,
    poll: bool = False,
) -> Companion:
    """
    Keep the default target on the newest process of one name, through its restarts.

    One that executes another program stays the target until there is another process of the name.

    Args:
        targets: the default one is a sampler from `next_run`.
        next_run: a sampler that, when it opens, looks for the process, and raises as long as there
            is none. Each one measures and records one run.
        has_successor: whether what is measured is not called so any more, and `next_run` would open another process.
        kernel: determines whether it lives.
        poll: see `death_of`.
    """

    async def companion(sidecar: Service) -> None:
        while True:
            try:
                found = await targets.default.identity()
            except (SourceError, NoThreadError):
                await asyncio.sleep(SEARCH_S)
                continue
            sidecar.retarget(ProcessRun(found.pid, found.start_key))
            dead = asyncio.create_task(death_of(found.pid, found.start_key, kernel, poll=poll))
            replaced = asyncio.create_task(_replaced(targets.default, has_successor))
            try:
                (over, *_), _ = await asyncio.wait((dead, replaced), return_when=asyncio.FIRST_COMPLETED)
                over.result()
            finally:
                dead.cancel()
                replaced.cancel()
            targets.retarget(await _made(next_run))
            sidecar.retarget(None)

    return companion


async def _made(next_run: Callable[[], Sampler]) -> Sampler:
    """Return what `next_run` makes, as soon as the system gives the thread that it needs."""
    while True:
        try:
            return next_run()
        except NoThreadError:
            await asyncio.sleep(SEARCH_S)


async def _replaced(target: PooledTarget, has_successor: Callable[[Identity], Awaitable[bool]]) -> None:
    """Return once `target` has made way for another process."""
    while True:
        await asyncio.sleep(RENAMED_S)
        with suppress(SourceError):
            if await has_successor(await target.identity()):
                return
