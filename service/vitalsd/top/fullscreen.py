"""Show the full screen: one thread reads the feed, the main thread handles keys and draws."""

import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

from rich.console import Console

from vitalsd.top.events import FeedEvent
from vitalsd.top.feed import Feed
from vitalsd.top.render import ASCII, BLOCKS, Glyphs, Renderer
from vitalsd.top.terminal import HangupError, Terminal
from vitalsd.top.view_state import View
from vitalsd.worker_thread import Worker, start_thread

__all__ = ["fits", "show"]


def fits() -> bool:
    """Return whether standard output is a terminal with cursor control."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def show(feed: Feed) -> int:
    """
    Show the feed until the user or a signal ends it.

    Returns:
        Number of the signal that ended it; 0 for none.

    Raises:
        SourceError, NoSidecarError, ExchangeError: there is no target at the start.
    """
    queued: queue.SimpleQueue[FeedEvent | BaseException | None] = queue.SimpleQueue()
    first = threading.Event()

    def read() -> None:
        last: BaseException | None = None
        try:
            for event in feed.events():
                queued.put(event)
                first.set()
                terminal.wake()
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that draws
            last = error
        queued.put(last)
        first.set()
        terminal.wake()

    console = Console(file=sys.stdout, force_terminal=True, highlight=False, markup=False, emoji=False)
    glyphs = BLOCKS if console.encoding.startswith("utf") else ASCII
    view = View()
    marker = Worker("vitalsd-marker")

    def mark(label: str) -> None:
        def set_mark() -> None:
            reason = feed.mark(label)
            view.message = f"not marked: {reason}" if reason else f"marked: {label}"
            terminal.wake()

        marker.submit(set_mark)

    view.mark = mark
    with _keyboard() as keyboard, closing(Terminal(keyboard, sys.stdout.fileno(), console)) as terminal:
        start_thread(threading.Thread(target=read, name="vitalsd-feed", daemon=True))
        try:
            # An error at the start must appear on the normal screen.
            first.wait()
            _take(queued, view)
            with terminal.taken():
                _run(view, glyphs, terminal, queued)
        except HangupError as hangup:
            return hangup.number
        finally:
            feed.stop()
            marker.stop(0)
    return 0


def _run(
    view: View, glyphs: Glyphs, terminal: Terminal, queued: "queue.SimpleQueue[FeedEvent | BaseException | None]"
) -> None:
    """Draw, and handle keys, until the user ends the view. Raises what the reading thread raised."""
    while True:
        _take(queued, view)
        width, height = terminal.size
        terminal.draw(Renderer(view, width, glyphs).lines(height))
        for key in terminal.wait(None):
            if not view.press(key):
                return


def _take(queued: "queue.SimpleQueue[FeedEvent | BaseException | None]", view: View) -> None:
    """Apply all queued events to the view; raise a queued exception."""
    while not queued.empty():
        event = queued.get()
        if isinstance(event, BaseException):
            raise event
        if event is not None:
            view.apply(event)


@contextmanager
def _keyboard() -> Iterator[int | None]:
    """Yield the descriptor of the keyboard: standard input if it is a terminal, else /dev/tty; None: there is none."""
    if sys.stdin is not None and sys.stdin.isatty():
        yield sys.stdin.fileno()
        return
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
