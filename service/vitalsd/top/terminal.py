"""
The terminal as a full screen: taken, given back on every way out, taken again after a stop.

Signals only leave a byte in a pipe; all that follows from them happens in `Terminal.wait`, so no escape
sequence is ever cut in half by one.
"""

import codecs
import os
import select
import signal
import socket
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.text import Text

__all__ = ["HangupError", "Terminal", "keys"]

ESCAPE_S = 0.05
"""After this a lone ESC is the key and not the begin of a sequence."""
ENDING = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
CONTROL = {
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x15": "clear",
}
SEQUENCES = {
    "[A": "up",
    "[B": "down",
    "OA": "up",
    "OB": "down",
    "[5~": "pageup",
    "[6~": "pagedown",
    "[H": "home",
    "[F": "end",
    "OH": "home",
    "OF": "end",
    "[1~": "home",
    "[4~": "end",
    "[7~": "home",
    "[8~": "end",
}


class HangupError(Exception):
    """The view is to end: by the signal `number`, or because the terminal is gone (0)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def keys(typed: str) -> tuple[list[str], str]:
    """
    Return the keys in what was typed, and the rest, which may be the begin of one.

    A key is a printable character or a word like ``up``, ``enter``, ``escape``. Sequences that mean
    nothing here are swallowed whole, so none of their characters passes for a command.
    """
    found: list[str] = []
    while typed:
        if typed[0] != "\x1b":
            key = CONTROL.get(typed[0], typed[0])
            if len(key) > 1 or key.isprintable():
                found.append(key)
            typed = typed[1:]
            continue
        end = _sequence_end(typed)
        if end == 0:
            break
        if end == 1:
            found.append("escape")
        elif (key := SEQUENCES.get(typed[1:end], "")) != "":
            found.append(key)
        typed = typed[end:]
    return found, typed


def _sequence_end(typed: str) -> int:
    """How long the sequence at the begin of `typed` is; 0 if more of it may follow, 1 if it is just ESC."""
    if len(typed) < 2:
        return 0
    if typed[1] == "O":
        return 3 if len(typed) >= 3 else 0
    if typed[1] != "[":
        return 1
    for position in range(2, len(typed)):
        if "@" <= typed[position] <= "~":  # ECMA-48: the final byte of a control sequence
            return position + 1
    return 0 if len(typed) < 32 else len(typed)


class Terminal:
    """
    The terminal in use, between `taken` and its end.

    Args:
        keyboard: descriptor of the terminal that keys come from; ``None`` if there is none.
        screen: descriptor of the terminal that is written to.
        console: writes to it.
    """

    def __init__(self, keyboard: int | None, screen: int, console: Console) -> None:
        self._keyboard = keyboard
        self._screen = screen
        self._console = console
        self._saved: list[Any] | None = None
        self._reader, self._writer = socket.socketpair()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._typed = ""
        self.size = (80, 24)

    @contextmanager
    def taken(self) -> Iterator["Terminal"]:
        """Full screen for as long as the context lasts. To be used on the main thread."""
        for end in (self._reader, self._writer):
            end.setblocking(False)

        def nothing(number: int, frame: FrameType | None) -> None:
            """The byte in the pipe is all."""

        # A signal that was ignored at the start (nohup) stays ignored.
        caught = [
            number
            for number in (*ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
            if signal.getsignal(number) is not signal.SIG_IGN
        ]
        before = {number: signal.signal(number, nothing) for number in caught}
        wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        try:
            self._enter()
            yield self
        finally:
            self._leave()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Release what it holds; `wake` may still be called."""
        self._reader.close()
        self._writer.close()

    def wake(self) -> None:
        """Let `wait` return; from any thread."""
        with suppress(OSError):  # Full: `wait` returns anyway. Closed: no thread waits.
            self._writer.send(b"\0")

    def wait(self, timeout_s: float | None) -> list[str]:
        """
        Return the keys that were pressed, once there are any, `wake` was called, or the time is over.

        Raises:
            HangupError: a signal asks for the end, or the terminal is gone.
        """
        sources: list[Any] = [self._reader] if self._keyboard is None else [self._reader, self._keyboard]
        ready, _, _ = select.select(sources, [], [], ESCAPE_S if self._typed else timeout_s)
        if self._reader in ready:
            self._obey(self._reader.recv(4096))
        if self._keyboard in ready:
            self._typed += self._decoder.decode(self._read())
        elif self._typed and not ready:
            self._typed = ""
            return ["escape"]
        found, self._typed = keys(self._typed)
        return found

    def draw(self, lines: Sequence[Text]) -> None:
        """Show as many lines as there are rows. Raises `HangupError`: the terminal is gone."""
        try:
            self._console.update_screen(Group(*lines))
        except OSError:
            raise HangupError(0) from None

    def _read(self) -> bytes:
        assert self._keyboard is not None
        try:
            data = os.read(self._keyboard, 4096)
        except OSError:
            data = b""
        if not data:
            raise HangupError(0)
        return data

    def _obey(self, numbers: bytes) -> None:
        for number in numbers:
            if number in ENDING:
                raise HangupError(number)
            if number == signal.SIGTSTP:
                self._stop()
            elif number == signal.SIGCONT:
                self._enter()
        self._measure()

    def _stop(self) -> None:
        """Give the terminal back, stop as any program would, and take it again when it is continued."""
        self._leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self._enter()

    def _measure(self) -> None:
        with suppress(OSError):
            columns, rows = os.get_terminal_size(self._screen)
            self.size = (columns or 80, rows or 24)
        self._console.size = self.size

    def _enter(self) -> None:
        if self._keyboard is not None:
            with suppress(termios.error):
                mode = termios.tcgetattr(self._keyboard)
                if self._saved is None:
                    self._saved = [*mode[:6], list(mode[6])]
                # Key by key, without echo; Ctrl-C and Ctrl-Z still make signals. Ctrl-S would stop the view unseen.
                mode[0] &= ~termios.IXON
                mode[3] &= ~(termios.ECHO | termios.ICANON)
                mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
                termios.tcsetattr(self._keyboard, termios.TCSADRAIN, mode)
        self._measure()
        with suppress(OSError):
            self._console.set_alt_screen(True)
            self._console.show_cursor(False)

    def _leave(self) -> None:
        with suppress(OSError):
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
        if self._keyboard is not None and self._saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._saved)
            self._saved = None
