"""How vitalsd runs itself again: `vitalsd.frozen`, where no frozen application is needed; see tests/hosts for those."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecars import environment
from vitalsd.doctor.burner import BurnerProcess
from vitalsd.pyinstaller_hooks import get_hook_dirs


@pytest.mark.parametrize("state", ["sys.executable = ''", "sys.executable = None"])
@pytest.mark.parametrize(
    "command", [["agent", "install"], ["agent", "print"], ["agent", "print", "--supervisor", "launchd"], ["doctor"]]
)
def test_command_that_needs_a_python_that_is_unknown_says_so_in_a_line(
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
    assert line.startswith("vitalsd: sys.executable is empty, so there is no Python to run the sidecar with: ")
    assert not (short_path / ".config").exists()


def test_burner_process_of_a_vendored_vitalsd_starts(short_path: Path) -> None:
    """It finds vitalsd on the path of the doctor, also where no other interpreter would."""
    root = Path(__file__).parent.parent / "service"
    (short_path / "vendored").mkdir()
    (short_path / "vendored" / "vitalsd").symlink_to(root / "vitalsd")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from vitalsd.doctor.burner import BurnerProcess\n"
        "with BurnerProcess((0,)) as burner: print(*burner.tids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(short_path / "vendored")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "burn-0\n", done.stderr


def test_burner_process_is_not_among_the_commands() -> None:
    """`vitalsd burn` is there for the doctor alone, and help does not list it."""
    help_ = subprocess.run([sys.executable, "-m", "vitalsd", "--help"], capture_output=True, text=True, check=True)
    assert "burn" not in help_.stdout
    with BurnerProcess((0,)) as burner:
        assert list(burner.tids) == ["burn-0"]


def test_hooks_are_found_without_loading_pyinstaller() -> None:
    """The entry point names a directory that has them, and vitalsd itself needs no PyInstaller."""
    (directory,) = get_hook_dirs()
    assert {path.name for path in Path(directory).glob("*.py")} == {"hook-vitalsd.py", "hook-vitalsd_client.py"}
    code = "import sys, vitalsd.pyinstaller_hooks as hooks; hooks.get_hook_dirs(); print('PyInstaller' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
