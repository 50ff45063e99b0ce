"""Encode large JSON in pieces, because json.dumps holds the interpreter lock of the host program until it is done."""

import json
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["LockRelease", "to_json"]

PIECE = 2000
"""Values that one call of json.dumps encodes, in less than a millisecond."""


def to_json(value: Any) -> bytes:
    """
    Return `value` as compact ASCII JSON, equal to that of json.dumps.

    Other threads of the process get the interpreter lock between pieces. Keys of dicts must be text.
    """
    if _weight(value) <= PIECE:
        return _dumps(value).encode()
    parts: list[str] = []
    release = LockRelease()
    for part in _parts(value):
        parts.append(part)
        release()
    return "".join(parts).encode()


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _weight(value: Any) -> int:
    """Return the approximate number of values in `value`; more than `PIECE` are too many for one call of json.dumps."""
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value  # type: ignore[assignment]
    else:
        return 1
    weight = len(value)
    if weight <= PIECE:
        for each in inner:
            if isinstance(each, dict | list | tuple):
                weight += _weight(each)
                if weight > PIECE:
                    break
    return weight


def _parts(value: Any) -> Iterator[str]:
    if _weight(value) <= PIECE:
        yield _dumps(value)
    elif isinstance(value, dict):
        opening = "{"
        for key, each in value.items():
            yield f"{opening}{_dumps(key)}:"
            yield from _parts(each)
            opening = ","
        yield "}"
    else:
        opening = "["
        for piece in _slices(value):
            yield opening
            if len(piece) == 1:
                yield from _parts(piece[0])
            else:
                yield _dumps(piece)[1:-1]
            opening = ","
        yield "]"


def _slices(values: list[Any] | tuple[Any, ...]) -> Iterator[list[Any] | tuple[Any, ...]]:
    """Cut a list into slices of at most `PIECE` values together, or of one element that has more."""
    begin, weight = 0, 0
    for end, each in enumerate(values):
        more = _weight(each)
        if end > begin and weight + more > PIECE:
            yield values[begin:end]
            begin, weight = end, 0
        weight += more
    yield values[begin:]


HELD_NS = 1_000_000
"""Time after which `LockRelease` releases the interpreter lock, ns."""


class LockRelease:
    """
    Release the interpreter lock about once in a millisecond of work.

    A thread that waits for the lock forces a release only after sys.getswitchinterval() seconds, 5 ms by default, and
    not at all while a function in C runs.
    """

    def __init__(self) -> None:
        self._since_ns = time.monotonic_ns()

    def __call__(self) -> None:
        """Release the lock if the last release was more than a millisecond ago; call this between pieces of work."""
        if time.monotonic_ns() - self._since_ns > HELD_NS:
            time.sleep(0)  # On Linux this takes about 50 µs, in which a thread that waits for the lock takes it.
            self._since_ns = time.monotonic_ns()
