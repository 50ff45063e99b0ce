"""``vitalsd doctor``: all passes where all is well, on Linux and as on macOS; where not, the right line fails."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import as_platform
from support.darwin.simulator import Simulator
from support.sidecars import VITALSD, environment, eventually, listing
from vitalsd.doctor import cpu_checks, machine_checks, process_checks
from vitalsd.doctor.cpu_load import CpuLoadProcess, bounds_ns
from vitalsd.doctor.finding import Finding
from vitalsd.doctor.soak import SEGMENTS, slope, soak
from vitalsd.sources.base import Source
from vitalsd.sources.darwin.libsystem import load
from vitalsd.sources.platform import Platform, over_libsystem, this_platform
from vitalsd.sources.programs import ProgramOf, no_program

pytestmark = pytest.mark.live

Program = tuple[str, ...]

HERE: Program = VITALSD
SIMULATED = ["simulated"] if sys.platform == "linux" else []
MACOS_ALONE = {f"{what}.{kind}" for what in ("left", "soak") for kind in ("ports", "references")}


def lines(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in report["findings"]}


def verdicts(report: dict[str, Any], verdict: str) -> set[str]:
    return {check for check, finding in lines(report).items() if finding["verdict"] == verdict}


def start(program: Program, *arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, "doctor", *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# Where all is well


@pytest.fixture(scope="module")
def healthy(request: pytest.FixtureRequest, module_path: Path) -> dict[str, tuple[int, str, str, list[str]]]:
    """Status, output, errors and what is left on disk of one run on each platform, run side by side."""
    programs = {"native": HERE}
    if SIMULATED:
        programs["simulated"] = as_platform.program(request.getfixturevalue("simulated_libsystem"))
    directories = {name: module_path / name for name in programs}
    running = {
        name: start(program, "--json", "--soak", "1", env=environment(directories[name]))
        for name, program in programs.items()
    }
    found = {}
    for name, doctor in running.items():
        out, errors = doctor.communicate(timeout=100)
        found[name] = doctor.returncode, out, errors, listing(directories[name])
    return found


@pytest.mark.parametrize("where", ["native", *SIMULATED])
def test_doctor_on_a_sound_system_passes_and_leaves_nothing(
    where: str, healthy: dict[str, tuple[int, str, str, list[str]]]
) -> None:
    """Each of its lines says what should be and what is; the status is 0; not a directory is left."""
    status, out, errors, left = healthy[where]
    report = json.loads(out)
    assert verdicts(report, "fail") == set(), [lines(report)[check] for check in verdicts(report, "fail")]
    assert (status, errors, left) == (0, "", [])
    assert report["healthy"] is True
    linux = where == "native" and sys.platform == "linux"
    assert report["platform"] == ("linux" if linux else "macos")
    assert verdicts(report, "not here") == (MACOS_ALONE if linux else set())
    for finding in report["findings"]:
        assert finding["what"]
        assert finding["measured"]
        assert finding["next_step"] is None
    assert lines(report).keys() >= {
        "platform", "permission", "descriptors", "directory.runtime", "directory.state",
        *(f"cpu.{place}.{duty}" for place in ("own", "other") for duty in (0, 5, 30, 100, "total")),
        "ticks.own", "ticks.other", "rss.own", "rss.other", "uptime.age", "uptime.advance",
        "threads.known", "threads.births", "books.exited", "books.balance",
        "left.descriptors", "left.threads", "service.start", "http.tcp", "http.unix", "discovery", "socket.modes",
        "cost.cpu", "cost.rss", "cost.wakeups", "trailing", "blackbox", "end",
        "soak.descriptors", "soak.threads", "soak.rss",
    }  # fmt: skip


# Defects


def platform_of(where: str, simulator: Callable[[], Simulator]) -> Platform:
    return this_platform() if where == "native" else over_libsystem(simulator().lib)


@pytest.fixture(params=["native", *SIMULATED])
def platform(request: pytest.FixtureRequest) -> Platform:
    """The running kernel, and the simulated one."""
    return platform_of(request.param, lambda: request.getfixturevalue("simulator"))


def readings(platform: Platform, burn_s: float = 0.3) -> dict[str, Finding]:
    """All lines about readings, without a sidecar."""
    checks: tuple[Iterator[Finding], ...] = (
        machine_checks.source(platform),
        machine_checks.permission(platform),
        cpu_checks.own_process(platform, burn_s),
        cpu_checks.another_process(platform, burn_s),
        process_checks.memory(platform),
        process_checks.age(platform),
        process_checks.threads(platform),
        process_checks.check_leaks(platform, 0.5),
    )
    return {finding.check: finding for check in checks for finding in check}


def failures(findings: dict[str, Finding]) -> set[str]:
    return {check for check, finding in findings.items() if finding.verdict == "fail"}


CONTRADICTED = {f"cpu.{place}.{duty}" for place in ("own", "other") for duty in (5, 30, 100)}
"""A thread with more CPU time than its process has no figure."""


@pytest.mark.parametrize(
    ("defect", "must_fail", "may_fail"),
    [
        (
            "ticks",
            {"cpu.own.total", "cpu.other.total"},
            {"ticks.own", "ticks.other", "books.exited", "books.balance"} | CONTRADICTED,
        ),
        ("terminated", {"cpu.own.total", "cpu.other.total"}, {"books.exited", "books.balance"} | CONTRADICTED),
        ("rss", {"rss.own", "rss.other"}, set()),
        ("thread", {"cpu.own.30", "cpu.other.30", "threads.known", "threads.births"}, {"books.balance"} | CONTRADICTED),
        ("descriptor", {"left.descriptors"}, set()),
    ],
)
def test_doctor_with_a_planted_defect_fails_only_its_line(
    platform: Platform, defect: str, must_fail: set[str], may_fail: set[str]
) -> None:
    """The line has the next step. If threads get little CPU, a longer reading shows the defect."""
    before = set(os.listdir("/dev/fd"))
    try:
        for burn_s in (0.3, 1.0, 3.0):
            findings = readings(as_platform.planted(platform, defect), burn_s)
            if must_fail <= failures(findings) <= must_fail | may_fail:
                break
    finally:
        for fd in set(os.listdir("/dev/fd")) - before:
            if defect == "descriptor":
                try:
                    os.close(int(fd))
                except OSError:
                    continue
    failed = failures(findings)
    assert must_fail <= failed <= must_fail | may_fail, {check: findings[check] for check in failed ^ must_fail}
    assert all(findings[check].next_step for check in failed)


def test_thread_count_below_the_limit_is_no_failure() -> None:
    """The limit is the count before; the line of a thread that ended meanwhile does not contradict itself."""
    counted = threading.Event()
    passing = threading.Thread(target=counted.wait)
    passing.start()
    before = threading.active_count()
    here = this_platform()

    def holdings() -> Mapping[str, int]:
        counted.set()
        return here.holdings()

    findings = {finding.check: finding for finding in process_checks.check_leaks(here._replace(holdings=holdings), 0.5)}
    passing.join()
    found = findings["left.threads"]
    assert (found.verdict, found.expected) == ("pass", f"at most {before}, as before")
    assert int(found.measured) < before


@pytest.mark.skipif(not SIMULATED, reason="the leak is planted in the simulated kernel's library")
def test_doctor_with_a_leaked_port_fails_the_port_line(lawless_simulator: Simulator) -> None:
    """A release that is forgotten now and then shows in the ports or the references on them, and in nothing else."""
    platform = over_libsystem(as_platform.leaking(lawless_simulator.lib))
    failed = failures({finding.check: finding for finding in process_checks.check_leaks(platform, 0.5)})
    assert failed
    assert failed <= {"left.ports", "left.references"}


@pytest.mark.skipif(not SIMULATED, reason="the leak is planted in the simulated kernel's library")
def test_soak_with_a_leaked_port_has_a_slope_above_0(simulated_libsystem: Path, tmp_path: Path) -> None:
    """Its slope is above 0 with certainty."""
    platform = over_libsystem(as_platform.leaking(Simulator(simulated_libsystem, tmp_path).lib))
    findings = {finding.check: finding for finding in soak(platform, 2, lambda done: None)}
    failed = failures(findings)
    assert failed
    assert failed <= {"soak.ports", "soak.references"}
    assert findings["soak.descriptors"].verdict == "pass"


@pytest.mark.skipif(not SIMULATED, reason="ticks are simulated")
def test_doctor_with_a_wrong_tick_frequency_passes_with_a_warning(simulator: Simulator) -> None:
    """An emulated sysctl is found out by the source itself; the doctor passes, and says so."""
    while time.process_time() < 0.1:
        pass  # the source compares only what is worth comparing
    simulator.state_tick_frequency(1_000_000_000)
    findings = {finding.check: finding for finding in cpu_checks.own_process(over_libsystem(simulator.lib), 0.3)}
    assert failures(findings) == set()
    assert "hw.tbfrequency says" in findings["ticks.own"].measured


@pytest.mark.torture
@pytest.mark.timeout(200)
def test_soak_of_a_minute_finds_no_leak(platform: Platform) -> None:
    """Tens of thousands of snapshots under churn leave nothing behind, with certainty."""
    findings = {finding.check: finding for finding in soak(platform, 60, lambda done: None)}
    assert failures(findings) == set(), findings


# What it judges by


def test_cpu_load_bounds_contain_the_thread_clock() -> None:
    """The CPU clock of a thread, asked at any instant, lies between the two."""
    with CpuLoadProcess((30, 100)) as load:
        instant = time.monotonic_ns()
        first = load.logs()
        second = load.logs()
    for name in load.tids:
        low, high = bounds_ns(second[name], instant, instant)
        assert 0 <= low <= high <= second[name][-1][1]
        assert bounds_ns(first[name], instant, instant)[0] == low
        assert first[name][-1][0] > instant


def test_slope_of_a_known_line_is_within_its_margin() -> None:
    """The line has known noise; too few points are refused."""
    points = [(float(x), 3.0 * x + (-1) ** x) for x in range(SEGMENTS)]
    found = slope(points)
    assert abs(found.per_unit - 3.0) <= found.margin
    assert 0 < found.margin < 0.2
    assert slope([(float(x), 7.0) for x in range(SEGMENTS)]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="20 points"):
        slope(points[1:])


def test_doctor_check_that_raises_is_a_failed_line() -> None:
    """A source that raises what it may not is a finding; the rest is examined all the same."""
    from vitalsd.doctor.runner import examine

    def broken(pid: int | None = None, *, program_of: ProgramOf = no_program) -> Source:
        raise ZeroDivisionError("planted")

    here = this_platform()
    findings = {}
    spoilt = Platform(
        here.name, broken, here.list_processes, here.process_identities, here.holdings, command=("/nonexistent",)
    )
    for finding in examine(spoilt):
        findings[finding.check] = finding
    assert "planted" in findings["broken.memory"].measured
    assert findings["descriptors"].verdict == "pass"
    assert "/nonexistent" in findings["service.start"].measured


def test_doctor_removes_directories_of_killed_doctors_only(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of doctors that are dead go at the next start; those of others stay, however they are named."""
    from vitalsd.doctor.runner import MARKER, examine

    with subprocess.Popen(["true"]) as gone:
        pass
    for name in ("run", "state"):
        monkeypatch.setenv(f"VITALSD_{'RUNTIME' if name == 'run' else 'STATE'}_DIR", str(short_path / name))
        for inside in (f"doctor-{gone.pid}/x", f"doctor-{os.getppid()}/x", "doctors"):
            (short_path / name / inside).mkdir(parents=True)
        (short_path / name / f"doctor-{gone.pid}" / MARKER).touch()
        (short_path / name / "doctor-999999999" / "patients").mkdir(parents=True)
        (short_path / name).chmod(0o700)
    findings = examine(this_platform())
    next(findings)
    during = [listing(short_path / name) for name in ("run", "state")]
    findings.close()
    stay = ["doctors", f"doctor-{os.getppid()}", "doctor-999999999"]
    assert during == [sorted([*stay, f"doctor-{os.getpid()}"])] * 2
    assert listing(short_path / "run") == listing(short_path / "state") == sorted(stay)


