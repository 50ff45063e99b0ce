"""Replay a tape of `vitalsd doctor --tape` in place of libSystem, without a kernel."""

import ctypes
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from ctypes import c_size_t, c_uint32
from typing import Any

from vitalsd.sources.darwin.apple_headers import CPU_STATE_MAX
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.tape import ARGUMENTS, FORMAT

__all__ = ["EndOfTapeError", "TapePlayer"]


class EndOfTapeError(Exception):
    """Report that the tape has no more replies to a call."""


class TapePlayer:
    """
    Replay the replies of a tape.

    Each call gets the next reply to the same function with the same arguments; ports and pids are those of the tape.

    Args:
        lines: lines of the tape.

    Raises:
        ValueError: it is no tape, or one of another format.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.head, *calls = map(json.loads, lines)
        if self.head.get("tape") != FORMAT:
            raise ValueError(f"this is no tape of format {FORMAT}")
        self.pid = int(self.head["pid"])
        self._replies: defaultdict[tuple[Any, ...], deque[dict[str, Any]]] = defaultdict(deque)
        self._arrays: dict[int, Any] = {}
        self._functions: dict[str, _Played] = {}
        self.calls = [call for call in calls if "call" in call]
        for call in self.calls:
            self._replies[call["call"], *call["args"]].append(call)

    def lib(self) -> LibSystem:
        """Return the library that plays the tape."""
        return LibSystem(self, self, c_uint32(0x103))

    def left(self, name: str) -> int:
        """Return how many replies of a function are still on the tape."""
        return sum(len(replies) for (function, *_), replies in self._replies.items() if function == name)

    def __getattr__(self, name: str) -> "_Played":
        """Return a function of the tape by attribute, as of a ctypes library."""
        if name not in ARGUMENTS:
            raise AttributeError(name)
        return self._functions.setdefault(name, _Played(self, name))

    def __getitem__(self, name: str) -> "_Played":
        """Return a new object of a function of the tape, as of a ctypes library."""
        return _Played(self, name)

    def play(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Replay the next reply: fill the buffers, set errno, return the result."""
        key: tuple[Any, ...] = tuple(int(getattr(arguments[i], "value", arguments[i])) for i in ARGUMENTS[name])
        if name == "sysctlbyname":
            key = (arguments[0].decode("ascii"),)
        elif name == "sysctl":
            key = tuple((ctypes.c_int * 3).from_address(arguments[0])[:])
        replies = self._replies[name, *key]
        if not replies:
            raise EndOfTapeError(f"{name}{key}")
        call = replies.popleft()
        self._fill(name, arguments, [bytes.fromhex(reply) for reply in call["reply"]])
        ctypes.set_errno(call["errno"])
        result = call["result"]
        return result.encode() if isinstance(result, str) else result

    def _fill(self, name: str, arguments: tuple[Any, ...], replies: list[bytes]) -> None:
        if not replies:
            return
        (reply,) = replies
        size = len(reply)
        match name:
            case "task_threads" | "host_processor_info":
                array = ctypes.create_string_buffer(reply, size)
                self._arrays[ctypes.addressof(array)] = array
                *_, pointer, count = arguments
                c_size_t.from_address(_address(pointer)).value = ctypes.addressof(array)
                c_uint32.from_address(_address(count)).value = size // 4
                if name == "host_processor_info":
                    c_uint32.from_address(_address(arguments[2])).value = size // 4 // CPU_STATE_MAX
                return
            case "task_info" | "thread_info" | "host_statistics64":
                c_uint32.from_address(_address(arguments[3])).value = size // 4
                buffer = arguments[2]
            case "proc_pidinfo" | "mach_port_get_refs":
                buffer = arguments[3]
            case "sysctl":
                c_size_t.from_address(_address(arguments[3])).value = size
                buffer = arguments[2]
            case "sysctlbyname":
                c_size_t.from_address(_address(arguments[2])).value = size
                buffer = arguments[1]
            case "proc_pid_rusage":
                buffer = arguments[2]
            case "mach_port_space_basic_info" | "proc_listchildpids":
                buffer = arguments[1]
            case _:  # mach_timebase_info, proc_listallpids, gethostuuid
                buffer = arguments[0]
        ctypes.memmove(_address(buffer), reply, size)


class _Played:
    """Stand in for a ctypes function, with the replies of the tape."""

    def __init__(self, player: TapePlayer, name: str) -> None:
        self._player = player
        self.__name__ = name
        self.restype: Any = None
        self.argtypes: Any = None
        self.errcheck: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        result = self._player.play(self.__name__, arguments)
        return result if self.errcheck is None else self.errcheck(result, self, arguments)


def _address(argument: Any) -> int:
    return argument if isinstance(argument, int) else ctypes.cast(argument, ctypes.c_void_p).value or 0
