"""
Decide which crashed run belongs to a report.

A run with an application id belongs to reports with this id and to no other. Without ids the program decides, see
`vitalsd.sources.programs`. In doubt the run is left out, and `Choice.reason` has the reason and the name of the run.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitalsd.contract.report_archive import PREVIOUS_RUN, Failure, previous_run
from vitalsd.recording.history import history
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_files import has_run_name
from vitalsd.recording.run_reader import UNKNOWN_END, Run, UnreadableRunError, read_run
from vitalsd.recording.series import Record
from vitalsd.sources.platform import process_identities
from vitalsd.sources.process_identity import IdentityUnknownError, ProcessIdentityReader
from vitalsd.sources.programs import may_be_versions

__all__ = ["TOP_THREADS", "Choice", "Found", "Listing", "ReportSubject", "choose", "find", "is_alive", "member"]

TOP_THREADS = 50
"""Number of threads of a run that a report shows, the busiest."""
SETTLE_S = 0.5
"""A sidecar has this long to record the exit of its target, s: it takes milliseconds, more on a busy machine."""
NAMED_RUNS = 5
"""Limit of the runs that a sentence names."""

Listing = Mapping[str, Any]
"""A run as ``GET /runs`` lists it."""


class ReportSubject(NamedTuple):
    """Describe the process of a report."""

    app: str | None = None
    """The application id that the report was given."""
    start_id: str | None = None
    """`Identity.start_id` of the process that runs now; ``None``: nothing is running."""
    name: str = ""
    """Name of the process in the kernel, or the name for which the sidecar waits; empty: any."""
    program: str = ""
    target_app: str | None = None
    """The application id with which the sidecar of that process was started."""

    @classmethod
    def of(cls, app: str | None, target: Mapping[str, Any], target_app: str | None) -> "ReportSubject":
        """Return the subject for a target as ``GET /info`` shows it. Raise `KeyError`: it is `Unavailable`."""
        return cls(app, str(target["start_id"]), str(target["name"]), str(target.get("program", "")), target_app)


class Choice(NamedTuple):
    """Hold the run that belongs to a report, if any."""

    run: Listing | None = None
    left_out: Sequence[Listing] = ()
    """Crashed runs that no report contains yet and that may belong to this one."""
    reason: str | None = None
    """Why the runs in doubt were left out, and what to do."""


def choose(listings: Sequence[Listing], subject: ReportSubject, alive: Callable[[Listing], bool]) -> Choice:
    """
    Return the newest crashed run of `subject` that no report contains yet.

    Args:
        listings: runs in any order.
        subject: what the report is about.
        alive: returns whether the process of a run still lives; such a run has not crashed, its recording ended before.
    """
    crashed = [
        run
        for run in sorted(listings, key=lambda run: str(run.get("recorded_to") or ""), reverse=True)
        if run["state"] == "crashed" and not run["reported"]
        if subject.start_id is None or not f"{run['id']}-".startswith(f"{subject.start_id}-")
        if not alive(run) and not _ended_well(run, listings)
    ]
    wanted = subject.app or subject.target_app
    if wanted is not None:
        for run in crashed:
            if run.get("app") == wanted:
                return Choice(run)
    anonymous = [run for run in crashed if run.get("app") is None]
    if subject.start_id is None:
        if subject.name:
            anonymous = [run for run in anonymous if subject.name.startswith(str(run.get("name")))]
        if subject.target_app is not None:
            return Choice(left_out=anonymous, reason=_doubt(anonymous, "while the sidecar has one"))
        programs = {run.get("program") for run in anonymous}
        if len(programs) == 1 and "" not in programs:
            return Choice(anonymous[0])
        return Choice(left_out=anonymous, reason=_several(anonymous))
    same = [run for run in anonymous if subject.program and run.get("program") == subject.program]
    if same and (wanted is None or not _shared(subject.program, wanted, listings)):
        return Choice(same[0])
    doubtful = [run for run in anonymous if _may_belong(run, subject)]
    if same:
        why = "and another application has run the same program"
    elif not subject.program or any(not run.get("program") for run in doubtful):
        why = "and what the processes run is not known"
    else:
        why = "from another program file or with other arguments"
    return Choice(left_out=doubtful, reason=_doubt(doubtful, why))


def _ended_well(run: Listing, listings: Sequence[Listing]) -> bool:
    """Return whether another sidecar recorded a normal end of the process, and `run` has no end."""
    if run.get("ended") not in (None, UNKNOWN_END):
        return False
    process = run["id"].split("-")[:3]
    return any(
        each["state"] == "clean"
        and each["id"].split("-")[:3] == process
        and str(each.get("recorded_to") or "") >= str(run.get("recorded_to") or "")
        for each in listings
    )


def _shared(program: str, app: str, listings: Sequence[Listing]) -> bool:
    """Return whether a program has run under another application id than `app`."""
    return any(run.get("program") == program and run.get("app") not in (None, app) for run in listings)


def _may_belong(run: Listing, subject: ReportSubject) -> bool:
    """Return whether a run without an id may be of the subject: another version of its program, or an unknown one."""
    program = str(run.get("program") or "")
    if not program or not subject.program:
        return run.get("name") == subject.name
    return may_be_versions(program, subject.program)


def is_alive(kernel: ProcessIdentityReader | None = None) -> Callable[[Listing], bool]:
    """Return a function, for `choose`, that returns whether the process of a run lives on this machine."""
    kernel = kernel or process_identities()
    boot = kernel.boot_id()[:8]

    def alive(run: Listing) -> bool:
        try:
            pid = int(run["pid"])
            start = kernel.start_key(pid)
        except (IdentityUnknownError, KeyError, TypeError, ValueError, OSError):
            return False
        return start is not None and f"{run['id']}-".startswith(f"{pid}-{start}-{boot}-")

    return alive


class Found(NamedTuple):
    """Hold the run for a report, read from disk, or the reason for none."""

    run: Run | None = None
    record: Record | None = None
    choice: Choice = Choice()
    failure: Failure | None = None


def find(
    directory: RunDirectory,
    subject: ReportSubject,
    run_id: str | None,
    *,
    read: bool = True,
    kernel: ProcessIdentityReader | None = None,
) -> Found:
    """
    Find and read the run that belongs to a report; never raises for what is on disk.

    Args:
        directory: the runs of this user.
        subject: what the report is about.
        run_id: id of the run to take, whatever `choose` would return; ``None``: as `choose` returns.
        read: whether to read `Found.record`, which takes longer than the choice.
        kernel: reports which processes live.
    """
    choice = Choice()
    try:
        if run_id is not None:
            run = directory.find(run_id)
            if run is None:
                return Found(
                    failure=Failure(PREVIOUS_RUN, f"no run has the id {run_id!r:.80}; `vitalsd runs` lists them")
                )
        else:
            alive = is_alive(kernel)
            found, unreadable = _settled(directory, alive)
            runs = {run.id: run for run in found}
            choice = choose([run.to_json() for run in runs.values()], subject, alive)
            if choice.run is None:
                reason = choice.reason or _unread(unreadable)
                failure = None if reason is None else Failure(PREVIOUS_RUN, reason)
                return Found(choice=choice, failure=failure)
            run = runs[choice.run["id"]]
        return Found(run, read_run(run.path)[1] if read else None, choice)
    except UnreadableRunError as error:
        return Found(choice=choice, failure=Failure(PREVIOUS_RUN, f"the file of the run cannot be read: {error}"))
    except OSError as error:
        reason = f"the file of the run cannot be read: {error.strerror or type(error).__name__}"
        return Found(choice=choice, failure=Failure(PREVIOUS_RUN, reason))


def _settled(directory: RunDirectory, alive: Callable[[Listing], bool]) -> tuple[list[Run], Collection[str]]:
    """
    Return the runs, and the names of those that cannot be read.

    If the process of a run has just ended, wait until its sidecar has written how it ended.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        runs, unreadable, _ = directory.scan()
        dying = any(run.state == "running" and not alive(run.to_json()) for run in runs)
        if not dying or time.monotonic() >= deadline:
            return runs, [name for name in unreadable if has_run_name(Path(name))]
        time.sleep(0.05)


