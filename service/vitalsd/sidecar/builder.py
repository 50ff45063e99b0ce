"""
Assemble a sidecar: listeners, recorder, sampler, application, service and background tasks; no other module does.

`build_in_process` is for a thread of the client, `build_service` and `build_replay` are for a process of its own. A
build that fails closes what it has opened.
"""

import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vitalsd.contract.signals import PostedSignals
from vitalsd.contract.signals_page import PageError, SignalsPage
from vitalsd.discovery import directories
from vitalsd.discovery.directories import EndpointError
from vitalsd.discovery.program_key import program_key
from vitalsd.discovery.runtime_file import ProcessRun, new_token
from vitalsd.http.app import create_app
from vitalsd.recording.recorder import RecorderConfig
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_directory_reader import RunDirectoryReader
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.sidecar.config import SETTINGS, SidecarConfig
from vitalsd.sidecar.lifetime import end_with, follow
from vitalsd.sidecar.listeners import Listeners, adopt, listen
from vitalsd.sidecar.service import GRACE_S, BackgroundTask, Service
from vitalsd.sidecar.socket_activation import Notifier, activated
from vitalsd.sidecar.target_process import TargetProcess
from vitalsd.snapshot import Identity
from vitalsd.sources.base import NoSuchProcessError, Source
from vitalsd.sources.names import PythonNames
from vitalsd.sources.platform import Platform, this_platform
from vitalsd.sources.programs import ProgramDigest, main_script
from vitalsd.worker_thread import Worker

if TYPE_CHECKING:  # Its models would be built in every sidecar before the first answer.
    from vitalsd.recording.replay import Replay

__all__ = ["BuildError", "InProcess", "build_in_process", "build_replay", "build_service"]

log = logging.getLogger("vitalsd")

IN_PROCESS_GRACE_S = 0.5
"""Windows under way when the client exits or stops the sidecar may take this long to finish, s."""


class BuildError(Exception):
    """The sidecar cannot be assembled as its settings say; ``str(error)`` is the reason."""


class InProcess(NamedTuple):
    """The parts of a sidecar in its client, for `vitalsd.sidecar.in_process.Sidecar`."""

    service: Service
    sampler: Sampler
    run_directory: RunDirectoryReader | None
    workers: Sequence[Worker]


def build_in_process(config: SidecarConfig) -> InProcess:
    """
    Assemble a sidecar that measures this process, of which it is a part.

    Raises:
        ListenError: the sidecar cannot listen where `config` says.
        RuntimeError: the system gives no more threads.
        OSError: the system refuses anything else.
        IdentityUnknownError: the kernel does not report which run of a process this is.
    """
    platform = this_platform()
    with ExitStack() as undo:
        base = _open(config, undo)
        me = ProcessRun(os.getpid(), platform.process_identities().start_key(os.getpid()) or 0)
        sampler = Sampler(_own_source, recording=_recording(config, base))
        undo.callback(sampler.worker.stop, 0)
        targets = Targets(sampler, platform.open_source)
        parts = _assemble(config, base, undo, platform, targets, watched=me, grace_s=IN_PROCESS_GRACE_S)
        undo.pop_all()
    return InProcess(parts.service, sampler, parts.run_directory, parts.workers)


def build_service(
    config: SidecarConfig,
    process: TargetProcess,
    watched: ProcessRun | None,
    environ: MutableMapping[str, str],
    *,
    exits_itself: Callable[[], bool] = bool,
) -> tuple[Service, Sequence[BackgroundTask]]:
    """
    Assemble a sidecar that measures `process`, for a process of its own.

    Args:
        config: the settings.
        process: the target.
        watched: the run of it, from `TargetProcess.check`.
        environ: what a supervisor hands over is taken out of it, and what would change a push.
        exits_itself: whether the target has noted that it exits by itself.

    Raises:
        ListenError: the sidecar cannot listen where `config` or the supervisor says.
        BuildError: a setting does nothing under a supervisor, or nothing can be pushed to `SidecarConfig.otlp`.
        NoThreadError: the system gives no more threads.
    """
    with ExitStack() as undo:
        base = _open(config, undo, environ)
        recording = _recording(config, base, exits_itself)

        def next_sampler() -> Sampler:
            return Sampler(process.open, recording=recording, platform=process.platform.name)

        sampler = next_sampler()
        undo.callback(sampler.worker.stop, 0)
        targets = Targets(sampler, process.platform.open_source, name=config.name)
        parts = _assemble(config, base, undo, process.platform, targets, watched=watched)
        background_tasks = _background_tasks(config, process, watched, targets, next_sampler, undo)
        background_tasks.append(Notifier(environ, _responds(targets)).run)
        if config.otlp is not None:
            background_tasks.append(_push(config, config.otlp, targets, environ))
        undo.pop_all()
    return parts.service, background_tasks


