"""The background agent: `vitalsd.agent`, its templates, and ``vitalsd agent``."""

import os
import plistlib
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support.host_programs import bare_environment, site_packages_without
from support.paths import ROOT
from support.sidecars import VITALSD
from support.supervisors import FakeSupervisor
from support.tools import program
from vitalsd.agent import supervisor
from vitalsd.agent.base import AgentError, Plan, Status
from vitalsd.agent.launchd import LABEL, Launchd
from vitalsd.agent.systemd import Systemd
from vitalsd.cli import main

UID = 501


@pytest.fixture
def fake(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSupervisor:
    directory = short_path / "bin"
    directory.mkdir()
    fake = FakeSupervisor(directory)
    monkeypatch.setenv("PATH", fake.path)
    return fake


def a_plan(home: Path, **changes: Any) -> Plan:
    return Plan(**({"home": home, "runtime": home / "run", "state": home / "state"} | changes))


def launchd(home: Path, **changes: Any) -> Launchd:
    return Launchd(a_plan(home, **changes), sleep=lambda _: None, uid=UID)


def verbs(fake: FakeSupervisor) -> list[str]:
    return [call[0] for call in fake.calls() if call[0] not in ("print", "show")]


# The property list


def test_property_list_has_the_expected_keys(short_path: Path) -> None:
    """Absolute program, sockets on loopback and of mode 0600 on demand, umask, timeouts, logs; nothing at login."""
    [(path, content)] = launchd(short_path).files().items()
    job = plistlib.loads(content)
    assert path == short_path / "Library/LaunchAgents/org.vitalsd.agent.plist"
    assert path.stem == job["Label"] == LABEL
    assert job["ProgramArguments"] == [sys.executable, "-P", "-m", "vitalsd", "serve"]
    assert job["Sockets"] == {
        "http": [
            {"SockFamily": family, "SockNodeName": address, "SockServiceName": "9779", "SockType": "stream"}
            for family, address in (("IPv4", "127.0.0.1"), ("IPv6", "::1"))
        ],
        "unix": {
            "SockPathMode": 0o600,
            "SockPathName": str(short_path / "run" / "agent.sock"),
            "SockType": "stream",
        },
    }
    assert (job["Umask"], job["ExitTimeOut"], job["ThrottleInterval"]) == (0o077, 10, 10)
    assert job["ProcessType"] != "Background"
    assert job["StandardErrorPath"] == str(short_path / "Library/Logs/vitalsd/agent.log")
    assert not {"KeepAlive", "RunAtLoad", "EnvironmentVariables"} & set(job)


def test_property_list_with_a_name_runs_at_login(short_path: Path) -> None:
    """A recorder that follows a process must run before the first request; unusual names and paths survive."""
    name = "a <b> & \"c\" 'd' é $HOME %n"
    changes = {"name": name, "port": 1234, "environment": {"VITALSD_STATE_DIR": "/s & t"}}
    [content] = launchd(short_path / "a & b", **changes).files().values()
    job = plistlib.loads(content)
    assert job["ProgramArguments"][-2:] == ["--name", name]
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert [each["SockServiceName"] for each in job["Sockets"]["http"]] == ["1234", "1234"]
    assert job["EnvironmentVariables"] == {"VITALSD_STATE_DIR": "/s & t"}


def test_property_list_reads_the_same_with_libplist(short_path: Path) -> None:
    """Libplist reads the template and the installed file to the same content as Python."""
    template = ROOT / "launchd" / f"{LABEL}.plist"
    [rendered] = launchd(short_path, name="<&>").files().values()
    for content in (template.read_bytes(), rendered):
        command = [program("plistutil", package="libplist-utils"), "-i", "-", "-f", "bin"]
        binary = subprocess.run(command, input=content, capture_output=True, check=True).stdout
        assert plistlib.loads(binary) == plistlib.loads(content)


# The program


@pytest.mark.parametrize("kind", ["launchd", "systemd"])
def test_agent_of_a_vendored_copy_starts(kind: str, short_path: Path) -> None:
    """Its file has the path on which vitalsd was found: with that alone the program in it runs."""
    base = str(getattr(sys, "_base_executable", sys.executable))
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment with a base interpreter that has no vitalsd")
    copy = short_path / 'a $b %n "c"'
    copy.mkdir()
    for package in ("service/vitalsd", "clients/vitalsd_client", "systemd", "launchd"):
        shutil.copytree(ROOT / package, copy / Path(package).name)
        if package.endswith("d") and "/" not in package:
            shutil.move(copy / package, copy / "vitalsd" / package)
    packages = site_packages_without(short_path / "packages", "vitalsd")
    env = bare_environment(short_path) | {"PYTHONPATH": f"{copy}:{packages}"}
    command = [base, "-P", "-m", "vitalsd", "agent", "print", "--supervisor", kind]
    printed = subprocess.run(command, env=env, cwd=short_path, capture_output=True, timeout=60)
    assert printed.returncode == 0, printed.stderr
    if kind == "launchd":
        job = plistlib.loads(printed.stdout.strip())
        run, variables = job["ProgramArguments"], job["EnvironmentVariables"]
    else:
        lines = printed.stdout.decode().replace("%%", "%").splitlines()
        [line] = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
        run = shlex.split(line.replace("$$", "$"))
        assigned = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
        variables = dict(shlex.split(each)[0].split("=", 1) for each in assigned)
    assert run[-1] == "serve"
    login = bare_environment(short_path) | variables
    ran = subprocess.run([*run[:-1], "--version"], env=login, cwd="/", capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "vitalsd" in ran.stdout


@pytest.mark.parametrize("kind", ["launchd", "systemd"])
@pytest.mark.parametrize("wrong", ["missing", "plain", "directory", "bare-name-of-nothing"])
def test_agent_with_an_unrunnable_program_is_refused_with_the_remedy(
    kind: str, wrong: str, short_path: Path, fake: FakeSupervisor
) -> None:
    """Status 1 and one sentence, and nothing is written: the supervisor would say it in its log alone."""
    (short_path / "plain").touch(0o644)
    (short_path / "directory").mkdir()
    executable = wrong if wrong.startswith("bare") else str(short_path / wrong)
    code = f"import sys; sys.executable = {executable!r}; from vitalsd.cli import main; main(prog_name='vitalsd')"
    env = os.environ | {"HOME": str(short_path), "VITALSD_RUNTIME_DIR": str(short_path / "run")}
    command = [sys.executable, "-c", code, "agent", "install", "--supervisor", kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        f"vitalsd: {executable} is not a program that can be run, so the agent would not start: run"
        " `/path/to/python -m vitalsd agent install` with a Python in which vitalsd is installed\n"
    )
    assert not list(short_path.rglob("*.plist"))
    assert not list(short_path.rglob("vitalsd.service"))


def test_agent_with_a_bare_program_name_is_found_by_path(short_path: Path, fake: FakeSupervisor) -> None:
    """It has the absolute path, and not one in the working directory."""
    [content] = launchd(short_path, program=("launchctl", "vitalsd")).files().values()
    assert plistlib.loads(content)["ProgramArguments"] == [shutil.which("launchctl"), "vitalsd", "serve"]


# launchctl


def test_launchd_install_bootstraps_and_uninstall_removes(short_path: Path, fake: FakeSupervisor) -> None:
    """The first install writes the file and bootstraps it into the user's session; uninstall undoes both."""
    agent = launchd(short_path)
    agent.install()
    [path] = agent.files()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert (short_path / "Library/Logs/vitalsd").is_dir()
    assert [call for call in fake.calls() if call[0] != "print"] == [
        ["enable", f"gui/{UID}/{LABEL}"],
        ["bootstrap", f"gui/{UID}", str(path)],
    ]
    assert agent.status() == Status(installed=True, loaded=True, pid=None)
    fake.set(running=True)
    assert agent.status().pid == 4242
    assert agent.uninstall()
    assert not path.exists()
    assert agent.status() == Status(installed=False, loaded=False, pid=None)
    assert not agent.uninstall()


def test_launchd_install_unchanged_restarts_the_agent(short_path: Path, fake: FakeSupervisor) -> None:
    """The same property list needs no new bootstrap: kickstart -k takes up new code."""
    launchd(short_path).install()
    fake.calls()
    launchd(short_path).install()
    assert verbs(fake) == ["kickstart"]


def test_launchd_install_changed_waits_for_the_old_job(short_path: Path, fake: FakeSupervisor) -> None:
    """Bootout returns early: bootstrap is not tried before print fails, because it would fail with 5."""
    launchd(short_path).install()
    fake.set(drains=4)
    fake.calls()
    launchd(short_path, port=1234).install()
    calls = fake.calls()
    verbs = [call[0] for call in calls]
    assert verbs.count("bootstrap") == 1
    assert verbs[verbs.index("bootout") : verbs.index("enable")] == ["bootout", *["print"] * 5]
    assert fake.loaded


def test_launchd_bootstrap_that_fails_with_5_or_37_is_retried(short_path: Path, fake: FakeSupervisor) -> None:
    """5 and 37 may pass; three of them do not fail an install."""
    fake.set(fail={"bootstrap": [5, 37, 5]})
    launchd(short_path).install()
    assert verbs(fake) == ["enable", *["bootstrap"] * 4]
    assert fake.loaded


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        ({"bootstrap": [5] * 99}, "the property list is invalid"),
        ({"bootstrap": [37] * 99}, "still busy"),
        ({"bootstrap": [125]}, "no session that launchd could run it in"),
        ({"bootstrap": [112]}, "no session"),
        ({"bootstrap": [134]}, "this kind of session"),
        ({"bootstrap": [77]}, "whatever launchd calls it"),
        ({"enable": [125]}, r"launchctl enable: 125"),
    ],
)
def test_launchctl_error_code_is_explained_with_its_number(
    short_path: Path, fake: FakeSupervisor, fail: dict[str, list[int]], sentence: str
) -> None:
    """The error explains the number that launchctl returned, and has the number."""
    fake.set(fail=fail)
    with pytest.raises(AgentError, match=sentence):
        launchd(short_path).install()


