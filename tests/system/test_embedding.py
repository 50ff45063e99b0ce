"""Every program in docs/embedding.md, run as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import tools
from support.paths import ROOT
from support.sidecars import ask, environment, eventually, listing
from vitalsd.discovery.runtime_file import discover
from vitalsd.sidecar.spawn import spawn

pytestmark = pytest.mark.live

TEXT = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = {re.match(r"\W+([\w.]+)", body)[1]: body for body in BLOCKS}  # type: ignore[index]


@pytest.fixture
def env(short_path: Path) -> dict[str, str]:
    """Directories of their own, and the vitalsd of this Python on PATH."""
    return environment(short_path) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(program: list[str], env: dict[str, str], directory: Path) -> str:
    done = subprocess.run(program, env=env, cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(name: str, env: dict[str, str], directory: Path) -> str:
    return run([sys.executable, "-W", "error::ResourceWarning", "-c", FILES[name]], env, directory)


def end_sidecars(directory: Path) -> int:
    """End those that outlive their program; how many there were."""
    found = discover(directories=[directory / "run"])
    for endpoint in found:
        os.kill(endpoint.pid, 15)
    eventually(lambda: listing(directory / "run") == [])
    return len(found)


def test_embedding_page_has_a_test_for_each_program() -> None:
    """No program on the page is without a test."""
    assert sorted(FILES) == [
        "alongside.c",
        "alongside.py",
        "alongside.sh",
        "can_do_without.py",
        "forking.py",
        "in_process.py",
        "signals.py",
    ]
    assert len(BLOCKS) == len(FILES)


def test_in_process_program_serves_and_leaves_nothing(env: dict[str, str], short_path: Path) -> None:
    """It serves, takes a mark, and leaves nothing at its end."""
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+ /\S+\.sock\n", python("in_process.py", env, short_path))
    assert listing(short_path / "run") == []


def test_forking_program_serves_parent_and_child(env: dict[str, str], short_path: Path) -> None:
    """A child has no sidecar and may start its own; the parent's continues, and ends with the parent."""
    assert "still served on http://" in python("forking.py", env, short_path)
    assert listing(short_path / "run") == []


def test_alongside_program_is_measured_and_its_sidecar_lingers(env: dict[str, str], short_path: Path) -> None:
    """It is found, measures its program, and is still there afterwards."""
    assert re.fullmatch(r"[0-9.]+ \[.+\]\n", python("alongside.py", env, short_path))
    assert end_sidecars(short_path) == 1


def test_can_do_without_program_prints_the_reason(env: dict[str, str], short_path: Path) -> None:
    """One sentence says why there is none, and what asks gets that answer too."""
    why, answer = python("can_do_without.py", env, short_path).splitlines()
    assert why == "no metrics: cannot run /nonexistent/vitalsd: No such file or directory"
    assert "available=False reason='no sidecar to ask: " in answer


def test_signals_program_has_its_hang_and_its_gauge(env: dict[str, str], short_path: Path) -> None:
    """One hang of about the time that the program sleeps, and the value at each second."""
    hang, gauge = python("signals.py", env, short_path).splitlines()
    found = re.fullmatch(r"ui was silent for ([0-9]+) ms: [a-z_]+ .*", hang)
    assert found is not None
    assert int(found[1]) >= 1500
    assert re.fullmatch(r"fps \[(None, )*58\.0(, 58\.0)*\]", gauge)


def test_c_program_reads_the_ready_line_and_its_sidecar_ends(env: dict[str, str], short_path: Path) -> None:
    """It reads the line, and its sidecar ends with it."""
    program = short_path / "alongside"
    source = program.with_suffix(".c")
    source.write_text(FILES["alongside.c"], encoding="utf-8")
    run(
        [tools.program("cc", package="gcc"), "-Wall", "-Wextra", "-Werror", str(source), "-o", str(program)],
        env,
        short_path,
    )
    ready = json.loads(run([str(program)], env, short_path))
    assert sorted(ready) == ["notes", "pid", "runtime_file", "signals", "socket", "url"]
    eventually(lambda: listing(short_path / "run") == [])


def test_shell_script_prints_metrics_and_its_sidecar_ends(env: dict[str, str], short_path: Path) -> None:
    """It prints one answer about its program; the sidecar ends with that."""
    body = json.loads(run(["bash", "-c", "set -m\n" + FILES["alongside.sh"]], env, short_path))
    assert body["threads"]
    assert listing(short_path / "run") == []


def test_threads_in_process_are_those_on_the_embedding_page(env: dict[str, str], short_path: Path) -> None:
    """The sidecar in process adds only the threads that the page names, and none is left after stop()."""
    code = (
        "import threading, urllib.request, vitalsd\n"
        "sidecar = vitalsd.start(port=0)\n"
        "for path in ('metrics?window_ms=10', 'processes', 'history', 'metrics?window_ms=10&pid=%d' % PARENT):\n"
        "    urllib.request.urlopen(f'{sidecar.url}/{path}').read()\n"
        "print(*sorted(t.name for t in threading.enumerate() if t is not threading.main_thread() and t.daemon))\n"
        "sidecar.stop()\n"
        "print(threading.active_count())\n"
    ).replace("PARENT", str(os.getpid()))
    names, left = run([sys.executable, "-c", code], env, short_path).splitlines()
    documented = set(re.findall(r"`(vitalsd(?:-[a-z]+)?)`", TEXT)) | {f"vitalsd-{os.getpid()}"}
    assert set(names.split()) <= documented
    assert {"vitalsd", "vitalsd-sampler"} <= set(names.split())
    assert left == "1"


def test_spawned_sidecar_has_the_lifetime_of_the_embedding_page(env: dict[str, str], short_path: Path) -> None:
    """A spawned sidecar answers after its target has gone; with `exit_with_target` it ends with it."""
    with subprocess.Popen(["sleep", "60"]) as target:
        stays = spawn(target.pid, port=0, env=env)
        goes = spawn(target.pid, port=0, env=env, exit_with_target=True)
        target.kill()
    with stays:
        eventually(lambda: not goes.running)
        assert stays.url is not None
        assert ask(stays.url, "/metrics?window_ms=10")[0] == 410
        assert stays.running
