"""The command of a sidecar, `vitalsd.sidecar.frozen`, without a frozen application; tests/hosts has those."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.sidecars import environment
from vitalsd.doctor.cpu_load import CpuLoadProcess
from vitalsd.pyinstaller_hooks import get_hook_dirs


@pytest.mark.parametrize("state", ["sys.executable = ''", "sys.executable = None"])
@pytest.mark.parametrize(
    "command", [["agent", "install"], ["agent", "print"], ["agent", "print", "--supervisor", "launchd"], ["doctor"]]
)
def test_command_without_a_known_python_exits_with_1_and_one_line(
    command: list[str], state: str, short_path: Path
) -> None:
    """Status 1 and a sentence with the remedy, no traceback."""
    code = f"import sys; {state}; from vitalsd.cli import main; main(sys.argv[1:], prog_name='vitalsd')"
    (short_path / "bin").mkdir()
    systemctl = short_path / "bin" / "systemctl"
    systemctl.write_text("#!/bin/sh\n")
    systemctl.chmod(0o755)
    env = environment(short_path) | {"HOME": str(short_path), "PATH": f"{systemctl.parent}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code, *command], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vitalsd: sys.executable is empty, so there is no Python to run the ")
    assert ("pass command=" in line) == (command == ["doctor"]), "the remedy is one for this command"
    assert not (short_path / ".config").exists()


def test_burner_process_of_a_vendored_vitalsd_starts(short_path: Path) -> None:
    """It finds vitalsd on the path of the doctor, also where no other interpreter would."""
    root = ROOT / "service"
    (short_path / "vendored").mkdir()
    (short_path / "vendored" / "vitalsd").symlink_to(root / "vitalsd")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from vitalsd.doctor.cpu_load import CpuLoadProcess\n"
        "with CpuLoadProcess((0,)) as load: print(*load.tids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(short_path / "vendored")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "burn-0\n", done.stderr


def test_help_does_not_list_the_burner_command() -> None:
    """`vitalsd burn` is there for the doctor alone, and help does not list it."""
    help_ = subprocess.run([sys.executable, "-m", "vitalsd", "--help"], capture_output=True, text=True, check=True)
    assert "burn" not in help_.stdout
    with CpuLoadProcess((0,)) as load:
        assert list(load.tids) == ["burn-0"]


def test_hooks_are_found_without_loading_pyinstaller() -> None:
    """The entry point names a directory that has them, and vitalsd itself needs no PyInstaller."""
    (directory,) = get_hook_dirs()
    assert {path.name for path in Path(directory).glob("*.py")} == {"hook-vitalsd.py", "hook-vitalsd_client.py"}
    code = "import sys, vitalsd.pyinstaller_hooks as hooks; hooks.get_hook_dirs(); print('PyInstaller' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


APPLICATION = """
import os, sys, threading
counter = os.open(sys.argv[1], os.O_APPEND | os.O_CREAT | os.O_RDWR)
os.write(counter, b"x")
if os.fstat(counter).st_size > 8:
    os._exit(1)  # the guard of this test
os.close(counter)
sys.executable = sys.argv[2]
import vitalsd
def spawn():
    try:
        vitalsd.spawn(port=0, timeout_s=10)
    except vitalsd.SpawnError as error:
        print(error, flush=True)
if sys.argv[3] == "twice":
    spawn()
    spawn()
else:
    threads = [threading.Thread(target=spawn) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@pytest.mark.parametrize("how", ["twice", "threads"])
def test_spawn_of_an_application_that_is_its_own_executable_starts_one_copy_for_each_call(
    short_path: Path, how: str
) -> None:
    """A copy starts none, however often and from whichever thread it calls `spawn`; nothing says frozen."""
    (short_path / "app.py").write_text(APPLICATION)
    wrapper = short_path / "app"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{short_path}/app.py" "{short_path}/copies" "$0" {how}\n')
    wrapper.chmod(0o755)
    done = subprocess.run([str(wrapper)], env=environment(short_path), capture_output=True, text=True, timeout=60)
    assert (short_path / "copies").read_text() == "xxx"
    assert done.stdout.count("starts the application again") == 2, done.stdout


@pytest.mark.parametrize("value", ["1", "x", f"{2**22 + 5}:1:1", f"{2**22 + 5}:999:5"])
def test_spawn_with_a_marker_that_spawn_did_not_set_works(short_path: Path, value: str) -> None:
    """A variable set by accident is no refusal, and nothing is written to the client's own pipes."""
    code = "import vitalsd; vitalsd.spawn(port=0).stop(); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(short_path) | {"VITALSD_SPAWNED": value},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_spawn_in_a_removed_working_directory_works(short_path: Path) -> None:
    """It works too for a vendored copy in a folder with a colon in its path."""
    vendored = short_path / "a:b"
    vendored.mkdir()
    (vendored / "vitalsd").symlink_to(ROOT / "service" / "vitalsd")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); os.mkdir(sys.argv[2]); os.chdir(sys.argv[2])\n"
        "os.rmdir(sys.argv[2])\n"
        "import vitalsd; vitalsd.spawn(port=0).stop(); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(vendored), str(short_path / "gone")],
        env=environment(short_path),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "done\n", done.stderr