def _unread(files: Collection[str]) -> str | None:
    if not files:
        return None
    which = "the file of an earlier run" if len(files) == 1 else f"the files of {len(files)} earlier runs"
    return f"{which} cannot be read; `vitalsd runs` names the reason"


def member(run: Run, record: Record) -> bytes:
    """Return the content of ``previous-run.json``."""
    return previous_run(run.to_json(), history(record, top=TOP_THREADS).to_json())


def _doubt(runs: Sequence[Listing], why: str) -> str | None:
    if not runs:
        return None
    which = "a crashed run" if len(runs) == 1 else f"{len(runs)} crashed runs"
    reason = f"recorded without an application id, {why}"
    return f"{which} may be of this application but was left out: {reason}; {_remedy(runs)}"


def _several(runs: Sequence[Listing]) -> str | None:
    if not runs:
        return None
    which = "1 crashed run has" if len(runs) == 1 else f"{len(runs)} crashed runs have"
    return f"{which} no application id and may be of different programs, so none was included; {_remedy(runs)}"


def _remedy(runs: Sequence[Listing]) -> str:
    ids = ", ".join(str(run["id"]) for run in runs[:NAMED_RUNS])
    more = f" and {len(runs) - NAMED_RUNS} more, see `vitalsd runs`" if len(runs) > NAMED_RUNS else ""
    return f"to include one: vitalsd report --run ID, with the ID {ids}{more}"
