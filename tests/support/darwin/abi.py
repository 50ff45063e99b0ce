"""
Prove the ABI: translate the claims of `vitalsd` about Apple's structs, constants and functions to a C program.

Each claim becomes a ``_Static_assert`` or a redeclaration, compiled against the headers of Apple that
come with the ``ziglang`` wheel; the linker then looks for every symbol in libSystem.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from ctypes import Structure
from pathlib import Path
from types import ModuleType
from typing import Any

from vitalsd.sources.darwin.functions import Function

__all__ = ["PRIVATE", "TARGETS", "compile_claims", "link", "program", "zig"]

TARGETS = ("aarch64-macos", "x86_64-macos")

HEADERS = """\
#include <libproc.h>
#include <limits.h>
#include <mach/mach.h>
#include <mach/mach_time.h>
#include <mach_debug/ipc_info.h>
#include <stddef.h>
#include <sys/proc.h>
#include <sys/proc_info.h>
#include <sys/resource.h>
#include <sys/sysctl.h>
#include <unistd.h>
"""

PRIVATE = """\
/* bsd/sys/proc_info_private.h of xnu-11417, retyped from the reference (sections 3): not in the SDK. */
#define PROC_PIDUNIQIDENTIFIERINFO 17
#define PROC_PIDLISTTHREADIDS 28
struct proc_uniqidentifierinfo {
    uint8_t p_uuid[16];
    uint64_t p_uniqueid;
    uint64_t p_puniqueid;
    int32_t p_idversion;
    int32_t p_orig_ppidversion;
    uint64_t p_reserve2;
    uint64_t p_reserve3;
};
"""

REVISIONS = {"task_vm_info": "TASK_VM_INFO_REV1_COUNT * 4", "vm_statistics64": "HOST_VM_INFO64_REV1_COUNT * 4"}
"""Structs with several revisions: the C expression for the size of the declared one."""


def structs(headers: ModuleType) -> dict[str, type[Structure]]:
    found = {}
    for name, value in vars(headers).items():
        if isinstance(value, type) and issubclass(value, Structure) and value is not Structure:
            found[name] = value
    return found


def constants(headers: ModuleType) -> dict[str, int]:
    return {name: value for name, value in vars(headers).items() if name.isupper() and isinstance(value, int)}


def program(
    structs: Mapping[str, type[Structure]],
    constants: Mapping[str, int],
    functions: Mapping[str, Function],
    data: Mapping[str, Any],
) -> str:
    """Return the C program that compiles and links if, and only if, every claim holds."""
    lines = [HEADERS, PRIVATE]

    def claim(expression: str, value: int) -> None:
        lines.append(f'_Static_assert((unsigned long long)({expression}) == {value}ULL, "{expression} is {value}");')

    for name, value in constants.items():
        claim(name, value)
    for name, struct in structs.items():
        claim(REVISIONS.get(name, f"sizeof(struct {name})"), ctypes.sizeof(struct))
        for field in struct._fields_:
            descriptor = getattr(struct, field[0])
            claim(f"offsetof(struct {name}, {field[0]})", descriptor.offset)
            claim(f"sizeof(((struct {name} *)0)->{field[0]})", descriptor.size)
    for function in functions.values():
        result, _, parameters = function.prototype.partition("(")
        lines.append(f"extern {function.prototype};")
        types = [] if parameters == "void)" else parameters.removesuffix(")").split(", ")
        assert len(types) == len(function.argtypes), function.prototype
        for type_, argtype in zip(types, function.argtypes, strict=True):
            claim(f"sizeof({type_})", ctypes.sizeof(argtype))
        returned = result.rpartition(" ")[0] + (" *" if result.rpartition(" ")[2].startswith("*") else "")
        claim(f"sizeof({returned})", ctypes.sizeof(function.restype))
    for name, type_ in data.items():
        claim(f"sizeof({name})", ctypes.sizeof(type_))
    symbols = ", ".join(f"(const void *)&{name}" for name in (*functions, *data))
    lines.append(f"const void *const volatile symbols[] = {{{symbols}}};")
    lines.append("int main(void) { return symbols[0] == 0; }")
    return "\n".join(lines) + "\n"


def zig(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the compiler of the ``ziglang`` wheel, which keeps what it builds below `cache`."""
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "ziglang", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def compile_claims(source: str, target: str, directory: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Compile to ``claims.o`` in `directory`; fails if an assertion does."""
    path = directory / "claims.c"
    path.write_text(source, encoding="utf-8")
    return zig(
        "cc", "-target", target, "-std=c11", "-Wall", "-Werror", "-fno-sanitize=undefined",
        "-c", path, "-o", directory / "claims.o", cache=cache,
    )  # fmt: skip


def link(target: str, directory: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Link ``claims.o`` with libSystem; fails if a symbol is not there."""
    return zig(
        "build-exe", "-target", target, "-fno-compiler-rt", "-fno-ubsan-rt", "-lc", directory / "claims.o",
        f"-femit-bin={directory / 'claims'}", cache=cache,
    )  # fmt: skip
