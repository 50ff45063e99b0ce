"""List the processes of Linux, and read their command lines."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress

from vitalsd.sources.base import ProcessEntry, UnsupportedError
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS, read_file
from vitalsd.sources.linux.procfs import MalformedError, parse_stat, parse_statm, parse_uids
from vitalsd.sources.names import decode_name
from vitalsd.sources.programs import Command

__all__ = ["hides_processes", "list_processes", "pages_of_sibling", "running_command"]

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PF_KTHREAD = 0x00200000  # linux/sched.h
COMM_BYTES = 15
"""Bytes of a thread's name that the kernel keeps (TASK_COMM_LEN in linux/sched.h, less the NUL)."""
MAX_WORDS = 8
"""
First words of a command line among which a script is looked for: its interpreter may be a script too, up to five times.
"""
CLOCK_BOOTTIME = 7  # linux/time.h; the time module has it on Linux only, and types are checked for macOS too


def running_command(process_fd: int) -> Command | None:
    """
    Return the command of a process; ``None`` if this user may not read it, or its path names another file here.

    Args:
        process_fd: descriptor of ``/proc/<pid>``.
    """
    try:
        executable = os.readlink("exe", dir_fd=process_fd)
        deleted = executable.endswith(" (deleted)")
        executable = executable.removesuffix(" (deleted)")
        directory = os.readlink("cwd", dir_fd=process_fd)
        name, *words = read_file("cmdline", process_fd).removesuffix(b"\0").split(b"\0")
        if not deleted:
            with suppress(PermissionError):  # This user may not be allowed to search a directory in the path.
                if not os.path.samestat(os.stat("exe", dir_fd=process_fd), os.stat(executable)):
                    return None  # It runs in another mount namespace.
    except OSError:
        return None
    return Command(executable, words, directory, name)


def hides_processes(root: str = "/proc") -> bool:
    """
    Return whether the procfs at `root` hides processes from other users (hidepid in proc(5)).

    This is an option of the mount that this process sees. If the mounts cannot be read, the answer is True.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = file.read().splitlines()
    except OSError:
        return True
    place = os.fsencode(os.path.realpath(root))
    hides = False
    for line in mounts:
        mount, _, system = line.partition(b" - ")
        # The kernel writes a space in a path as \040; such a path does not match, and counts as not hidden.
        if mount.split()[4] == place:
            option = next((each for each in system.split()[-1].split(b",") if each.startswith(b"hidepid=")), b"")
            hides = option not in (b"", b"hidepid=0", b"hidepid=off")  # The last mount at a path is the visible one.
    return hides


def list_processes(root: str = "/proc") -> Iterator[ProcessEntry]:
    """Yield the processes that this user may sample, by ascending pid, without kernel threads."""
    try:
        pids = sorted(int(name) for name in os.listdir(root) if name.isdecimal())
    except OSError as error:
        raise UnsupportedError(f"cannot list {root}: {error.strerror}") from None
    if not pids:
        raise UnsupportedError(f"{root} is not a procfs; mount it or name another with --proc-root")
    boot_unix_ns = time.time_ns() - time.clock_gettime_ns(CLOCK_BOOTTIME)
    for pid in pids:
        try:
            directory = os.open(f"{root}/{pid}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            stat = parse_stat(read_file("stat", directory))
            pages = parse_statm(read_file("statm", directory))
            command = read_file("cmdline", directory)
            if not pages[0] and stat.thread_count > 1:
                pages, command = pages_of_sibling(directory)
            uids = parse_uids(read_file("status", directory))
        except (OSError, MalformedError):
            continue
        finally:
            os.close(directory)
        if stat.flags & PF_KTHREAD or (stat.state == "Z" and stat.thread_count <= 1):
            continue
        yield ProcessEntry(
            pid=pid,
            name=stat.name,
            names=_names(stat.name, command),
            parent=stat.parent,
            started_unix_ns=boot_unix_ns + stat.start_ticks * USER_TICK_NS,
            cpu_ns=(stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS,
            rss_bytes=pages[1] * PAGE_BYTES,
            thread_count=stat.thread_count,
            uids=uids,
        )


def pages_of_sibling(process_fd: int) -> tuple[tuple[int, int, int, int], bytes]:
    """
    Return pages in use and command line of a process with an exited main thread.

    Raises:
        OSError, MalformedError: its files cannot be read.
    """
    task = os.open("task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=process_fd)
    try:
        for tid in os.listdir(task):
            with suppress(FileNotFoundError, ProcessLookupError):
                pages = parse_statm(read_file(f"{tid}/statm", task))
                if pages[0]:
                    return pages, read_file(f"{tid}/cmdline", task)
    finally:
        os.close(task)
    raise ProcessLookupError


def _names(name: str, command: bytes) -> frozenset[str]:
    """
    Return the names that ``--name`` matches: of the main thread, of the program, and of the executed script.

    An interpreter executes a script, and has the path of the script among its first arguments. The kernel names the
    process after the script, cut to 15 bytes.
    """
    program, *arguments = command.split(b"\0", MAX_WORDS)
    names = {name, decode_name(os.path.basename(program))}
    for argument in arguments[: MAX_WORDS - 1]:
        script = os.path.basename(argument)
        if script and decode_name(script[:COMM_BYTES]) == name:
            names.add(decode_name(script))
    return frozenset(names - {""})
