"""The rules of the project: allowed imports, public names, what a client loads, the targets of make."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitalsd
import vitalsd_client
from support.as_darwin.emulation import LACKING
from support.paths import ROOT
from support.sidecars import environment

SERVICE = ROOT / "service" / "vitalsd"


def modules(package: types.ModuleType) -> Iterator[str]:
    yield package.__name__
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith(".__main__"):
            yield found.name


@cache
def imports(file: Path, *, at_load: bool = False) -> frozenset[str]:
    """The modules that a file names in its imports, wherever they stand, or only those that it needs to load."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def imported_by_the_service() -> frozenset[str]:
    return frozenset().union(*map(imports, SERVICE.rglob("*.py")))


@pytest.mark.parametrize("module", [*modules(vitalsd), *modules(vitalsd_client)])
def test_modules_export_exactly_their_public_names(module: str) -> None:
    """__all__ names what a module defines without an underscore and others may use, sorted, and nothing else."""
    if module == "vitalsd.sources.darwin.apple_headers":
        return  # names of Apple's headers, all of them
    loaded = importlib.import_module(module)
    public = getattr(loaded, "__all__", [])
    assert len(set(public)) == len(public)
    for name in public:
        assert hasattr(loaded, name), f"{module}.{name} does not exist"
    defined = {
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and isinstance(value, (type, types.FunctionType))
        and value.__module__ == module
        and (name in public or _used_elsewhere(module, name))
    }
    assert defined <= set(public), f"{module}: not in __all__: {defined - set(public)}"


def _used_elsewhere(module: str, name: str) -> bool:
    return f"{module}.{name}" in imported_by_the_service()


def test_no_file_imports_the_source_root_package() -> None:
    """`service.vitalsd` would load every module a second time."""
    for folder in ("service", "clients", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for imported in imports(file):
                assert imported.split(".")[0] not in ("service", "clients"), file


def test_import_of_vitalsd_client_loads_no_server() -> None:
    """A program that imports vitalsd_client gets neither FastAPI nor uvicorn nor Starlette with it."""
    code = "import sys, vitalsd_client; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fastapi", "uvicorn", "starlette"} & set(out.stdout.split())


def test_help_option_loads_no_server() -> None:
    """`vitalsd --help` answers before anything heavy is imported."""
    code = "import sys, vitalsd.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fastapi", "uvicorn", "starlette", "pydantic", "httpx"} & set(out.stdout.split())


@pytest.mark.parametrize("command", [["runs"], ["endpoints"], ["report", "--help"], ["spool", "list"]])
def test_commands_that_read_the_disk_load_no_server(command: list[str], short_path: Path) -> None:
    """It answers in the time of an interpreter's start, and not of a web framework's."""
    code = (
        "import sys; from vitalsd.cli import main\n"
        "try: main(sys.argv[1:], prog_name='vitalsd')\n"
        "except SystemExit: print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment(short_path), capture_output=True, text=True, check=True
    )
    assert not {"fastapi", "uvicorn", "starlette"} & set(out.stdout.split())


def test_import_of_any_module_has_no_effect() -> None:
    """Importing a module starts no thread, opens no descriptor and touches no signal handler or logger."""
    code = (
        "import importlib, logging, os, signal, sys, threading\n"
        "def state(): return (threading.active_count(), [signal.getsignal(n) for n in (2, 15)],"
        " logging.root.handlers[:], len(os.listdir('/dev/fd')))\n"
        "before = state()\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    assert state() == before, (module, before, state())\n"
    )
    subprocess.run([sys.executable, "-c", code, *modules(vitalsd), *modules(vitalsd_client)], check=True)


