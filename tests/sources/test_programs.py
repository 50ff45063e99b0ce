"""Which program a process runs: `vitalsd.sources.programs`, and the key of the digest."""

import os
import shutil
import stat
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from support.sidecars import eventually
from vitalsd.discovery.program_key import program_key
from vitalsd.sources import open_source
from vitalsd.sources.programs import Command, ProgramDigest, main_script, may_be_versions, program_digest

KEY = b"k" * 32
PYTHON = "/usr/bin/python3.11"
JAVA = "/usr/lib/jvm/bin/java"
NODE = "/usr/bin/node"


def digest(executable: str, line: str, directory: Path | str) -> str:
    return program_digest(KEY, Command(executable, line.encode().split(), str(directory)))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two applications with files of the same names."""
    made = tmp_path / "bank", tmp_path / "game"
    for folder in made:
        (folder / "pkg").mkdir(parents=True)
        for name in ("main.py", "app.py", "app.js", "app.jar", "lib.jar", "run.sh", "pkg/__main__.py", "pkg/tool.py"):
            (folder / name).touch()
    return made


@pytest.mark.parametrize(
    ("executable", "lines"),
    [
        (
            PYTHON,
            [
                "main.py",
                "./main.py",
                "DIR/main.py",
                "main.py --verbose other.py",
                "-X utf8 main.py",
                "-Xutf8 ./main.py",
                "-W ignore -uB main.py",
                "-bbW ignore main.py",
                "--check-hash-based-pycs always main.py",
                "-m main",
                "-um main",
                "-X dev -m main --pid 3",
            ],
        ),
        (PYTHON, ["-m pkg", "pkg", "pkg/__main__.py", "-Bm pkg"]),
        (PYTHON, ["-m pkg.tool", "pkg/tool.py"]),
        ("/usr/bin/pypy3.10", ["main.py", "-m main"]),
        (NODE, ["app.js", "app", "--require x app.js", "-r x ./app.js", "--max-old-space-size=9 app.js", "DIR/app.js"]),
        (JAVA, ["-jar app.jar", "-Xmx1g -jar DIR/app.jar arg", "-cp lib.jar -jar app.jar"]),
        (JAVA, ["-cp app.jar A", "--class-path=app.jar A", "-classpath DIR/app.jar A x y", "-Dx=y -cp app.jar A"]),
        ("/bin/bash", ["run.sh", "-e run.sh", "-o pipefail run.sh", "--rcfile main.py run.sh"]),
        ("/usr/bin/perl5.36", ["-w main.py", "-I lib.jar main.py", "main.py"]),
        ("/opt/viewer", ["app.js", "--open DIR/app.js", "app.js --page 3"]),
    ],
)
def test_program_digest_of_one_program_started_differently_is_equal(
    folders: tuple[Path, Path], executable: str, lines: Sequence[str]
) -> None:
    """Options before the script, relative and absolute names and -m do not matter; the directory does."""
    bank, game = folders
    found = {digest(executable, line.replace("DIR", str(bank)), bank) for line in lines}
    assert len(found) == 1
    (own,) = found
    assert own != ""
    assert len(own) == 32
    elsewhere = digest(executable, lines[0].replace("DIR", str(game)), game)
    assert elsewhere not in ("", own)
    assert may_be_versions(own, elsewhere), "as an update into another folder is"


@pytest.mark.parametrize(
    ("executable", "one", "other"),
    [
        (PYTHON, "main.py", "app.py"),
        (PYTHON, "-X utf8 main.py", "-X utf8 app.py"),
        (PYTHON, "-m main", "-m app"),
        (PYTHON, "-c 1", "-c 2"),
        (JAVA, "-cp app.jar A", "-cp app.jar B"),
        (JAVA, "-cp app.jar A", "-cp lib.jar A"),
        (JAVA, "-p app.jar -m mod/A", "-p app.jar -m mod/B"),
        (NODE, "--require x main.py", "--require x app.js"),
        (NODE, "-e 1", "-e 2"),
        ("/bin/sh", "-c 1", "-ec 2"),
        ("/opt/viewer", "app.js", "main.py"),
        ("/opt/viewer", "", "main.py"),
        ("/opt/viewer", "--file=app.js", "--file=main.py"),
        ("/opt/player", "pkg", "."),
        ("/usr/bin/runner", "run main.py", "run app.py"),
        ("/usr/bin/python3.13t", "-m main", "-m app"),
        ("/usr/bin/perl", "-MBank -e run", "-MGame -e run"),
        ("/bin/bash", "-cl 1", "-cl 2"),
        (NODE, "--report-dir app.jar app.js", "--report-dir app.jar main.py"),
    ],
)
def test_program_digest_of_two_programs_differs(
    folders: tuple[Path, Path], executable: str, one: str, other: str
) -> None:
    """It differs too if an option, a class path or a command line begins alike."""
    bank, _ = folders
    digests = digest(executable, one, bank), digest(executable, other, bank)
    assert "" not in digests
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("executable", "line", "directory"),
    [
        ("", "main.py", "DIR"),
        ("python3", "main.py", "DIR"),
        (PYTHON, "", "DIR"),
        (PYTHON, "-", "DIR"),
        (PYTHON, "-i", "DIR"),
        (PYTHON, "main.py", ""),
        (PYTHON, "-m main", ""),
        (PYTHON, "-m no_such_module", "DIR"),
        (PYTHON, "-Pm main", "DIR"),
        (PYTHON, "-I -m main", "DIR"),
        (PYTHON, "-m ../main", "DIR"),
        (PYTHON, "gone.py", "DIR"),
        (JAVA, "-version", "DIR"),
        (NODE, "--inspect", "DIR"),
        ("/bin/bash", "", "DIR"),
        ("/opt/viewer", "app.js", ""),
        ("/usr/bin/runner", "run gone.py", "DIR"),
        ("/usr/bin/perl", "gone.pl main.py", "DIR"),
        ("/bin/bash", "gone.sh main.py", "DIR"),
        (NODE, "--report-dir pkg gone.js", "DIR"),
        (PYTHON, "a/" * 100_000, "DIR"),
    ],
)
def test_program_digest_in_doubt_is_empty(
    folders: tuple[Path, Path], executable: str, line: str, directory: str
) -> None:
    """An interpreter without a script that can be found, and relative names without a directory, are not guessed."""
    assert digest(executable, line, directory.replace("DIR", str(folders[0]))) == ""


def test_program_digest_of_a_multi_call_executable_differs_by_name(tmp_path: Path) -> None:
    """For busybox, a full path is the same as its name; an interpreter may be called by any name."""
    box = tmp_path / "box"
    box.touch()
    by_name = {
        name: program_digest(KEY, Command(str(box), [], "/", name))
        for name in (b"", b"box", b"/x/box", b"httpd", b"/usr/sbin/httpd", b"crond")
    }
    assert by_name[b""] == by_name[b"box"] == by_name[b"/x/box"]
    assert by_name[b"httpd"] == by_name[b"/usr/sbin/httpd"]
    assert len(set(by_name.values())) == 3
    assert digest(PYTHON, "-c 1", "/") == program_digest(KEY, Command(PYTHON, [b"-c", b"1"], "/", b"py"))


@pytest.mark.live
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root for a mount namespace of Linux")
def test_program_of_another_mount_namespace_is_unknown(tmp_path: Path) -> None:
    """There, another file may have the same path."""
    shell = shutil.which("sh") or ""
    (tmp_path / "app").mkdir()
    program = str(shutil.copy(shell, tmp_path / "app" / "client"))
    speak = ["-c", "echo ready; read line"]
    script = 'mount -t tmpfs none app && cp "$0" app/client && exec "$PWD/app/client" "$@"'
    with (
        running(["unshare", "--mount", "sh", "-c", script, shell, *speak], tmp_path) as elsewhere,
        running([program, *speak], tmp_path) as own,
    ):
        assert elsewhere == ""
        assert own != ""


def test_may_be_versions_compares_names_without_directories(folders: tuple[Path, Path]) -> None:
    """For an interpreter it compares the script too, for a viewer no document; an unknown program may be any."""
    bank, _ = folders
    assert not may_be_versions(digest(PYTHON, "main.py", bank), digest(PYTHON, "app.py", bank))
    assert not may_be_versions(digest("/a/client", "", bank), digest("/a/classic", "", bank))
    assert may_be_versions(digest("/a-1.0/viewer", "app.js", bank), digest("/a-1.1/viewer", "main.py", bank))
    assert may_be_versions(digest(PYTHON, "main.py", bank), "")


def test_program_digest_needs_the_key(folders: tuple[Path, Path]) -> None:
    """Another key gives another digest, so that a receiver cannot search likely paths; none gives no digest."""
    command = Command(PYTHON, [b"main.py"], str(folders[0]))
    assert program_digest(KEY, command) != program_digest(b"l" * 32, command)
    assert ProgramDigest(None)(command) == ""


def test_program_digest_through_a_link_is_that_of_the_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A link to the script, or to its directory, is the same program."""
    bank, _ = folders
    (tmp_path / "link.py").symlink_to(bank / "main.py")
    (tmp_path / "moved").symlink_to(bank)
    own = digest(PYTHON, "main.py", bank)
    assert digest(PYTHON, "link.py", tmp_path) == own
    assert digest(PYTHON, "main.py", tmp_path / "moved") == own


