"""
Use the terminal as a full screen: enter it, restore the terminal at every exit, and enter it again after a stop.

A signal handler only writes a byte to a socket pair (self-pipe); `Terminal.wait` handles the signal, so no signal
interrupts an escape sequence.
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
"""Time after which a single ESC is the key and not the start of a sequence, s."""
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
    """Report that the view has to end: by the signal `number`, or because the terminal is closed (0)."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def keys(typed: str) -> tuple[list[str], str]:
    """
    Return the keys in the typed characters, and the rest, which may be the start of a sequence.

    A key is a printable character or a word such as ``up``, ``enter``, ``escape``. Unknown sequences are discarded
    whole, so that none of their characters counts as a command.
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
    """Return the length of the sequence at the start of `typed`; 0 if more of it may follow, 1 if it is only ESC."""
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
    Read keys from a terminal and draw on it, within the context of `taken`.

    Args:
        keyboard: descriptor of the terminal to read keys from; ``None``: there is none.
        screen: descriptor of the terminal to draw on.
        console: writes to `screen`.
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
        """Use the full screen during the context, and restore the terminal after it; main thread only."""
        for end in (self._reader, self._writer):
            end.setblocking(False)

        def nothing(number: int, frame: FrameType | None) -> None:
            """Do nothing: `signal.set_wakeup_fd` writes the byte."""

        # A signal that is ignored at the start, as under nohup, stays ignored.
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
        """Close the socket pair; `wake` may still be called."""
        self._reader.close()
        self._writer.close()

    def wake(self) -> None:
        """Make `wait` return. May be called on any thread."""
        with suppress(OSError):  # If it is full, `wait` returns anyway; if it is closed, no thread waits.
            self._writer.send(b"\0")

    def wait(self, timeout_s: float | None) -> list[str]:
        """
        Wait for keys, `wake` or the timeout, and return the pressed keys.

        Raises:
            HangupError: a signal ends the view, or the terminal is closed.
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
        """Draw as many lines as the terminal has rows. Raises `HangupError`: the terminal is closed."""
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
        """Restore the terminal, stop the process by SIGTSTP, and enter the full screen after SIGCONT."""
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