def test_launchd_job_that_does_not_end_is_reported_in_time(short_path: Path, fake: FakeSupervisor) -> None:
    """The wait for a job that drains without end has a limit."""
    launchd(short_path).install()
    fake.set(drains=1000)
    with pytest.raises(AgentError, match="has not ended"):
        launchd(short_path, port=1234).install()
    fake.set(draining=0, loaded=True, fail={"bootout": [1]})
    with pytest.raises(AgentError, match="launchctl bootout: 1"):
        launchd(short_path).uninstall()


def test_launchd_install_over_ssh_uses_the_user_domain(short_path: Path, fake: FakeSupervisor) -> None:
    """Over SSH there is no gui/ domain, and user/ takes a job for Background sessions alone."""
    fake.set(domains=["user"])
    launchd(short_path).install()
    assert ["bootstrap", f"user/{UID}"] == fake.calls()[-1][:2]
    assert fake.loaded
    (path,) = launchd(short_path).files()
    assert plistlib.loads(path.read_bytes())["LimitLoadToSessionType"] == "Background"


def test_launchd_install_in_a_gui_session_replaces_the_agent_of_ssh(short_path: Path, fake: FakeSupervisor) -> None:
    """The agent is found in the other domain: there are never two of them on one port."""
    fake.set(domains=["user"])
    launchd(short_path).install()
    fake.set(domains=["gui", "user"])
    assert launchd(short_path).status().loaded
    launchd(short_path).install()
    assert ["bootout", f"user/{UID}/{LABEL}"] in fake.calls()
    (path,) = launchd(short_path).files()
    assert "LimitLoadToSessionType" not in plistlib.loads(path.read_bytes())
    assert launchd(short_path).status().loaded
    assert launchd(short_path).uninstall()
    assert not fake.loaded