def test_program_digest_takes_the_script_of_the_client_until_exec(folders: tuple[Path, Path]) -> None:
    """`spawn` says what the main module is; a target that executes another program is not that program any more."""
    bank, _ = folders
    of = ProgramDigest(KEY, str(bank / "main.py"))
    launched = Command(PYTHON, [b"-m", b"installed_somewhere"], "/")
    assert of(launched) == digest(PYTHON, "main.py", bank) == of(launched)
    assert of(Command(PYTHON, [b"app.py"], str(bank))) == digest(PYTHON, "app.py", bank)


def test_main_script_is_the_file_of_the_main_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolved; an archive is itself; code from an option and a frozen application have none."""
    main = types.ModuleType("__main__")
    assert main_script(main) is None
    script = tmp_path / "main.py"
    script.touch()
    (tmp_path / "link.py").symlink_to(script)
    main.__file__ = str(tmp_path / "link.py")
    assert main_script(main) == str(script)
    archive = tmp_path / "app.pyz"
    archive.touch()
    main.__file__ = f"{archive}/__main__.py"
    assert main_script(main) == str(archive)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert main_script(main) is None


# Real processes


@contextmanager
def running(command: Sequence[str], directory: Path) -> Iterator[str]:
    """Yield the program of another process as Linux or macOS shows it, once the process executes `command`."""
    with subprocess.Popen(command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            source = open_source(process.pid, program_of=ProgramDigest(KEY))
            yield source.identity().program
            source.close()
        finally:
            process.kill()


SCRIPT = f"#!{sys.executable}\nprint('ready', flush=True)\ninput()\n"


@pytest.mark.live
def test_program_of_a_real_script_is_equal_for_every_way_to_start_it(tmp_path: Path) -> None:
    """The ways are by name, path, after an option, as a module and by itself, as `start` sees it from within."""
    script = tmp_path / "client.py"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    own = program_digest(KEY, Command(os.path.realpath(sys.executable), [], "/"), [str(script.resolve())])
    commands: list[tuple[Sequence[str], Path]] = [
        ((sys.executable, "client.py"), tmp_path),
        ((sys.executable, str(script)), Path("/")),
        ((sys.executable, "-X", "utf8", "./client.py"), tmp_path),
        ((sys.executable, "-m", "client"), tmp_path),
        (("./client.py",), tmp_path),
    ]
    for command, directory in commands:
        with running(command, directory) as program:
            assert program == own, command


@pytest.mark.live
def test_program_of_a_native_executable_is_its_file(tmp_path: Path) -> None:
    """Two files of which the kernel keeps the same 15 bytes of name are two programs; a copy run twice is one."""
    cat = shutil.which("cat")
    assert cat is not None
    programs = []
    for name in ("acme-desktop-client", "acme-desktop-classic"):
        shutil.copy(cat, tmp_path / name)
        with subprocess.Popen([tmp_path / name], stdin=subprocess.PIPE) as process:
            source = open_source(process.pid, program_of=ProgramDigest(KEY))
            executed = partial(lambda of, name: of.snapshot().roster.names[0] == name[:15], source, name)
            eventually(executed)
            programs.append(source.identity().program)
            source.close()
            process.kill()
    assert len(set(programs)) == 2
    assert "" not in programs


# The key


def test_program_key_is_made_once_and_private(tmp_path: Path) -> None:
    """All that make it at the same time get the same; it is of 32 bytes and mode 0600."""
    keys: list[bytes | None] = []
    threads = [threading.Thread(target=lambda: keys.append(program_key(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys == [keys[0]] * 8
    assert keys[0] is not None
    assert len(keys[0]) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["program.key"]
    assert stat.S_IMODE((tmp_path / "program.key").stat().st_mode) == 0o600


def test_program_key_that_is_not_private_is_not_used(tmp_path: Path) -> None:
    """A file open to others, a link, a directory that cannot be written: none; a cut one is made anew."""
    path = tmp_path / "program.key"
    path.write_bytes(b"x" * 32)
    path.chmod(0o644)
    assert program_key(tmp_path) is None
    path.unlink()
    path.symlink_to("/dev/zero")
    assert program_key(tmp_path) is None
    path.unlink()
    path.write_bytes(b"cut")
    path.chmod(0o600)
    assert len(program_key(tmp_path) or b"") == 32
    assert program_key(tmp_path / "nowhere") is None