def build_replay(config: SidecarConfig, replay: "Replay", environ: MutableMapping[str, str]) -> Service:
    """
    Assemble a sidecar that shows a file, without a runtime file and without the runs of this machine.

    Args:
        config: the settings.
        replay: the file.
        environ: what a supervisor hands over is taken out of it.

    Raises:
        ListenError: the sidecar cannot listen where `config` or the supervisor says.
        BuildError: a setting does nothing under a supervisor.
        NoThreadError: the system gives no more threads.
    """

    def no_process(pid: int) -> Source:
        raise NoSuchProcessError(f"this is a replay of {replay.file.name}; it has no process {pid}")

    platform = this_platform()._replace(list_processes=list, hides_processes=lambda: False)
    with ExitStack() as undo:
        base = _open(config, undo, environ, published=False)
        parts = _assemble(config, base, undo, platform, Targets(replay, no_process))
        undo.pop_all()
    return parts.service


@dataclass(frozen=True, slots=True)
class _Base:
    """Hold what is opened first: the listeners of the sidecar and the directories that it uses."""

    listeners: Listeners
    directory: Path | None
    """Directory of runtime files; ``None``: there is none, or none is wanted."""
    runs: RunDirectory | None
    token: str | None
    page: SignalsPage | None
    """Where clients signal heartbeats and gauges; ``None``: the system gives no shared memory, or it is a replay."""


def _open(
    config: SidecarConfig,
    undo: ExitStack,
    environ: MutableMapping[str, str] | None = None,
    *,
    published: bool = True,
) -> _Base:
    """Open listeners and directories; see `build_service`. Without `environ`, take no listeners of a supervisor."""
    notes: list[str] = []
    directory = _runtime_directory(notes) if published else None
    inherited = None if environ is None else _inherited(config, environ)
    listeners = inherited or listen(
        host=config.host,
        port=config.port,
        tcp=config.tcp,
        uds=config.uds,
        directory=directory,
        guarded=config.needs_token,
        allow_remote=config.allow_remote,
    )
    undo.callback(listeners.close)
    listeners.notes[:0] = notes
    runs = _run_directory(listeners.notes) if published else None
    page = _signals_page(listeners.notes) if published else None
    if page is not None:
        undo.callback(page.close)
    return _Base(listeners, directory, runs, new_token() if config.needs_token else None, page)


def _inherited(config: SidecarConfig, environ: MutableMapping[str, str]) -> Listeners | None:
    """Return the listeners that a supervisor handed over; ``None`` without one."""
    sockets = activated(environ)
    if not sockets:
        return None
    for name in ("port", "uds", "tcp"):
        setting = SETTINGS[name]
        if getattr(config, name) != setting.default:
            for each in sockets:
                each.close()
            raise BuildError(f"{setting.flag} does nothing where a supervisor hands the sockets over; leave it out")
    return adopt(sockets, guarded=config.needs_token, allow_remote=config.allow_remote)


def _runtime_directory(notes: list[str]) -> Path | None:
    """Return the directory of runtime files; ``None``, and a note, if there can be none."""
    try:
        return directories.runtime_directory()
    except EndpointError as error:
        notes.append(f"no Unix socket and no runtime file: {error}")
        return None


def _run_directory(notes: list[str]) -> RunDirectory | None:
    """Return the directory of runs; ``None``, and a note, if there can be none."""
    try:
        return RunDirectory(directories.state_directory() / "runs")
    except EndpointError as error:
        notes.append(f"no black box, and no earlier runs: {error}")
        return None


