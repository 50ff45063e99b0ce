"""The whole service as on macOS: every route over the simulated libSystem, by HTTP."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.darwin.simulator import Simulator
from support.target import OwnWorkload
from support.workload import ChildWorkload, Workload
from vitalsd.contract.metrics import FullMetrics, Measured, parse_runtime_metrics
from vitalsd.http.app import create_app
from vitalsd.recording.replay import Replay
from vitalsd.recording.replay_file import RecordedRun, ReplayFile
from vitalsd.recording.run_reader import Run
from vitalsd.recording.series import Record
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources.darwin.processes import list_processes, open_process

Get = Callable[..., Awaitable[httpx.Response]]


def serve(simulator: Simulator, scenario: Callable[[Get], Awaitable[None]]) -> None:
    """Run a scenario against the service, with this process as its target, over the simulated kernel."""

    async def run() -> None:
        sampler = Sampler(lambda: open_process(lib=simulator.lib), platform="macos")
        targets = Targets(sampler, lambda pid: open_process(pid, lib=simulator.lib))
        app = create_app(targets, lambda: list_processes(simulator.lib))
        await targets.start()
        try:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:

                async def get(path: str, **parameters: Any) -> httpx.Response:
                    return await client.get(path, params=parameters)

                await scenario(get)
        finally:
            await targets.close()

    asyncio.run(run())


async def burn_inside(workload: Workload, tid: int, cpu_ns: int) -> int:
    """Burn when the window of a second that is being opened now has been open for a while, and stop before its end."""

    def burn() -> int:
        time.sleep(0.2)
        end, used_ns = time.monotonic() + 0.5, 0
        while used_ns < cpu_ns and time.monotonic() < end:
            used_ns += workload.burn(tid, min(5_000_000, cpu_ns - used_ns))
        return used_ns

    return await asyncio.get_running_loop().run_in_executor(None, burn)


def test_metrics_of_the_own_process_are_within_their_error(simulator: Simulator, threads: OwnWorkload) -> None:
    """``"platform":"macos"`` with true numbers: what a thread burnt in the window, to the error bar it comes with."""
    tid = threads.start_thread("render")

    async def scenario(get: Get) -> None:
        burning = asyncio.create_task(burn_inside(threads, tid, 100_000_000))
        answer = await get("/metrics", window_ms=1000, detail="full")
        used_ns = await burning
        assert answer.status_code == 200
        metrics = parse_runtime_metrics(answer.content)
        assert isinstance(metrics, FullMetrics)
        assert metrics.platform == "macos"
        assert metrics.target.pid == os.getpid()
        (thread,) = (thread for thread in metrics.threads if thread.tid == tid)
        assert thread.name == "render"
        assert thread.cpu_percent is not None
        assert thread.cpu_percent_error is not None
        true_percent = used_ns / metrics.window.measured_ms / 1e4
        assert true_percent - thread.cpu_percent_error - 0.5 <= thread.cpu_percent
        assert thread.cpu_percent <= true_percent + thread.cpu_percent_error + 2
        assert metrics.process.cpu_percent >= thread.cpu_percent - metrics.process.cpu_percent_error
        assert threading.get_native_id() in [thread.tid for thread in metrics.threads]
        assert None not in (metrics.process.footprint_kb, metrics.process.p_core_percent, metrics.process.energy_nj)
        assert metrics.process.swap_kb is None
        assert metrics.warnings == ()

    serve(simulator, scenario)


def test_metrics_of_another_process_end_with_410_or_404(simulator: Simulator, child: ChildWorkload) -> None:
    """``?pid=`` reads it through libproc; after its exit the answer is 410 or 404, with the reason."""
    tid = child.start_thread("decode")

    async def scenario(get: Get) -> None:
        burning = asyncio.create_task(burn_inside(child, tid, 100_000_000))
        answer = await get("/metrics", window_ms=1000, pid=child.pid)
        used_ns = await burning
        metrics = parse_runtime_metrics(answer.content)
        assert isinstance(metrics, Measured)
        assert not isinstance(metrics, FullMetrics)
        assert metrics.platform == "macos"
        (thread,) = (thread for thread in metrics.threads if thread.tid == tid)
        assert thread.name == "decode"
        # The counter of a running thread may lag by a scheduler's tick.
        assert thread.cpu_percent >= used_ns / metrics.sample_window_ms / 1e4 - 2
        listed = (await get("/processes")).text
        assert str(child.pid) in listed
        child.kill()
        answer = await get("/metrics", window_ms=10, pid=child.pid)
        assert answer.status_code == 410
        assert answer.json()["available"] is False
        child.reap()
        await asyncio.sleep(0.5)  # the service lets go of a target that is gone
        answer = await get("/metrics", window_ms=10, pid=child.pid)
        assert answer.status_code == 404

    serve(simulator, scenario)


@pytest.mark.parametrize(
    ("function", "flavor", "code", "reason"),
    [
        ("task_threads", -1, 6, "task_threads failed: (os/kern) resource shortage (0x6)"),
        ("task_info", 1, -1, "TASK_ABSOLUTETIME_INFO: task_info answered 7 words of 8"),
    ],
)
def test_metrics_of_a_failing_kernel_call_are_unavailable(
    simulator: Simulator, function: str, flavor: int, code: int, reason: str
) -> None:
    """The reason names the call and the code; no answer has zeros."""

    async def scenario(get: Get) -> None:
        simulator.fault(function, code, flavor=flavor)
        answer = await get("/metrics", window_ms=10)
        assert answer.status_code == 503
        assert (answer.json()["available"], answer.json()["platform"]) == (False, "macos")
        assert reason in answer.json()["reason"]
        assert (await get("/metrics", window_ms=10)).status_code == 200

    serve(simulator, scenario)


@pytest.mark.parametrize("path", ["/metrics?pid=2147483647", "/stream?pid=2147483647", "/history", "/metrics"])
def test_unavailable_names_the_platform_of_the_kernel_asked(simulator: Simulator, path: str) -> None:
    """If no source was open, the platform is still that of the simulated kernel, not of the machine."""

    async def scenario(get: Get) -> None:
        answer = await get(path.partition("?")[0], **dict(pair.split("=") for pair in path.split("?")[1:]))
        assert answer.status_code in (404, 503)
        assert (answer.json()["available"], answer.json()["platform"]) == (False, "macos")

    if "pid" not in path:
        simulator.fault("proc_pidinfo", errno.ENOMEM, every=1)
    serve(simulator, scenario)


def replay_file(record: Record) -> ReplayFile:
    run = Run("1-2-3", Path("run.sqlite"), record.identity, "crashed", None, None, None, len(record), False, 0)
    return ReplayFile("run.sqlite", RecordedRun(run, record), (), None, None)


def test_replay_names_the_platform_of_its_run(simulator: Simulator) -> None:
    """A run of a Mac that is looked at elsewhere is still one of a Mac."""
    source = open_process(lib=simulator.lib)
    record = Record(source.identity(), interval_ns=1_000_000_000)
    record.append(source.snapshot())

    async def run() -> None:
        targets = Targets(Replay(replay_file(record)), lambda pid: open_process(pid, lib=simulator.lib))
        transport = httpx.ASGITransport(create_app(targets, list))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.get("/metrics")
        assert (answer.status_code, answer.json()["platform"]) == (410, "macos")
        await targets.close()

    asyncio.run(run())
