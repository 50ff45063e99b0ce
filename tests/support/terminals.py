"""Run a program in a pseudo-terminal, and read what its screen shows."""

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

import pyte

__all__ = ["PseudoTerminal"]

# The terminal becomes the controlling one, so that Ctrl-C, Ctrl-Z and a new size are signals.
LEADER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class PseudoTerminal:
    """Run `command` in a terminal of its own; a context manager that ends it. `raw` is its whole output."""

    def __init__(
        self, command: Sequence[str], *, columns: int = 80, rows: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._master, slave = os.openpty()
        self._size(columns, rows)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={"TERM": "xterm-256color", "LANG": "C.UTF-8", "PATH": os.environ["PATH"], **(env or {})},
        )
        os.close(slave)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal, cells."""
        self._screen.resize(rows, columns)
        self._screen.reset()
        self._size(columns, rows)

    def press(self, keys: str) -> None:
        """Type keys."""
        os.write(self._master, keys.encode())

    def modes(self) -> list[object]:
        """Return the modes of the terminal: echo, canonical input, and so on."""
        return termios.tcgetattr(self._master)

    @property
    def lines(self) -> list[str]:
        """Return the lines of the screen."""
        return list(self._screen.display)

    @property
    def text(self) -> str:
        """Return the text of the screen, without trailing spaces."""
        return "\n".join(line.rstrip() for line in self.lines)

    def until(self, seen: Callable[[str], object], timeout_s: float = 20) -> str:
        """Read until `seen` is true of the text on the screen."""
        deadline = time.monotonic() + timeout_s
        while not seen(self.text):
            left = deadline - time.monotonic()
            assert left > 0, f"it was never seen; the screen is\n{self.text}"
            assert self._read(left) or seen(self.text), f"the program has ended; the screen is\n{self.text}"
        return self.text

    def _read(self, timeout_s: float) -> bool:
        """Read new output; return False at its end."""
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if not ready:
            return True
        data = b""
        with suppress(OSError):  # EIO: everybody at the other end has left
            data = os.read(self._master, 65536)
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def end(self, timeout_s: float = 15) -> int:
        """Wait for the end of the program, and return its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._read(max(0.0, deadline - time.monotonic())) and time.monotonic() < deadline:
            pass
        return self.process.wait(30)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Close the terminal: the kernel sends SIGHUP to every process in it."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def __enter__(self) -> "PseudoTerminal":
        """Return the running program."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the program and close the terminal."""
        self.process.kill()
        self.process.wait()
        self.close()
