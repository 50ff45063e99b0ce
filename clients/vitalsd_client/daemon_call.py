"""Run a call that may hang on a daemon thread, and wait for it for a limited time."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from vitalsd.worker_thread import start_thread

__all__ = ["Call", "start_call"]

T = TypeVar("T")


class Call(Generic[T]):
    """
    `work` on a daemon thread of its own, which is left behind at the end of the wait.

    Not an executor: those are joined when the interpreter exits, and a hung call would hang the exit
    of the host program.

    Args:
        work: what it returns or raises is what `result` returns or raises.
        done: called on that thread when it is over.

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
        """Whether it is over, after at most so long."""
        return self._over.wait(max(0.0, seconds))

    def result(self) -> T:
        """What the call returned. Raises what it raised; only once it is over."""
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # noqa: BLE001 - handed on by `result`
            self._error = error
        finally:
            self._over.set()
            if self._done is not None:
                self._done()


def start_call(work: Callable[[], T]) -> Call[T] | None:
    """Return the call; ``None`` where no thread can be started, as at the end of the interpreter."""
    try:
        return Call(work)
    except RuntimeError:
        return None