# Where it is not as it should be


@pytest.fixture(scope="module")
def troubled(module_path: Path) -> Iterator[dict[str, tuple[Path, subprocess.Popen[str]]]]:
    """Doctors in trouble and their directories, side by side: for most of the time they wait."""
    places = {name: module_path / name for name in ("homeless", "poor", "SIGINT", "SIGTERM")}
    places["homeless"].mkdir()
    (places["homeless"] / "file").touch()
    nowhere = environment(places["homeless"] / "file") | {"TMPDIR": str(places["homeless"]), "FORCE_COLOR": ""}
    few = ("sh", "-c", 'ulimit -n 13 && exec "$@"', "sh", *HERE)
    doctors = {
        "homeless": start(HERE, env=nowhere),
        "poor": start(few, "--json", env=environment(places["poor"])),
        **{
            name: start(HERE, env=environment(places[name]) | {"VITALSD_TEST_MARK": str(places[name])})
            for name in ("SIGINT", "SIGTERM")
        },
    }
    yield {name: (places[name], doctor) for name, doctor in doctors.items()}
    for doctor in doctors.values():
        doctor.kill()
        doctor.communicate()


Troubled = dict[str, tuple[Path, subprocess.Popen[str]]]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_doctor_interrupted_leaves_no_process_or_file(troubled: Troubled, name: str) -> None:
    """No process and no file stays; the exit status states the signal."""
    place, doctor = troubled[name]
    assert doctor.stdout is not None
    said = ""
    # At this line the sidecar and its target run.
    while "GET /metrics" not in said:
        said = doctor.stdout.readline()
        assert said
    doctor.send_signal(signal.Signals[name])
    _, errors = doctor.communicate(timeout=30)
    assert doctor.returncode == 128 + signal.Signals[name]
    assert "Traceback" not in errors
    assert listing(place) == []
    if sys.platform == "linux":
        eventually(lambda: not marked(str(place)))


