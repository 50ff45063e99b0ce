"""Our structs, constants and function table against Apple's headers and libSystem, for both kinds of Mac."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.darwin import abi
from vitalsd.sources.darwin import apple_headers
from vitalsd.sources.darwin.apple_headers import thread_extended_info
from vitalsd.sources.darwin.functions import DATA, FUNCTIONS, Function


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zig")


def claims(
    *,
    structs: Mapping[str, type[ctypes.Structure]] | None = None,
    constants: Mapping[str, int] | None = None,
    functions: Mapping[str, Function] | None = None,
) -> str:
    """All of our claims, with some replaced."""
    return abi.program(
        abi.structs(apple_headers) | dict(structs or {}),
        abi.constants(apple_headers) | dict(constants or {}),
        FUNCTIONS | dict(functions or {}),
        DATA,
    )


@pytest.mark.parametrize("target", abi.TARGETS)
class TestProof:
    def test_abi_claims_compile_and_link_against_apple_headers(self, target: str, tmp_path: Path, cache: Path) -> None:
        """Sizes, offsets, constants, prototypes compile against Apple's headers, and all symbols link."""
        compiled = abi.compile_claims(claims(), target, tmp_path, cache)
        assert (compiled.returncode, compiled.stderr) == (0, "")
        linked = abi.link(target, tmp_path, cache)
        assert (linked.returncode, linked.stderr) == (0, "")

    def test_abi_struct_with_a_wrong_offset_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """A struct with two fields exchanged, of the right size, does not compile."""

        class exchanged(ctypes.Structure):
            _fields_ = (
                thread_extended_info._fields_[1],
                thread_extended_info._fields_[0],
                *thread_extended_info._fields_[2:],
            )

        assert ctypes.sizeof(exchanged) == ctypes.sizeof(thread_extended_info)
        compiled = abi.compile_claims(claims(structs={"thread_extended_info": exchanged}), target, tmp_path, cache)
        assert compiled.returncode != 0
        assert "offsetof(struct thread_extended_info, pth_user_time) is 8" in compiled.stderr

    def test_abi_wrong_constant_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """A flavor that is off by one does not compile."""
        compiled = abi.compile_claims(claims(constants={"THREAD_EXTENDED_INFO": 6}), target, tmp_path, cache)
        assert compiled.returncode != 0
        assert "THREAD_EXTENDED_INFO is 6" in compiled.stderr

    def test_abi_nested_struct_with_a_shorter_path_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """Plant a wrong size inside: the inner struct and the offsets of the outer one do not compile."""

        class shorter(ctypes.Structure):
            _fields_ = (
                ("vip_vi", apple_headers.vnode_info),
                ("vip_path", ctypes.c_char * (apple_headers.MAXPATHLEN - 8)),
            )

        class outer(ctypes.Structure):
            _fields_ = (("pvi_cdir", shorter), ("pvi_rdir", shorter))

        compiled = abi.compile_claims(
            claims(structs={"vnode_info_path": shorter, "proc_vnodepathinfo": outer}), target, tmp_path, cache
        )
        assert compiled.returncode != 0
        assert "sizeof(((struct vnode_info_path *)0)->vip_path) is 1016" in compiled.stderr
        assert "offsetof(struct proc_vnodepathinfo, pvi_rdir) is 1168" in compiled.stderr

    def test_abi_older_revision_with_exchanged_fields_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """Of a struct that Apple has extended: its size is that of the revision, and its fields are at their places."""
        fields = list(apple_headers.vm_statistics64._fields_)
        at = [name for name, _ in fields].index("external_page_count")
        fields[at], fields[at + 1] = fields[at + 1], fields[at]

        class exchanged(ctypes.Structure):
            _fields_ = tuple(fields)

        compiled = abi.compile_claims(claims(structs={"vm_statistics64": exchanged}), target, tmp_path, cache)
        assert compiled.returncode != 0
        assert "offsetof(struct vm_statistics64, internal_page_count) is 136" in compiled.stderr

    def test_abi_private_struct_with_a_wrong_offset_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """Structs that are not in the SDK are held to the definition retyped from the reference."""

        class narrower(ctypes.Structure):
            _fields_ = tuple(
                (name, ctypes.c_uint32 if name == "p_uniqueid" else type_)
                for name, type_ in apple_headers.proc_uniqidentifierinfo._fields_
            )

        compiled = abi.compile_claims(claims(structs={"proc_uniqidentifierinfo": narrower}), target, tmp_path, cache)
        assert compiled.returncode != 0
        assert "proc_uniqidentifierinfo" in compiled.stderr

    def test_abi_address_passed_as_32_bits_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """An address passed as 32 bits does not compile."""
        right = FUNCTIONS["vm_deallocate"]
        wrong = right._replace(argtypes=(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_size_t))
        compiled = abi.compile_claims(claims(functions={"vm_deallocate": wrong}), target, tmp_path, cache)
        assert compiled.returncode != 0
        assert "sizeof(vm_address_t) is 4" in compiled.stderr

    def test_abi_prototype_that_differs_from_the_header_fails(self, target: str, tmp_path: Path, cache: Path) -> None:
        """The header and we have to agree on every parameter."""
        right = FUNCTIONS["proc_pid_rusage"]
        wrong = right._replace(prototype="int proc_pid_rusage(int, unsigned int, rusage_info_t *)")
        compiled = abi.compile_claims(claims(functions={"proc_pid_rusage": wrong}), target, tmp_path, cache)
        assert compiled.returncode != 0
        assert "conflicting types for 'proc_pid_rusage'" in compiled.stderr

    def test_abi_symbol_that_libsystem_lacks_fails_to_link(self, target: str, tmp_path: Path, cache: Path) -> None:
        """It compiles by our own prototype, and does not link."""
        absent = Function("int proc_pid_vitals(int)", ctypes.c_int, (ctypes.c_int,), "errno")
        compiled = abi.compile_claims(claims(functions={"proc_pid_vitals": absent}), target, tmp_path, cache)
        assert (compiled.returncode, compiled.stderr) == (0, "")
        linked = abi.link(target, tmp_path, cache)
        assert linked.returncode != 0
        assert "_proc_pid_vitals" in linked.stderr


def test_abi_claims_cover_every_struct_and_constant() -> None:
    """Whatever the headers module defines is claimed."""
    found = {*abi.structs(apple_headers), *abi.constants(apple_headers)}
    imported = {"Structure", "c_char", "c_int32", "c_int64", "c_uint16", "c_uint32", "c_uint64", "c_uint8"}
    assert {name for name in vars(apple_headers) if not name.startswith("_")} == found | imported
