"""Open the macOS source that reads a process, and list the processes that this user may sample."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from vitalsd.sources.base import ProcessEntry, Source
from vitalsd.sources.darwin.apple_headers import MACH_PORT_DEAD, MACH_PORT_NULL, SZOMB, proc_taskallinfo
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.darwin.libsystem import LibSystem, load
from vitalsd.sources.darwin.mach_source import MachSource
from vitalsd.sources.darwin.task import process_name, process_names, start_key, tick_frequency, translated_errors
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["holdings", "list_processes", "open_process"]


def open_process(
    pid: int | None = None,
    *,
    lib: LibSystem | None = None,
    wall_clock: Callable[[], int] = time.time_ns,
    program_of: ProgramOf = no_program,
) -> Source:
    """
    Open the source of a process: over Mach for this process, over libproc for another.

    Args:
        pid: target; ``None``: this process.
        lib: libSystem; default: that of the system is loaded.
        wall_clock: returns the Unix time, ns.
        program_of: makes `Identity.program` from the command of the process.

    Raises:
        SourceError: `NoSuchProcessError`, `AccessDeniedError`, `TargetGoneError` (a zombie), `UnsupportedError` or
            `KernelError`.
    """
    if pid is None or pid == os.getpid():
        return MachSource(lib=lib, wall_clock=wall_clock, program_of=program_of)
    return LibprocSource(pid, lib=lib, wall_clock=wall_clock, program_of=program_of)


def list_processes(lib: LibSystem | None = None) -> Iterator[ProcessEntry]:
    """
    Yield the processes that this user may sample, by ascending pid; skip those that cannot be read or have exited.

    Raises:
        SourceError: `UnsupportedError` or `KernelError`.
    """
    lib = lib or load()
    info = proc_taskallinfo()
    with translated_errors(os.getpid()):
        lib.proc.info(os.getpid(), info)
        frequency, _ = tick_frequency(lib, info)
        pids = lib.proc.pids()
    for pid in pids:
        try:
            lib.proc.info(pid, info)
        except (OSError, MachError):
            continue
        if info.pbsd.pbi_status == SZOMB:
            continue
        yield ProcessEntry(
            pid=pid,
            name=process_name(info.pbsd),
            names=process_names(info.pbsd),
            started_unix_ns=start_key(info.pbsd) * 1000,
            cpu_ns=(info.ptinfo.pti_total_user + info.ptinfo.pti_total_system) * 1_000_000_000 // frequency,
            rss_bytes=info.ptinfo.pti_resident_size,
            thread_count=info.ptinfo.pti_threadnum,
            uids=frozenset((info.pbsd.pbi_uid, info.pbsd.pbi_ruid, info.pbsd.pbi_svuid)),
            parent=info.pbsd.pbi_ppid,
        )


def holdings(lib: LibSystem | None = None) -> dict[str, int]:
    """
    Count the port names that this process holds, and the references on the host port and those of its living threads.

    All references on a port have one name, so the number of names does not show a leak of references.
    """
    lib = lib or load()
    references = 0
    with suppress(MachError):
        references = lib.statistics.references()
    with lib.mach.thread_ports() as ports:
        for port in ports:
            if port not in (MACH_PORT_NULL, MACH_PORT_DEAD):
                with suppress(MachError):  # it has just ended
                    references += lib.mach.send_references(port)
    return {"ports": lib.mach.ports_in_use(), "references": references}