def _signals_page(notes: list[str]) -> SignalsPage | None:
    """Return the page for heartbeats and gauges; ``None``, and a note, if there can be none."""
    try:
        return SignalsPage()
    except PageError as error:
        notes.append(str(error))
        return None


def _recording(config: SidecarConfig, base: _Base, exits_itself: Callable[[], bool] = bool) -> RecorderConfig:
    return RecorderConfig(
        config.record_interval_s,
        config.retention_s,
        runs=base.runs if config.black_box else None,
        application=config.application,
        children=config.children,
        exits_itself=exits_itself,
        page=base.page,
    )


def _own_source() -> Source:
    return PythonNames(this_platform().open_source(program_of=ProgramDigest(program_key(), main_script())))


class _Parts(NamedTuple):
    service: Service
    run_directory: RunDirectoryReader | None
    workers: Sequence[Worker]


def _assemble(
    config: SidecarConfig,
    base: _Base,
    undo: ExitStack,
    platform: Platform,
    targets: Targets,
    *,
    watched: ProcessRun | None = None,
    grace_s: float = GRACE_S,
) -> _Parts:
    """Make the application over `targets`, and the service that listens for it."""
    run_directory = None if base.runs is None else RunDirectoryReader(base.runs)
    if run_directory is not None:
        undo.callback(run_directory.worker.stop, 0)
    app = create_app(
        targets,
        platform.list_processes,
        run_directory=run_directory,
        thread_metrics=config.thread_series,
        application=config.application,
        posted=None if base.page is None else PostedSignals(base.page),
        hides_processes=platform.hides_processes,
    )
    workers: Sequence[Worker] = app.state.workers
    for worker in workers:
        undo.callback(worker.stop, 0)
    service = Service(
        app,
        base.listeners,
        directory=base.directory,
        target=watched,
        token=base.token,
        grace_s=grace_s,
        kernel=platform.process_identities(),
        application=config.application,
        page=base.page,
    )
    return _Parts(service, run_directory, workers)


def _background_tasks(
    config: SidecarConfig,
    process: TargetProcess,
    watched: ProcessRun | None,
    targets: Targets,
    next_sampler: Callable[[], Sampler],
    undo: ExitStack,
) -> list[BackgroundTask]:
    """Return what handles the end of the target: with a name it goes to the next process, with a pid it ends."""
    kernel = process.platform.process_identities()
    poll = config.proc_root != SETTINGS["proc_root"].default  # its pids are not of this pid namespace
    if config.name is not None:
        finder = Worker("vitalsd-finder")
        undo.callback(finder.stop, 0)

        async def has_successor(now: Identity) -> bool:
            return await process.has_successor(now, finder)

        return [follow(targets, next_sampler, has_successor, kernel, poll=poll)]
    if config.pid is not None and watched is not None:
        linger_s = 0.0 if config.exit_with_target else config.linger_s
        return [end_with(watched, targets, kernel, linger_s=linger_s, poll=poll)]
    return []


def _responds(targets: Targets) -> Callable[[], Awaitable[None]]:
    """Return a function that waits until the sampler of the default target has done the calls before."""

    async def responds() -> None:
        if isinstance(targets.default, Sampler):
            await targets.default.worker.run_unbounded(lambda: None)

    return responds


def _push(config: SidecarConfig, url: str, targets: Targets, environ: MutableMapping[str, str]) -> BackgroundTask:
    """Return what pushes to the Collector at `url`. Raise `BuildError`."""
    from vitalsd.exporters.otlp import NotInstalledError, Push, endpoint_of, isolate

    ignored = isolate(environ)
    try:
        push = Push(targets, endpoint_of(url), interval_s=config.otlp_interval_s, threads=config.thread_series)
    except (ValueError, NotInstalledError) as error:
        raise BuildError(str(error)) from None
    if ignored:
        log.warning("options alone say what is sent and where; ignored: %s", ", ".join(ignored))
    log.info("pushing to %s every %g s", push.url, config.otlp_interval_s)
    return push.run