def test_doctor_with_few_descriptors_says_so_without_a_traceback(troubled: Troubled) -> None:
    """The line about them says so and what to do; what needs more of them fails without a traceback."""
    place, doctor = troubled["poor"]
    out, errors = doctor.communicate(timeout=100)
    report = json.loads(out)
    assert (doctor.returncode, errors) == (1, "")
    assert "descriptors" in verdicts(report, "fail")
    assert "ulimit -n" in lines(report)["descriptors"]["next_step"]
    assert listing(place) == []


def test_doctor_without_a_writable_directory_fails_two_lines(troubled: Troubled) -> None:
    """Two lines fail, for people to read: no colour in a pipe, and the next step below. All others pass."""
    place, doctor = troubled["homeless"]
    out, errors = doctor.communicate(timeout=100)
    assert (doctor.returncode, errors) == (1, "")
    assert "\x1b" not in out
    assert re.search(r"^pass +thread at 30 %, in process +[0-9.]+ % ± [0-9.]+ ", out, re.MULTILINE)
    for words in ("runtime files .*\n +name .* VITALSD_RUNTIME_DIR", "black box .*\n +name .* VITALSD_STATE_DIR"):
        assert re.search(rf"^fail +directory of {words}$", out, re.MULTILINE), out
    assert re.search(r"\n\n[0-9]+ passed, 2 failed, [0-9]+ not here\n$", out), out
    assert listing(place) == ["file"]


def marked(mark: str) -> list[str]:
    """Processes that inherited the mark."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(name)
        except OSError:
            continue
    return found


def test_doctor_without_a_library_uses_that_of_the_system() -> None:
    """Ports are counted on a Mac and nothing is made up elsewhere."""
    assert set(this_platform().holdings()) == ({"ports", "references"} if sys.platform == "darwin" else set())
    if sys.platform == "darwin":
        assert over_libsystem(load()).holdings()["ports"] > 0