def test_launchd_uninstall_waits_for_a_slow_job(short_path: Path, fake: FakeSupervisor) -> None:
    """Bootout answers 36 (EINPROGRESS) and carries on."""
    launchd(short_path).install()
    fake.set(drains=3)
    assert launchd(short_path).uninstall()
    assert not launchd(short_path).status().loaded


def test_launchd_install_without_launchctl_is_an_agent_error(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another system the program is missing, and the error says so."""
    monkeypatch.setenv("PATH", str(short_path))
    with pytest.raises(AgentError, match="there is no launchctl on this system"):
        supervisor("launchd", a_plan(short_path)).status()
    with pytest.raises(AgentError, match="there is no systemctl on this system"):
        supervisor("systemd", a_plan(short_path)).status()


def test_install_with_a_file_that_cannot_be_written_is_an_agent_error(short_path: Path, fake: FakeSupervisor) -> None:
    """A file in the place of the directory is the user's, and stays."""
    (short_path / ".config").touch()
    with pytest.raises(AgentError, match="cannot write"):
        Systemd(a_plan(short_path)).install()
    (short_path / "Library").touch()
    with pytest.raises(AgentError, match="vitalsd: Not a directory"):
        launchd(short_path).install()


def test_uninstall_with_a_file_that_cannot_be_removed_is_an_agent_error(short_path: Path, fake: FakeSupervisor) -> None:
    """A directory in the place of a file is named, and stays."""
    units = short_path / ".config/systemd/user"
    for path in (*launchd(short_path).files(), units / "vitalsd.service"):
        path.mkdir(parents=True)
    with pytest.raises(AgentError, match="plist: "):
        launchd(short_path).uninstall()
    with pytest.raises(AgentError, match="service: "):
        Systemd(a_plan(short_path)).uninstall()


def test_supervisor_without_permission_to_run_is_an_agent_error(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A systemctl without the permission to run it is one that says nothing."""
    (short_path / "systemctl").touch(0o600)
    monkeypatch.setenv("PATH", str(short_path))
    with pytest.raises(AgentError, match="systemctl: Permission denied"):
        Systemd(a_plan(short_path)).status()


# systemd

AWKWARD = "a b%n $HOME \"c\" 'd' \\ é"


def unit(files: dict[Path, bytes], suffix: str) -> str:
    return next(content.decode() for path, content in files.items() if path.suffix == suffix)


def test_systemd_units_escape_special_characters(short_path: Path) -> None:
    """Percent, dollar, quote and backslash reach the sidecar as they are."""
    service = unit(Systemd(a_plan(short_path, name=AWKWARD)).files(), ".service")
    assert r'"--name" "a b%%n $$HOME \"c\" ' + r"'d' \\ é" in service
    with pytest.raises(AgentError, match="cannot hold"):
        Systemd(a_plan(short_path, name="a\nExecStartPre=/bin/rm")).files()


def test_systemd_unit_allows_netlink_in_the_clients_namespace(short_path: Path) -> None:
    """It may open a netlink socket, in the network namespace of its clients."""
    service = unit(Systemd(a_plan(short_path)).files(), ".service")
    assert "AF_NETLINK" in service.partition("\nRestrictAddressFamilies=")[2].splitlines()[0].split()
    assert "\nPrivateNetwork=" not in service


def test_agent_options_reach_the_sidecar(short_path: Path) -> None:
    """Options of serve are in both supervisors' files; the service may reach this machine and no other."""
    plan: dict[str, Any] = {"name": "x", "options": ("--otlp", "http://127.0.0.1:4318", "--log-format", "json")}
    service = unit(Systemd(a_plan(short_path, **plan)).files(), ".service")
    assert '"--otlp" "http://127.0.0.1:4318" "--log-format" "json"' in service
    assert "IPAddressDeny=any" in service
    (job,) = (plistlib.loads(content) for content in launchd(short_path, **plan).files().values())
    assert job["ProgramArguments"][-4:] == list(plan["options"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--otpl"], "--otpl"),
        (["--record-interval", "soon"], "soon"),
        (["--port", "1"], "--port is for the supervisor"),
        (["--pid", "1"], "--pid is for the supervisor"),
        (["--help"], "options of `vitalsd serve` alone"),
        (["surplus"], "surplus"),
        (["--record-interval", "0.001"], "--record-interval is 0 or at least 0.01 seconds"),
        (["--linger", "5"], "--linger does nothing without --pid"),
        (["--otlp", "foo"], "'foo' is not the URL of a Collector"),
    ],
)
def test_install_with_invalid_serve_options_is_refused(options: list[str], said: str, short_path: Path) -> None:
    """The install command reports an error in them, because the user may not see the log of the agent."""
    env = {"HOME": str(short_path), "VITALSD_RUNTIME_DIR": str(short_path), "VITALSD_STATE_DIR": str(short_path)}
    out = CliRunner().invoke(main, ["agent", "print", "--supervisor", "systemd", "--", *options], env=env)
    assert out.exit_code == 2
    assert said in out.stderr.splitlines()[-1]


def test_templates_after_install_have_no_placeholder(short_path: Path) -> None:
    """Every @...@ of the templates is filled."""
    for content in [*Systemd(a_plan(short_path)).files().values(), *launchd(short_path).files().values()]:
        assert b"@" not in content.replace(b"@system-service", b"").replace(b"~@privileged", b"")


def test_systemd_install_enables_and_uninstall_disables_the_units(short_path: Path, fake: FakeSupervisor) -> None:
    """Install enables the socket alone, with a name the service too; uninstall removes both."""
    agent = Systemd(a_plan(short_path))
    agent.install()
    assert fake.calls() == [
        ["show", "--property=Version"],
        ["daemon-reload"],
        ["stop", "vitalsd.socket", "vitalsd.service"],
        ["enable", "--now", "vitalsd.socket"],
    ]
    assert agent.status() == Status(installed=True, loaded=True, pid=None)
    agent.install()
    assert verbs(fake) == ["daemon-reload", "enable", "try-restart"]
    Systemd(a_plan(short_path, name="ryll")).install()
    assert agent.status().pid == 4242
    assert fake.calls()[-2] == ["enable", "--now", "vitalsd.socket", "vitalsd.service"]
    assert agent.uninstall()
    assert not agent.uninstall()
    assert agent.status() == Status(installed=False, loaded=False, pid=None)
    assert list((short_path / ".config/systemd/user").iterdir()) == []


def test_systemd_install_refused_or_unavailable_is_an_agent_error(short_path: Path, fake: FakeSupervisor) -> None:
    """The error has the first line of a refusal; without a user's systemd it names the remedy."""
    fake.set(fail={"enable": [1]})
    with pytest.raises(AgentError, match="systemctl enable: Failed to enable: recorded"):
        Systemd(a_plan(short_path)).install()
    fake.set(bus=False)
    with pytest.raises(AgentError, match="for this user here"):  # the user may have no name
        Systemd(a_plan(short_path)).status()
    units = short_path / ".config/systemd/user"
    assert len(list(units.iterdir())) == 2
    with pytest.raises(AgentError, match="lingering"):
        Systemd(a_plan(short_path)).uninstall()
    assert list(units.iterdir()) == []
    with pytest.raises(AgentError, match="lingering"):
        Systemd(a_plan(short_path)).install()
    assert list(units.iterdir()) == []


def test_systemd_units_pass_systemd_analyze(short_path: Path) -> None:
    """systemd-analyze finds nothing to say about them, with awkward names too, and their exposure is low."""
    analyze = program("systemd-analyze", package="systemd")
    for name in (None, AWKWARD):
        for path, content in Systemd(a_plan(short_path, name=name)).files().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        paths = [str(path) for path in Systemd(a_plan(short_path)).files()]
        command = [analyze, "--user", "--man=no", "--recursive-errors=no", "verify", *paths]
        env = os.environ | {"XDG_RUNTIME_DIR": str(short_path)}
        verified = subprocess.run(command, capture_output=True, text=True, env=env)
        assert (verified.returncode, verified.stderr) == (0, "")
    service = next(path for path in paths if path.endswith(".service"))
    command = [analyze, "--offline=true", "--threshold=26", "security", service]
    secure = subprocess.run(command, capture_output=True, text=True, env=env | {"SYSTEMD_COLORS": "0"})
    assert secure.returncode == 0, secure.stdout


# The command line


@pytest.mark.parametrize("kind", ["launchd", "systemd"])
def test_agent_commands_exit_as_documented(kind: str, short_path: Path, fake: FakeSupervisor) -> None:
    """install, status, print and uninstall do what they say and exit as documented."""
    env = os.environ | {
        "HOME": str(short_path),
        "VITALSD_RUNTIME_DIR": str(short_path / "run"),
        "VITALSD_STATE_DIR": str(short_path / "state"),
    }

    def agent(*arguments: str) -> tuple[int, str]:
        command = [*VITALSD, "agent", arguments[0], "--supervisor", kind, *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    assert agent("status") == (1, "not installed\n")
    status, said = agent("install", "--port", "1234")
    assert status == 0
    assert said.endswith("try: curl -s http://127.0.0.1:1234/info\n")
    written = [Path(line.removeprefix("installed ")) for line in said.splitlines()[:-1]]
    assert all(path.is_relative_to(short_path) and path.exists() for path in written)
    assert agent("status") == (0, "waiting for the first connection\n")
    assert all(path.read_text() in agent("print", "--port", "1234")[1] for path in written)
    assert agent("uninstall") == (0, "removed\n")
    assert agent("uninstall") == (0, "it was not installed\n")
    fake.set(fail={"bootstrap": [125], "enable": [1]})
    status, said = agent("install")
    assert (status, said.count("\n")) == (1, 1)
