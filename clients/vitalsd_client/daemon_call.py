"""Run a call that may hang on a daemon thread, and wait for it for a limited time."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from vitalsd.worker_thread import start_thread

__all__ = ["Call", "start_call"]

T = TypeVar("T")


class Call(Generic[T]):
    """
    Run `work` on a daemon thread of its own, which is abandoned if the wait ends first.

    An executor would not do: the interpreter joins its threads at exit, so a hung call would hang the exit of the
    host program.

    Args:
        work: `result` returns or raises what it returns or raises.
        done: called on that thread after `work`.

    Raises:
        RuntimeError: no thread can be started, as at the end of the interpreter.
    """

    def __init__(self, work: Callable[[], T], done: Callable[[], None] | None = None) -> None:
        self._work = work
        self._done = done
        self._over = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None
        start_thread(threading.Thread(target=self._run, name="vitalsd-client", daemon=True))

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`; return whether the call has ended."""
        return self._over.wait(max(0.0, seconds))

    def result(self) -> T:
        """Return what the call returned, or raise what it raised; only after `wait` has returned True."""
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error
        finally:
            self._over.set()
            if self._done is not None:
                self._done()


def start_call(work: Callable[[], T]) -> Call[T] | None:
    """Start a call and return it; ``None``: no thread can be started, as at the end of the interpreter."""
    try:
        return Call(work)
    except RuntimeError:
        return None
