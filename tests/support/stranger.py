"""
Read processes as another user, optionally on a /proc that is mounted with hidepid.

``stranger.py HIDEPID snapshots PID`` takes one snapshot per line of stdin, which may name its parts, and prints the
result;
``stranger.py HIDEPID serve ...`` is ``vitalsd serve ...``. Has to be started by root.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

from vitalsd.cli import main
from vitalsd.snapshot import Part
from vitalsd.sources.base import SourceError
from vitalsd.sources.linux.procfs import parse_stat
from vitalsd.sources.linux.source import LinuxSource
from vitalsd.sources.programs import ProgramDigest

NOBODY_UID = 65534
CLONE_NEWNS = 0x00020000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 1 << 18  # linux/mount.h
PR_SET_KEEPCAPS = 8  # linux/prctl.h
CAP_DAC_READ_SEARCH = 2  # linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522


def mount_proc(hidepid: int) -> None:
    """Mount a private /proc: hidepid is an option of the mount, and the mount of other processes must not change."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=%d" % hidepid),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become_nobody(*, keep_reading_files: bool) -> None:
    """Become another user; optionally keep access to the files of an interpreter that is installed below /root."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, int(keep_reading_files), 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY_UID)
    os.setuid(NOBODY_UID)
    if keep_reading_files:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        bits = 1 << CAP_DAC_READ_SEARCH
        data = (ctypes.c_uint32 * 6)(bits, bits, 0, 0, 0, 0)
        if libc.capset(header, data):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def addresses(pid: int) -> int:
    """Return how many addresses the kernel shows of the program of a process; 0 if it hides the process."""
    try:
        return len(parse_stat(Path(f"/proc/{pid}/stat").read_bytes()).image)
    except FileNotFoundError:
        return 0


def snapshots(pid: int) -> None:
    """Take a snapshot per line of standard input, and print the result of each."""
    try:
        source = LinuxSource(pid, program_of=ProgramDigest(b"k" * 32))
        for line in sys.stdin:
            taken = source.snapshot(parts=Part[line.strip() or "DETAIL"])
            assert taken.figures is not None
            answer = {
                "tids": taken.roster.tids,
                "rss_bytes": taken.rss_bytes,
                "image": taken.image,
                "state": taken.state,
                "program": source.identity().program,
                "addresses": addresses(pid),
                "cpu_ns": taken.cpu_ns,
                "open_fds": taken.figures.open_fds,
                "anonymous_bytes": taken.figures.anonymous_bytes,
                "reaped_ns": taken.figures.reaped_ns,
                "warnings": taken.warnings,
            }
            print(json.dumps(answer), flush=True)
    except SourceError as error:
        print(json.dumps({"error": type(error).__name__, "reason": str(error)}), flush=True)


if __name__ == "__main__":
    if int(sys.argv[1]):
        mount_proc(int(sys.argv[1]))
    if sys.argv[2] == "snapshots":
        # Loads what Python loads late, while it may still be read.
        LinuxSource().close()
        become_nobody(keep_reading_files=False)
        snapshots(int(sys.argv[3]))
    else:
        become_nobody(keep_reading_files=True)
        main(sys.argv[2:])
