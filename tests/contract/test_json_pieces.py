"""JSON in pieces: the bytes of json.dumps, and the interpreter lock released between them."""

import json
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalsd.contract import json_pieces as encoding
from vitalsd.contract.json_pieces import to_json

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=4), inner, max_size=5)
)


@given(values, st.integers(1, 12))
def test_json_pieces_of_any_value_equal_json_dumps(value: Any, piece: int) -> None:
    """However small the pieces are."""
    whole = encoding.PIECE
    encoding.PIECE = piece
    try:
        assert to_json(value) == json.dumps(value, separators=(",", ":")).encode()
    finally:
        encoding.PIECE = whole


@pytest.mark.parametrize(
    "value",
    [
        [1.5] * 10_001,
        {"threads": [{"tid": i, "name": "x" * 15, "cpu_percent": [0.125] * 3000} for i in range(20)]},
        {"threads": [{"tid": i, "state": None, "name": "ü"} for i in range(5000)], "empty": [], "none": {}},
        [[]] * 3000,
        (1, 2, 3) * 1000,
    ],
)
def test_json_pieces_of_a_large_value_equal_json_dumps(value: Any) -> None:
    """Tables and lists of threads."""
    assert to_json(value) == json.dumps(value, separators=(",", ":")).encode()


def test_json_pieces_of_a_large_value_let_other_threads_run() -> None:
    """Although the switch interval is longer than the whole, a waiting thread gets the lock often."""
    table = {"threads": [{"tid": i, "cpu_percent": [0.125] * 5000} for i in range(100)]}
    interval = sys.getswitchinterval()
    done = threading.Event()
    turns = 0

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    try:
        sys.setswitchinterval(60)
        thread.start()
        time.sleep(0.01)
        before = turns
        to_json(table)
        during = turns - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert during >= 50