def test_make_help_lists_every_target() -> None:
    """Each target that a user may call stands in `make help` with a sentence."""
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", out, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert set(listed) == set(phony[1].split())
    assert out == subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_contributing_names_existing_targets_and_files() -> None:
    """Every make target and every file that CONTRIBUTING.md speaks of exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    targets = set(re.findall(r"\bmake ([a-z]+)", text))
    assert {"check", "test", "doctor"} <= targets <= set(phony[1].split())
    for path in re.findall(r"`((?:service|tests|docs)/[\w./]+)`|\]\(([\w./]+)\)", text):
        assert (ROOT / "".join(path)).exists(), path


def test_make_without_a_suitable_python_names_the_remedy(tmp_path: Path) -> None:
    """Without a Python that will do, make tells which one is needed and how to name it."""
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    make = subprocess.run(["sh", "-c", "command -v make"], capture_output=True, text=True, check=True).stdout.strip()
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("sh", "awk", "test", "echo"):
        found = subprocess.run(["sh", "-c", f"command -v {tool}"], capture_output=True, text=True).stdout.strip()
        if found.startswith("/"):
            (bare / tool).symlink_to(found)
    out = subprocess.run([make, "test"], cwd=tmp_path, env={"PATH": str(bare)}, capture_output=True, text=True)
    assert out.returncode != 0
    assert "vitalsd needs Python 3.11 or newer" in out.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("module", [*modules(vitalsd), *modules(vitalsd_client)])
def test_modules_have_a_docstring_and_a_row_in_the_design(module: str) -> None:
    """docs/design.md lists modules with the first paragraph of their docstrings; `make reference` writes the list."""
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    path = Path(loaded.__file__ or "")
    name = f"{path.parent.name}/" if path.name == "__init__.py" else path.name
    assert f"{name}`" in (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def test_imports_have_no_cycle() -> None:
    """No module needs, at its import, a module that needs it."""
    every = {*modules(vitalsd), *modules(vitalsd_client)}
    needs = {
        module: {name for name in imports(Path(importlib.import_module(module).__file__ or ""), at_load=True)} & every
        for module in every
    }
    order = TopologicalSorter({module: needed - {module.rpartition(".")[0]} for module, needed in needs.items()})
    order.prepare()  # raises CycleError


def test_reliability_page_names_existing_tests() -> None:
    """Each test that docs/reliability.md names exists."""
    named = re.findall(
        r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    )
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_longest_files_are_there() -> None:
    """The list that tests/conftest.py begins with has no file that was renamed or removed."""
    text = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    listed = re.findall(r'^    "([\w/]+/test_\w+\.py)",$', text, re.MULTILINE)
    assert len(listed) > 10
    assert [name for name in listed if not (ROOT / "tests" / name).exists()] == []


MODULES_AT_THE_TOP = {"__init__", "__main__", "admission", "text", "worker_thread"}
MAX_METHODS = 20
MAX_LINES = 60
"""Of a function, without its docstring."""


def definitions() -> Iterator[tuple[Path, ast.AST]]:
    """Yield each node of the syntax trees of vitalsd and vitalsd_client, with its file."""
    for folder in (SERVICE, ROOT / "clients" / "vitalsd_client"):
        for file in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                yield file.relative_to(ROOT), node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from ``def`` to the end, without the docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def test_few_modules_lie_outside_of_a_package() -> None:
    """They are those that every package may import, and the two that Python needs."""
    assert {file.stem for file in SERVICE.glob("*.py")} == MODULES_AT_THE_TOP


def test_class_has_at_most_twenty_methods() -> None:
    """Beyond that it has more than one subject."""
    large = {
        f"{file}: {node.name}": count
        for file, node in definitions()
        if isinstance(node, ast.ClassDef)
        and (count := sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)) > MAX_METHODS
    }
    assert large == {}


def test_function_has_at_most_sixty_lines() -> None:
    """Without its docstring; nested functions count as lines of the outer one."""
    long = {
        f"{file}: {node.name}": length(node)
        for file, node in definitions()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MAX_LINES
    }
    assert long == {}


def test_public_class_name_is_used_once() -> None:
    """A name that two classes have does not say which one is meant."""
    files: dict[str, list[str]] = {}
    for file, node in definitions():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            files.setdefault(node.name, []).append(str(file))
    twice = {name: places for name, places in files.items() if len(places) > 1}
    assert not twice


REPLACED = {
    "vitalsd.discovery.atomic_file.os.lstat",
    "vitalsd.http.access.peer.NETLINK_SOCK_DIAG",
    "vitalsd.recording.run_files.os.open",
    "vitalsd.recording.run_writer.RunFile._insert_frame",
    "vitalsd.recording.run_writer.RunFile._insert_segment_row",
    "vitalsd.recording.run_writer.RunFile.insert_mark",
    "vitalsd.recording.run_writer.RunFile.set_identity",
    "vitalsd.recording.run_writer.RunFile.trim",
    "vitalsd.sidecar.service.FILE_CHECK_S",
    "vitalsd.sources.darwin.libproc_source.EXIT_LIMIT_S",
    "vitalsd.sources.linux.cpu_counters.os.open",
    "vitalsd.sources.names.PythonNames.snapshot",
    "vitalsd.worker_thread.HANG_TIMEOUT_NS",
    "vitalsd_client.report.datetime",
    "vitalsd_client.spool_sender._upload_request",
    "vitalsd_client.upload_tls.STORES",
}
"""What tests replace: system calls that fail, writes that are slow or fail, time limits, a clock, a list of paths."""


def test_tests_replace_nothing_else_of_vitalsd() -> None:
    """A dependency is passed to a constructor; what is replaced instead stands in the list, and no more than that."""
    assert {name for file in (ROOT / "tests").rglob("*.py") for name in replaced(file)} == REPLACED


def replaced(file: Path) -> Iterator[str]:
    """The names of vitalsd that a file sets by `monkeypatch.setattr`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ours = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vitalsd")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            match node.args:
                case [ast.Constant(value=str(name)), *_] if name.startswith("vitalsd"):
                    yield name
                case [ast.Name(id=name), ast.Constant(value=str(attribute)), *_] if name in ours:
                    yield f"{ours[name]}.{attribute}"


LINUX_ALONE = {
    ("signals_page.py", "os.memfd_create"),
    ("spawn.py", "os.memfd_create"),
    ("process_files.py", "os.pidfd_open"),
    ("peer.py", "socket.AF_NETLINK"),
    ("peer.py", "socket.SOCK_CLOEXEC"),
    ("peer.py", "socket.SOCK_NONBLOCK"),
    ("peer.py", "socket.TCP_INFO"),
    ("unix_socket.py", "socket.SO_PEERCRED"),
    ("process_exit.py", "os.pidfd_open"),
}
"""Names that Python lacks on macOS, where they are used behind a test of ``sys.platform``."""


def test_names_missing_on_macos_are_used_in_linux_code_only() -> None:
    """Names of os, socket, select, resource, fcntl, signal, time and mmap; a new one needs a branch for macOS."""
    lacking = {(module.__name__, name) for module, names in LACKING.items() for name in names.split()}
    used = {
        (path.name, f"{node.value.id}.{node.attr}")
        for package in ("service", "clients")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in lacking
    }
    assert used == LINUX_ALONE
