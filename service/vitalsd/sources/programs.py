"""
Identify the program that a process runs, without storing a path.

Two processes run one program if the kernel executed the same file for both and both have the same payload: the script
of an interpreter, the class of a Java machine, or the files named on the command line. `program_digest` makes a keyed
digest of both, which can be compared on this machine and reveals no path.

Source of the option tables: the manual pages python(1), node(1), java(1), perlrun(1), ruby(1), php(1), lua(1),
julia(1), bash(1) and zsh(1).
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

__all__ = [
    "Command",
    "ProgramDigest",
    "ProgramOf",
    "main_script",
    "may_be_versions",
    "no_program",
    "program_digest",
]

VERSION = r"([-.0-9]*|[-.0-9]*[0-9][a-z])$"
"""Pattern of the version at the end of a name, as in ``python3.11``, ``python3.13t`` and ``perl5.36``."""

INTERPRETERS = re.compile(
    r"(bash|bun|dash|deno|dotnet|electron|java|julia|ksh|lua|luajit|mono|node|nodejs|perl|php|pypy|python|Rscript|ruby"
    rf"|sh|tclsh|wish|zsh){VERSION}",
    re.IGNORECASE,  # The executable of a framework build on macOS is named "Python".
)
"""Names of executables that run other programs."""

PYTHON = re.compile(rf"(python|pypy){VERSION}", re.IGNORECASE)
JAVA = re.compile(rf"java{VERSION}", re.IGNORECASE)
SCRIPT = re.compile(r".*\.(bat|cjs|dll|exe|jar|jl|js|lua|love|mjs|php|pl|py|pyw|pyz|r|rb|sh|tcl|ts)$", re.IGNORECASE)
"""Words that name a program, on the command line of an executable that is not in `INTERPRETERS`."""
MAX_PATH = 4096
"""Longest path that is looked up, bytes (PATH_MAX in limits.h)."""

PYTHON_VALUES = "XWQ"
"""Option letters of Python that take a value, in the same word or as the next one."""
JAVA_PATHS = ("-cp", "-classpath", "--class-path", "-p", "--module-path")
"""Options of Java that take a list of paths."""
JAVA_VALUES = (
    *("--add-modules", "--add-exports", "--add-opens", "--add-reads", "--limit-modules"),
    *("--patch-module", "--upgrade-module-path", "--enable-native-access", "--source"),
)
"""Options of Java that take the next word as their value."""
VALUES: dict[str, tuple[str, ...]] = {
    "bash": ("-o", "+o", "-O", "+O", "--rcfile", "--init-file"),
    "sh": ("-o", "+o"),
    "dash": ("-o", "+o"),
    "ksh": ("-o", "+o"),
    "zsh": ("-o", "+o"),
    "bun": ("-r", "--preload", "--cwd", "-c", "--config"),
    "julia": ("-L", "--load", "-J", "--sysimage", "-p", "--procs", "-t", "--threads", "-H", "--home", "-C"),
    "lua": ("-l",),
    "luajit": ("-l", "-j"),
    "node": (
        *("-r", "--require", "--import", "--loader", "--experimental-loader", "-C", "--conditions", "--title"),
        *("--env-file", "--input-type", "--inspect-port", "--icu-data-dir", "--openssl-config", "--diagnostic-dir"),
    ),
    "perl": ("-I",),
    "php": ("-d", "-c", "-z"),
    "ruby": ("-I", "-r", "-C", "-E", "--encoding", "--external-encoding", "--internal-encoding"),
}
"""By interpreter: options that take the next word as their value."""
CODE_OPTIONS: dict[str, tuple[str, ...]] = {
    "bash": ("-c",),
    "sh": ("-c",),
    "dash": ("-c",),
    "ksh": ("-c",),
    "zsh": ("-c",),
    "bun": ("-e", "--eval", "-p", "--print"),
    "deno": ("eval",),
    "julia": ("-e", "-E", "--eval", "--print"),
    "lua": ("-e",),
    "luajit": ("-e",),
    "node": ("-e", "--eval", "-p", "--print", "-pe"),
    "perl": ("-e", "-E"),
    "php": ("-r",),
    "rscript": ("-e",),
    "ruby": ("-e",),
}
"""By interpreter: options that are followed by the code itself."""
ALIASES = {"nodejs": "node", "electron": "node"}
"""Interpreters with the options of another one."""
INSIDE = ("package.json", "index.js", "main.js")
"""Files in a directory that Node.js can run."""
SUBCOMMANDS = ("run", "exec")
"""Words of ``deno run``, ``bun run`` and ``dotnet exec`` that are not names of files."""


class Command(NamedTuple):
    """The arguments with which the kernel executed a program."""

    executable: str
    """Absolute path of the executed file."""
    words: Sequence[bytes]
    """The command line without the name of the program."""
    directory: str
    """The working directory, to which relative names are resolved; empty: unknown."""
    name: bytes = b""
    """The first word of the command line; an executable that contains several programs chooses one by it."""


ProgramOf = Callable[[Command], str]
"""Return the `Identity.program` of a command; empty if it cannot be determined."""


def no_program(_: Command) -> str:
    """Return the empty string, for a caller that does not compare programs: so no file is read and hashed."""
    return ""


class ProgramDigest:
    """
    A `ProgramOf` with the key of this user.

    Args:
        key: see `vitalsd.discovery.program_key`; ``None``: there is none, so no program can be determined.
        script: absolute path of the script of the target, if the client passed it. It is valid for the first command;
            a target that executes another program is identified by its command line from then on.
    """

    def __init__(self, key: bytes | None, script: str | None = None) -> None:
        self._key = key
        self._script = script
        self._first: Command | None = None

    def __call__(self, command: Command) -> str:
        """Return the digest of `command`."""
        if self._key is None:
            return ""
        self._first = self._first or command
        payload = [os.path.realpath(self._script)] if self._script and command == self._first else None
        return program_digest(self._key, command, payload)


def program_digest(key: bytes, command: Command, payload: Sequence[str] | None = None) -> str:
    """
    Return 32 hexadecimal digits that are equal for two processes of one program.

    The last 16 digits are a digest of the names without their directories: if they are equal, the two may be versions
    of one program.

    Args:
        key: up to 64 bytes; without a key, the path of a digest could be found by trying likely ones.
        command: the executed command.
        payload: resolved paths of what the executable runs; default: determined from the command line.

    Returns:
        The digest; empty if the program cannot be determined: the executable is unknown, the script of an interpreter
        cannot be found, or a relative name has no known directory.
    """
    if not os.path.isabs(command.executable):
        return ""
    if payload is None:
        payload = _payload(command)
    if payload is None:
        return ""
    executable = os.path.realpath(command.executable)
    scripted = INTERPRETERS.match(os.path.basename(executable)) is not None
    called = os.path.basename(os.fsdecode(command.name))
    if called and not scripted and called != os.path.basename(executable):
        payload = [called, *payload]
    # The script of an interpreter is part of the name; a file that a viewer opens is not.
    names = [os.path.basename(executable), *(map(os.path.basename, payload) if scripted else ())]
    return _digest(key, [executable, *payload]) + _digest(key, names)


def _digest(key: bytes, parts: Sequence[str]) -> str:
    encoded = map(os.fsencode, parts)
    counted = b"".join(b"%d:%b" % (len(part), part) for part in encoded)  # different lists have different encodings
    return hashlib.blake2b(counted, key=key, digest_size=8, person=b"vitalsd program").hexdigest()


def may_be_versions(one: str, other: str) -> bool:
    """Return whether two digests may be of two versions of one program; True if either is unknown."""
    return not one or not other or one[16:] == other[16:]


def main_script(main: ModuleType | None = None) -> str | None:
    """
    Return the absolute path of the script of this process; ``None`` for code from an option, or a frozen application.

    Args:
        main: default: ``sys.modules["__main__"]``.
    """
    main = main or sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if not isinstance(file, str) or not file or hasattr(sys, "frozen") or hasattr(main, "__compiled__"):
        return None
    path = os.path.realpath(file)
    folder = os.path.dirname(path)
    return folder if os.path.isfile(folder) else path  # the second name of PROGRAM.pyz/__main__.py


def _payload(command: Command) -> list[str] | None:
    """Return what the executable runs, as resolved paths or code; ``None`` if that cannot be determined."""
    name = os.path.basename(command.executable)
    words = [os.fsdecode(word) for word in command.words]
    if not INTERPRETERS.match(name):
        if words and not command.directory:
            return None  # a relative name could be that of any file
        return _named(words, command.directory)
    if PYTHON.match(name):
        return _python_payload(words, command.directory)
    if JAVA.match(name):
        return _java_payload(words, command.directory)
    return _other_payload(re.sub(VERSION, "", name.lower()), words, command.directory)


def _named(words: Sequence[str], directory: str) -> list[str] | None:
    """
    Return the files and directories that words name, also as ``--option=PATH``.

    ``None`` if a word names a program that does not exist.
    """
    found = []
    for word in words:
        option, assigned, value = word.partition("=")
        path = _existing(word, directory) or (assigned and option.startswith("-") and _existing(value, directory))
        if path:
            found.append(path)
        elif SCRIPT.match(word) and not word.startswith("-"):
            return None  # The process has changed its working directory since its start.
    return found


def _python_payload(words: Sequence[str], directory: str) -> list[str] | None:
    searched = True  # whether -m searches the working directory
    remaining = iter(words)
    for word in remaining:
        if word == "--check-hash-based-pycs":
            next(remaining, None)
        elif not word.startswith("-"):
            return _listed(_script(word, directory, ("__main__.py",)))
        elif word.startswith("--") or word == "-":
            if word in ("-", "--"):
                return None
        else:
            for at, letter in enumerate(word[1:], 1):
                value = word[at + 1 :]
                if letter in PYTHON_VALUES:
                    if not value:
                        next(remaining, None)
                    break
                if letter == "c":
                    return ["-c", value or next(remaining, "")]
                if letter == "m":
                    return _listed(_module(value or next(remaining, ""), directory)) if searched else None
                searched = searched and letter not in "PI"
    return None


def _module(name: str, directory: str) -> str | None:
    """Return the file of a module in the working directory; an installed one cannot be found from another process."""
    if not directory or not re.fullmatch(r"\w+(\.\w+)*", name):
        return None
    stem = os.path.join(directory, *name.split("."))
    for candidate in (os.path.join(stem, "__main__.py"), f"{stem}.py"):
        if os.path.isfile(candidate):
            return os.path.realpath(candidate)
    return None


def _java_payload(words: Sequence[str], directory: str) -> list[str] | None:
    entries: list[str] = []
    remaining = iter(words)
    for word in remaining:
        option, assigned, value = word.partition("=")
        if word == "-jar":
            return _listed(_script(next(remaining, ""), directory))
        if option in JAVA_PATHS:
            entries += (value if assigned else next(remaining, "")).split(os.pathsep)
        elif word in JAVA_VALUES:
            next(remaining, None)
        elif option in ("-m", "--module"):
            return [*_classpath(entries, directory), value if assigned else next(remaining, "")]
        elif not word.startswith(("-", "@")):
            if source := _file(word, directory):
                return [source]
            if not directory and not all(map(os.path.isabs, entries or ["."])):
                return None
            return [*_classpath(entries or ["."], directory), word]
    return None


def _classpath(entries: Sequence[str], directory: str) -> list[str]:
    return [os.path.realpath(os.path.join(directory, entry)) for entry in entries]


def _other_payload(name: str, words: Sequence[str], directory: str) -> list[str] | None:
    """Return the script, or all words if code is among them."""
    name = ALIASES.get(name, name)
    values, codes = VALUES.get(name, ()), CODE_OPTIONS.get(name, ())
    found: list[str] = []
    may_be_value = False
    remaining = iter(words)
    for word in remaining:
        if word in codes or _has_code(name, word):
            return ["-c", *words]
        if word in values:
            next(remaining, None)
        elif word.startswith(("-", "+")):
            may_be_value = word.startswith("--") and "=" not in word  # of an option that `VALUES` does not have
        elif word not in SUBCOMMANDS:
            script = _script(word, directory, INSIDE, (".js", ".mjs", ".cjs"))
            if script is None:
                return found or None
            found.append(script)
            if not may_be_value:
                return found
            may_be_value = False
    return found or None


def _has_code(name: str, word: str) -> bool:
    """Return whether code follows a group of option letters, as in ``sh -ec CODE`` or ``perl -we CODE``."""
    letters = {"perl": "[eE]", "ruby": "e"}.get(name, "c[A-Za-z]*" if name.endswith("sh") else "")
    return bool(letters) and re.fullmatch(f"-[A-Za-z]*{letters}", word) is not None


def _script(word: str, directory: str, inside: Sequence[str] = (), suffixes: Sequence[str] = ()) -> str | None:
    """
    Return the resolved path of a script.

    Args:
        word: name on the command line.
        directory: working directory.
        inside: files that the interpreter runs if the name is that of a directory.
        suffixes: suffixes that may be left out of a name.
    """
    path = os.path.join(directory, word)
    if not word or len(path) > MAX_PATH or not os.path.isabs(path):
        return None
    path = os.path.realpath(path)
    for candidate in (path, *(path + suffix for suffix in suffixes)):
        if os.path.isfile(candidate):
            return candidate
    if os.path.isdir(path):
        return next((file for name in inside if os.path.isfile(file := os.path.join(path, name))), None)
    return None


def _file(word: str, directory: str) -> str | None:
    """Return the resolved path of a regular file; ``None`` if `word` does not name one."""
    path = _existing(word, directory)
    return path if path is not None and os.path.isfile(path) else None


def _existing(word: str, directory: str) -> str | None:
    """Return the resolved path of the file or directory that `word` names; ``None``: there is none."""
    path = os.path.join(directory, word)
    named = word and len(path) <= MAX_PATH and os.path.isabs(path) and os.path.exists(path)
    return os.path.realpath(path) if named else None


def _listed(path: str | None) -> list[str] | None:
    return None if path is None else [path]
