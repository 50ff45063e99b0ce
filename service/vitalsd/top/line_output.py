"""Write a line for each sample, for pipes, files and logs."""

import json
import time
from collections.abc import Callable
from itertools import islice

from vitalsd.text import printable
from vitalsd.top.events import Ended, Hangs, Interrupted, Note, Sample
from vitalsd.top.feed import Feed

__all__ = ["lines"]

BUSIEST = 5
"""Threads in a line, busiest first."""
HEAD = f"{'TIME':8}  {'CPU%':>6}  {'RSS_KB':>9}  {'THREADS':>7}  BUSIEST"


def lines(
    feed: Feed, *, count: int | None, as_json: bool, say: Callable[[str], None], note: Callable[[str], None]
) -> bool:
    """
    Write a heading and a line for each sample, or the answers as JSON; return whether there were enough samples.

    Args:
        feed: yields the samples, marks and events.
        count: number of samples after which to end; ``None``: end when the target exits.
        as_json: write each answer of ``/metrics`` instead of a line.
        say: writes a line.
        note: writes a mark or an event; escapes and truncates its text.

    Returns:
        False if the target exited before `count` samples, or before the first one.

    Raises:
        SourceError, NoSidecarError, ExchangeError: there is no target at the start.
    """
    count_written, last = 0, ""
    lasting = set[tuple[int, str]]()
    for event in feed.events():
        match event:
            case Sample():
                if as_json:
                    say(_ascii(event.body))
                else:
                    if count_written == 0:
                        say(HEAD)
                    say(_line(event))
                count_written += 1
                if count_written == count:
                    break
            case Note():
                note(f"{_clock(event.wall_ms)} {event.kind}: {event.text}")
            case Hangs():  # one that is over is a note
                now = {(hang.wall_ms, hang.heartbeat): hang for hang in event.hangs if hang.ongoing}
                for key in now.keys() - lasting:
                    note(f"{_clock(now[key].wall_ms)} hang, ongoing: {now[key].text}")
                lasting = set(now)
            case Interrupted() | Ended() if event.reason != last:
                last = event.reason
                note(last)
    return count_written >= (count or 1)


def _ascii(body: bytes) -> str:
    """Return an answer as one line of ASCII: one of another server may have line ends and C1 control characters."""
    text = body.decode()
    return text if text.isascii() and text.isprintable() else json.dumps(json.loads(text))


def _line(sample: Sample) -> str:
    process, threads = sample.metrics.process, sample.metrics.threads
    busy = sorted(((each.cpu_percent or 0.0, -each.tid, each.name) for each in threads), reverse=True)
    shown = " ".join(
        f"{printable(name) or -tid}={percent:.1f}" for percent, tid, name in islice(busy, BUSIEST) if percent >= 0.05
    )
    return (
        f"{_clock(sample.wall_ms)}  {process.cpu_percent:>6.1f}  {process.rss_kb:>9}  {len(threads):>7}  {shown}"
    ).rstrip()


def _clock(wall_ms: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(wall_ms / 1000))
