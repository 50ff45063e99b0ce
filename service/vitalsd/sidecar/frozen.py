"""
Run vitalsd again from this program: by its Python, or by itself if it is frozen.

The executable of a frozen application (PyInstaller, cx_Freeze, Nuitka) is the application. To run it with ``-m
vitalsd`` starts the application again, which starts itself again. So a frozen application calls `freeze_support`
first, as it would call that of `multiprocessing`, and is then its own sidecar.
"""

import json
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

__all__ = [
    "FLAG",
    "NotRunnableError",
    "absolute",
    "child_environment",
    "is_frozen",
    "is_one_file",
    "own_command",
    "restore_libraries",
    "runs_as_vitalsd",
    "supports_own_sidecar",
    "with_own_files",
    "with_own_path",
]

FLAG = "--vitalsd-sidecar"
"""First argument by which a frozen application is run as vitalsd."""

BOOTSTRAP = (
    "import json, os, sys; path = json.loads(os.environ.pop('VITALSD_SYS_PATH'));"
    " sys.path[:] = dict.fromkeys([*path, *sys.path]); from vitalsd.cli import main; main(prog_name='vitalsd')"
)
"""Program that runs vitalsd with the directories of VITALSD_SYS_PATH, which its children do not inherit."""

LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FRAMEWORK_PATH")
"""Variables by which a frozen application finds its own libraries; another program must not load those."""
OF_THE_SERVICE = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"),
)
"""Variables of systemd for the client alone; a sidecar that inherited them would send notifications in its name."""


class NotRunnableError(RuntimeError):
    """vitalsd cannot be run from this program; ``str(error)`` says why and what to do."""


class _Application:
    """What is one per process."""

    supported = False
    """Whether the application has called `freeze_support`."""
    is_vitalsd = False
    """Whether the arguments of this program are commands of vitalsd."""


def supports_own_sidecar() -> None:
    """Note that this application has called `vitalsd.freeze_support`."""
    _Application.supported = True


def runs_as_vitalsd() -> None:
    """Note that the arguments of this program are commands of vitalsd; its command line calls this."""
    _Application.is_vitalsd = True


def is_frozen() -> bool:
    """Return whether the executable is the application and not a Python interpreter."""
    main = sys.modules.get("__main__")
    return bool(getattr(sys, "frozen", False)) or hasattr(main, "__compiled__")


def is_one_file() -> bool:
    """
    Return whether this is a one-file application of PyInstaller.

    Its launcher unpacks the files and then runs the application in a child process.
    """
    return is_frozen() and os.path.basename(getattr(sys, "_MEIPASS", "")).startswith("_MEI")


def own_command() -> list[str]:
    """
    Return how another process runs ``vitalsd``.

    Raises:
        NotRunnableError: the executable is unknown, or a frozen application that has not called `freeze_support`.
    """
    executable = sys.executable
    if is_frozen():
        executable = executable or sys.argv[0]
        if _Application.supported:
            return [absolute(executable), FLAG]
        if _Application.is_vitalsd:
            return [absolute(executable)]
        raise NotRunnableError(
            "this application is frozen, and running its executable would start the application again: call"
            ' vitalsd.freeze_support() first in its main module, or pass command=["/path/to/vitalsd"]'
        )
    if not executable:
        raise NotRunnableError(
            "sys.executable is empty, so there is no Python to run the sidecar with: pass"
            ' command=["/path/to/python", "-P", "-m", "vitalsd"]'
        )
    # -P: a vitalsd.py in the working directory must not be taken for this one.
    return [executable, "-P", "-m", "vitalsd"]


def child_environment(environ: Mapping[str, str], *, own: bool) -> dict[str, str]:
    """
    Return the environment for a sidecar.

    Args:
        environ: the environment of this process.
        own: whether the sidecar is run by `own_command`; another program has libraries of its own.
    """
    child = {name: value for name, value in environ.items() if name not in OF_THE_SERVICE and name != "PYTHONINSPECT"}
    for name in ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR"):
        if child.get(name):
            child[name] = absolute(child[name])  # The sidecar has another working directory.
    if own:
        with_own_files(child)
    else:
        restore_libraries(child)
    return child


def with_own_files(child: MutableMapping[str, str]) -> None:
    """
    Have a frozen application that is its own sidecar unpack its files once more.

    A one-file application would share its unpacked directory, which its launcher removes when the application ends.

    Args:
        child: environment of the sidecar.
    """
    if is_frozen():
        child["PYINSTALLER_RESET_ENVIRONMENT"] = "1"


def restore_libraries(environ: MutableMapping[str, str]) -> None:
    """
    Restore the library paths from before the start of the frozen application, for the run of another program.

    PyInstaller keeps them as NAME_ORIG, also in the environment of an interpreter that a frozen application started.
    """
    if not is_frozen() and not any(name.startswith("_PYI_") for name in environ):
        return
    for name in LIBRARY_PATHS:
        before = environ.pop(f"{name}_ORIG", None)
        if before is not None:
            environ[name] = before
        elif is_frozen():
            environ.pop(name, None)


def with_own_path(command: Sequence[str], child: MutableMapping[str, str]) -> list[str]:
    """
    Return `command` so that it finds vitalsd where this process did: vendored, or in a PEX or shiv archive.

    Directories are in the order of `sys.path`, or older packages of the interpreter would be taken for those of the
    archive. The directory of the client's script is left out, and so is the working directory: their modules must not
    be taken for those of vitalsd.

    Args:
        command: as `own_command` has it.
        child: environment of the sidecar; the directories are added to it.
    """
    here = str(Path(absolute(__file__)).parents[2])
    if list(command[1:]) != ["-P", "-m", "vitalsd"] or here in _site_packages():
        return list(command)
    script = os.path.dirname(absolute(sys.argv[0])) if sys.argv and sys.argv[0] else ""
    found = [absolute(path) for path in sys.path if path]
    kept = [path for path in found if path == here or path not in (script, absolute("."))]
    child["VITALSD_SYS_PATH"] = json.dumps(list(dict.fromkeys([*kept, here])))  # A path may contain a colon.
    return [command[0], "-P", "-c", BOOTSTRAP]


def absolute(path: str) -> str:
    """Return an absolute path; `path` itself if it is relative and the working directory has been removed."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        return path


def _site_packages() -> set[str]:
    """Return the directories in which every interpreter looks for packages."""
    import site
    import sysconfig

    paths = sysconfig.get_paths()
    return {paths["purelib"], paths["platlib"], *site.getsitepackages()}
