"""Allocate buffers that the kernel fills for many threads, in a layout that is read without a loop in Python."""

import ctypes
from ctypes import c_uint32
from itertools import repeat
from struct import Struct
from typing import Any, Literal

from vitalsd.sources.darwin.apple_headers import MAXTHREADNAMESIZE, thread_extended_info, thread_identifier_info
from vitalsd.sources.darwin.functions import MachError

__all__ = ["ThreadRows"]


class ThreadRows:
    """Buffers with one `thread_extended_info` or `proc_threadinfo` per thread; they are reused, and grow as needed."""

    _name = Struct(f"{thread_extended_info.pth_name.offset}x{MAXTHREADNAMESIZE}s")
    _info_count = ctypes.sizeof(thread_extended_info) // 4
    _id_count = ctypes.sizeof(thread_identifier_info) // 4

    def __init__(self) -> None:
        self._room = 0
        self.reserve(64)

    def reserve(self, number: int) -> None:
        """Make room for `number` threads; the present content may be lost."""
        if number > self._room:
            self._room = room = max(number, 2 * self._room)
            self._infos = (thread_extended_info * room)()
            self._ids = (thread_identifier_info * room)()
            self._info_counts = (c_uint32 * room)()
            self._id_counts = (c_uint32 * room)()
            self._asked = bytes((c_uint32 * room)(*repeat(self._info_count, room)))
            self._asked_ids = bytes((c_uint32 * room)(*repeat(self._id_count, room)))
            self.info_at = _addresses(self._infos)
            self.infos = _references(self._infos)
            self.info_counts = _references(self._info_counts)
            self.ids = _references(self._ids)
            self.id_counts = _references(self._id_counts)
        # The kernel overwrites the counts, with lower ones for a short reply.
        ctypes.memmove(self._info_counts, self._asked, 4 * number)
        ctypes.memmove(self._id_counts, self._asked_ids, 4 * number)

    def require_counts(self, number: int) -> None:
        """Raise `MachError` if a reply of ``thread_info`` for any of the first `number` threads was short."""
        for flavor, counts, asked in (
            ("THREAD_EXTENDED_INFO", self._info_counts, self._asked),
            ("THREAD_IDENTIFIER_INFO", self._id_counts, self._asked_ids),
        ):
            size = 4 * number
            if ctypes.string_at(counts, size) != asked[:size]:
                words = int.from_bytes(asked[:4], "little")
                raise MachError(f"thread_info({flavor}) answered {min(counts[:number])} words of {words}")

    def thread_ids(self, number: int) -> list[int]:
        """Return the ids of the first `number` threads."""
        ids: list[int] = memoryview(self._ids).cast("B").cast("Q")[: 3 * number : 3].tolist()
        return ids

    def user_ns(self, number: int) -> list[int]:
        """Return the user times of the first `number` threads, ns."""
        return self._column("Q", thread_extended_info.pth_user_time.offset // 8, number)

    def system_ns(self, number: int) -> list[int]:
        """Return the system times of the first `number` threads, ns."""
        return self._column("Q", thread_extended_info.pth_system_time.offset // 8, number)

    def run_states(self, number: int) -> list[int]:
        """Return the states of the first `number` threads, ``TH_STATE_*``."""
        return self._column("i", thread_extended_info.pth_run_state.offset // 4, number)

    def priorities(self, number: int) -> list[int]:
        """Return the current priorities of the first `number` threads."""
        return self._column("i", thread_extended_info.pth_curpri.offset // 4, number)

    def names(self, number: int) -> list[tuple[bytes]]:
        """Return the 64 bytes of each name, with padding, of the first `number` threads."""
        size = number * ctypes.sizeof(thread_extended_info)
        return list(self._name.iter_unpack(memoryview(self._infos).cast("B")[:size]))

    def _column(self, kind: Literal["Q", "i"], first: int, number: int) -> list[int]:
        step = ctypes.sizeof(thread_extended_info) // (8 if kind == "Q" else 4)
        view = memoryview(self._infos).cast("B").cast(kind)
        column: list[int] = view[first : first + step * number : step].tolist()
        return column


def _addresses(array: Any) -> list[int]:
    base, step = ctypes.addressof(array), ctypes.sizeof(array._type_)
    return list(range(base, base + step * len(array), step))


def _references(array: Any) -> list[Any]:
    """Return the result of `ctypes.byref` for each element."""
    return list(map(ctypes.byref, repeat(array), range(0, ctypes.sizeof(array), ctypes.sizeof(array._type_))))
