"""The live view as a person has it: in a real pseudo-terminal, over real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from support.beating import BeatingClient
from support.serving import Serving
from support.sidecars import ask, environment, eventually, serving
from support.snapshots import FIGURES, IDENTITY, SECOND, roster, snapshot, with_extras
from support.snapshots import MACHINE as MACHINE_FIGURES
from support.target import Target
from support.terminals import PseudoTerminal
from support.tools import program
from vitalsd.cli import main
from vitalsd.contract.encoding import encode
from vitalsd.contract.metrics import FullMetrics, Measured, ProcessMetrics, ThreadMetrics, parse_runtime_metrics
from vitalsd.snapshot import measure
from vitalsd.top.events import Ended, HangNote, Hangs, InitialHistory, Interrupted, Note, Sample, TargetInfo
from vitalsd.top.render import ASCII, BLOCKS, Renderer
from vitalsd.top.terminal import keys
from vitalsd.top.view_state import View

pytestmark = pytest.mark.live

Start = Callable[..., Target]

KEYS = {signal.SIGINT: "\x03", signal.SIGQUIT: "\x1c"}
VITALSD = (sys.executable, "-m", "vitalsd")
ALT_ON, ALT_OFF, CURSOR_ON = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
HOSTILE = "\x1b]0;p\x07\u202e<b>"


def top(*arguments: str, directory: Path, command: tuple[str, ...] = VITALSD, **options: Any) -> PseudoTerminal:
    """``vitalsd top`` in a terminal, with runtime and state below `directory`."""
    env = {name: value for name, value in environment(directory).items() if name.startswith("VITALSD_")} | options.pop(
        "env", {}
    )
    return PseudoTerminal([*command, "top", "--interval", "0.2", *arguments], env=env, **options)


def rows(text: str) -> list[str]:
    """The rows of the table, names only."""
    found = []
    for line in text.splitlines()[1:]:
        if match := re.match(r" *\d+ (\S+) +(idle|<0\.1|\d+\.\d)(?: |$)", line):
            found.append(match[1])
    return found


def test_top_thread_that_becomes_busy_moves_to_the_first_row(tmp_path: Path, start: Start) -> None:
    """A thread that begins to burn is the first row within a few samples, with its figure and its bar."""
    target = start("--idle", "5")
    with top("--pid", str(target.pid), directory=tmp_path) as view:
        view.until(lambda text: len(rows(text)) == 6 and rows(text)[0] == "python")
        target.tell("born hot 3000")
        view.until(
            lambda text: (
                rows(text)[:1] == ["hot"]
                and (figure := re.search(r"hot +(\d+\.\d) [▉▊▋▌▍▎▏█]", text))
                and float(figure[1]) > 5
            )
        )
        assert re.search(r"CPU +\d+\.\d %", view.text)
        view.press("q")
        assert view.end() == 0
        assert view.raw.rindex(ALT_OFF) > view.raw.rindex(ALT_ON)


def test_top_keys_do_what_help_says(tmp_path: Path, start: Start) -> None:
    """Sorting, turning round, filtering, scrolling, pausing, marking and help do what the help says."""
    target = start("--idle", "40", "--burn", "30")
    with top("--pid", str(target.pid), directory=tmp_path) as view:
        view.until(lambda text: rows(text)[:1] == ["burn-0"])
        view.press("n")
        text = view.until(lambda text: rows(text)[:3] == ["burn-0", "idle-0", "idle-1"] and "THREAD^" in text)
        assert "more below" in text
        view.press("r")
        view.until(lambda text: rows(text)[:1] == ["python"] and "THREADv" in text)
        view.press("rt")
        # Not in the order they were born: the kernel begins again with small ids after pid_max.
        by_tid = ["python" if name == "main" else name for name in sorted(target.tids, key=target.tids.__getitem__)]
        view.until(lambda text: rows(text)[:2] == by_tid[:2] and "TID^" in text)
        view.press("\x1b[B\x1b[Bj")
        view.until(lambda text: rows(text)[0] == by_tid[3])
        view.press("G")
        view.until(lambda text: rows(text)[-1] == by_tid[-1] and "more below" not in text)
        view.press("\x1b[5~\x1b[H")
        view.until(lambda text: rows(text)[0] == by_tid[0])
        view.press("/dle-3")
        text = view.until(lambda text: "filter: dle-3" in text and len(rows(text)) == 11)
        assert "11 of 42" in text
        view.press("\r")
        view.until(lambda text: "Esc clears" in text)
        view.press("\x1b")
        view.until(lambda text: len(rows(text)) > 11)
        view.press("c")
        view.until(lambda text: rows(text)[0] == "burn-0")
        view.press("mé\x7fdown again\r")
        view.until(lambda text: "marked: down again" in text and "mark: down again" in text)
        view.press("?")
        view.until(lambda text: "sort by CPU, name, thread id" in text)
        view.press("x")
        view.until(lambda text: rows(text)[:1] == ["burn-0"])
        view.press("p")
        before = rows(view.until(lambda text: "PAUSED" in text))
        target.tell("born hot 400")
        target.read()
        view.press("j")
        assert "hot" not in view.until(lambda text: "PAUSED" in text and rows(text) != before)
        view.press("p/hot\r")
        view.until(lambda text: rows(text) == ["hot"] and "PAUSED" not in text)
        view.press("q")
        assert view.end() == 0


FIGURE = r"(?:\d+\.\d %|\u2013)"
WHOLE = r"(?:\d+ %|\u2013)"
SIZE = r"(?:\d+(?:\.\d)? [KMGT]iB|\u2013)"
REASONS = rf"^ wait {FIGURE}, children {FIGURE}, (?:anonymous|footprint) {SIZE}, swap {SIZE}, fds (?:\d+|\u2013)$"
MACHINE = rf"^ (?:machine \u2013|(?:machine|container) {WHOLE} busy, other {WHOLE}, .*)$"


@pytest.mark.parametrize("via", ["sampled directly", "via sidecar", "a replay"])
def test_top_shows_waits_children_memory_and_the_machine(tmp_path: Path, start: Start, via: str) -> None:
    """Each has a figure or a dash: in a column of the threads, and in two lines at 80 columns and 24 rows."""
    target = start("--idle", "2", "--burn", "30")
    with ExitStack() as stack:
        arguments = ["--pid", str(target.pid)]
        if via != "sampled directly":
            _, ready = stack.enter_context(serving(tmp_path, "--pid", str(target.pid), "--record-interval", "0.2"))
        if via == "a replay":
            eventually(lambda: len(ask(ready["url"], "/history?seconds=60")[1]["time_ms"]) > 4, 20)
            report = tmp_path / "report.zip"
            report.write_bytes(httpx.get(f"{ready['url']}/report.zip?window_ms=100", trust_env=False).content)
            replay = stack.enter_context(Serving(tmp_path, str(report), command="replay"))
            arguments = ["--url", replay.url]
        view = stack.enter_context(top(*arguments, directory=tmp_path))
        text = view.until(lambda text: rows(text)[:1] == ["burn-0"] and (via == "a replay" or via in text))
        lines = text.splitlines()
        assert re.search(REASONS, text, re.MULTILINE), text
        assert re.search(MACHINE, text, re.MULTILINE), text
        assert re.search(r"^ CPU +\d+\.\d %.* peak \d+\.\d %$", text, re.MULTILINE)
        assert re.search(r"^ RSS +\d+\.\d MiB.* VM ", text, re.MULTILINE)
        (head,) = [line for line in lines if "THREAD" in line]
        (burner,) = [line for line in lines if "burn-0" in line]
        assert re.fullmatch(r" *(\d+\.\d|<0\.1|\u2013)", burner[: head.index("WAIT%") + 5][-6:]), burner
        view.press("w")
        view.until(lambda text: "WAIT%v" in text)
        view.press("q")
        assert view.end() == 0


def test_top_after_a_resize_fits_the_window(tmp_path: Path, start: Start) -> None:
    """It is drawn anew for 40 columns, for 120, and for 20 by 5, whatever COLUMNS says."""
    target = start("--idle", "3", "--burn", "30")
    with top("--pid", str(target.pid), directory=tmp_path, env={"COLUMNS": "80", "LINES": "24"}) as view:
        view.until(lambda text: rows(text)[:1] == ["burn-0"])
        view.resize(40, 12)
        text = view.until(lambda text: rows(text)[:1] == ["burn-0"] and "idle-2" in text)
        assert text.splitlines()[11].startswith(" q quit")
        view.resize(120, 40)
        text = view.until(lambda text: len(text.splitlines()) == 40 and rows(text)[:1] == ["burn-0"])
        assert text.splitlines()[39].startswith(" q quit")
        view.resize(20, 5)
        view.until(lambda text: "q quit" in text and "burn-0" in text)
        view.press("q")
        assert view.end() == 0


def test_top_of_an_exited_target_keeps_the_last_table(tmp_path: Path, start: Start) -> None:
    """After the exit of the target the view shows it, keeps the last table, and ends by q."""
    target = start("--idle", "3")
    with top("--pid", str(target.pid), directory=tmp_path) as view:
        view.until(lambda text: len(rows(text)) == 4)
        target.kill()
        text = view.until(lambda text: f"\n target {target.pid} has exited" in text and "ENDED" in text)
        assert len(rows(text)) == 4
        view.press("mtoo late\r")
        view.until(lambda text: "not marked: nothing is being recorded" in text)
        view.press("n")
        view.until(lambda text: "THREAD^" in text)
        view.press("q")
        assert view.end() == 0


def test_top_with_a_thousand_threads_responds_to_keys(tmp_path: Path, start: Start) -> None:
    """Among 1000 threads the busy one is first, keys are obeyed, and the view costs little itself."""
    target = start("--idle", "1000", "--burn", "30")
    arguments = ("--pid", str(target.pid), "--interval", "1")
    with top(*arguments, directory=tmp_path, columns=100, rows=40) as view:
        text = view.until(lambda text: rows(text)[:1] == ["burn-0"])
        assert "1002 threads" in text
        assert "more below" in text
        begun, used = time.monotonic(), cpu_s(view.process.pid)
        view.press("nG")
        view.until(lambda text: rows(text)[-1:] == ["python"])
        view.press("g/idle-999\r")
        view.until(lambda text: rows(text) == ["idle-999"])
        eventually(lambda: view.until(bool) and time.monotonic() > begun + 2)
        assert (cpu_s(view.process.pid) - used) / (time.monotonic() - begun) < 0.5
        view.press("q")
        assert view.end() == 0


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_top_escapes_hostile_names(tmp_path: Path, start: Start) -> None:
    """A name that would set the window's title or turn the writing round is spelled out."""
    target = start()
    target.ask(f"name {HOSTILE.encode()[:15].hex()}")
    with top("--pid", str(target.pid), directory=tmp_path) as view:
        view.until(lambda text: "\\x1b]0;p\\x07\\u202e" in text)
        assert b"\x1b]0;" not in view.raw
        assert "\u202e".encode() not in view.raw
        view.press("q")
        assert view.end() == 0
    out = subprocess.run(
        [*VITALSD, "top", "--pid", str(target.pid), "--count", "1", "--interval", "0.1"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert out.returncode == 0
    assert all(line.isprintable() for line in out.stdout.splitlines())


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGQUIT, -3), (signal.SIGTERM, -15), (signal.SIGHUP, -1)],
)
def test_top_ended_by_a_signal_restores_the_terminal(
    tmp_path: Path, start: Start, number: signal.Signals, status: int
) -> None:
    """Each ends it with the status shells expect; modes, screen and cursor are given back."""
    target = start()
    with top("--pid", str(target.pid), directory=tmp_path) as view:
        before = view.modes()
        view.until(lambda text: rows(text))
        assert view.modes() != before
        if number in KEYS:
            view.press(KEYS[number])
        else:
            view.send(number)
        assert view.end() == status
        assert view.modes() == before
        assert view.raw.rindex(ALT_OFF) > view.raw.rindex(ALT_ON)
        assert view.raw.rindex(CURSOR_ON) > view.raw.rindex(b"\x1b[?25l")


def test_top_without_its_terminal_ends(tmp_path: Path, start: Start) -> None:
    """Without its terminal it ends, and uses no CPU in a loop."""
    target = start()
    with top("--pid", str(target.pid), directory=tmp_path) as view:
        view.until(lambda text: rows(text))
        view.close()
        view.process.wait(15)


def test_top_with_an_internal_error_restores_the_terminal_first(tmp_path: Path, start: Start) -> None:
    """A bug shows its traceback on the ordinary screen, in ordinary modes."""
    target = start()
    code = (
        "import sys, vitalsd.top.view_state as view\n"
        "from vitalsd.cli import main\n"
        "whole = view.View.press\n"
        "def broken(self, key): 1 / 0\n"
        "view.View.press = broken\n"
        "main(sys.argv[1:], prog_name='vitalsd')\n"
    )
    with top("--pid", str(target.pid), directory=tmp_path, command=(sys.executable, "-c", code)) as view:
        before = view.modes()
        view.until(lambda text: rows(text))
        view.press("n")
        assert view.end() == 1
        assert view.raw.rindex(b"ZeroDivisionError") > view.raw.rindex(ALT_OFF) > view.raw.rindex(ALT_ON)
        assert view.modes() == before


def test_top_stopped_and_continued_restores_the_terminal(tmp_path: Path, start: Start) -> None:
    """Ctrl-Z gives the shell a sane terminal, fg brings the view back, q the shell again."""
    bash = program("bash", package="bash")
    target = start("--idle", "2")
    env = environment(tmp_path)
    env = {name: env[name] for name in ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR")} | {"PS1": "shell> "}
    with PseudoTerminal([bash, "--norc", "--noprofile", "--noediting", "-i"], env=env) as shell:
        shell.until(lambda text: text.rstrip().endswith("shell>"))
        shell.press("stty -g\n")
        modes = re.search(r"^[0-9a-f:]{40,}", shell.until(lambda text: text.count("shell>") == 2), re.MULTILINE)
        assert modes is not None
        shell.press(f"'{sys.executable}' -m vitalsd top --pid {target.pid}\n")
        shell.until(lambda text: len(rows(text)) == 3)
        mark = len(shell.raw)
        shell.press("\x1a")
        shell.until(lambda _: b"Stopped" in shell.raw[mark:] and shell.raw.rstrip().endswith(b"shell>"))
        assert shell.raw.index(ALT_OFF, mark) < shell.raw.index(b"Stopped", mark)
        shell.press("clear; stty -g\n")
        shell.until(lambda text: modes[0].replace("\n", "") in text.replace("\n", ""))
        mark = len(shell.raw)
        shell.press("fg\n")
        shell.until(lambda text: ALT_ON in shell.raw[mark:] and len(rows(text)) == 3)
        shell.press("n")
        shell.until(lambda text: "THREAD^" in text)
        shell.press("q")
        shell.until(lambda _: shell.raw.rindex(ALT_OFF) > shell.raw.rindex(ALT_ON))
        shell.press("clear; echo status $?\n")
        shell.until(lambda text: "status 0" in text)


def test_top_with_no_color_has_no_colours(tmp_path: Path, start: Start) -> None:
    """There are colours; with NO_COLOR there are none."""
    target = start("--burn", "30")
    for env, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        with top("--pid", str(target.pid), directory=tmp_path, env=env) as view:
            view.until(lambda text: rows(text)[:1] == ["burn-0"])
            view.press("q")
            assert view.end() == 0
            assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", view.raw)) is coloured


def test_top_without_utf8_draws_ascii(tmp_path: Path, start: Start) -> None:
    """If the encoding has no blocks, bars and sparklines are ASCII."""
    target = start("--burn", "60")
    env = {"PYTHONIOENCODING": "ascii"}
    with top("--pid", str(target.pid), directory=tmp_path, env=env) as view:
        view.until(lambda text: re.search(r"burn-0 +\d+\.\d ##", text))
        assert view.raw.isascii()
        view.press("q")
        assert view.end() == 0


def test_top_with_redirected_stdin_reads_keys_from_the_terminal(tmp_path: Path, start: Start) -> None:
    """If stdin is a file, keys come from the terminal."""
    target = start()
    command = ("sh", "-c", 'exec "$0" -m vitalsd "$@" </dev/null', sys.executable)
    with top("--pid", str(target.pid), directory=tmp_path, command=command) as view:
        view.until(lambda text: rows(text))
        view.press("q")
        assert view.end() == 0


def test_top_without_a_target_exits_with_one_line(tmp_path: Path) -> None:
    """An error at the start appears on the ordinary screen, with an exit status."""
    with top("--pid", "2147483647", directory=tmp_path) as view:
        assert view.end() == 1
        assert view.text.strip() == "vitalsd: no process has pid 2147483647"
        assert ALT_ON not in view.raw
    with top(directory=tmp_path) as view:
        assert view.end() == 2
        assert "name one with --pid or --name" in view.text.replace("\n", "")


def test_top_without_its_sidecar_continues_and_reconnects(tmp_path: Path, start: Start) -> None:
    """The view shows the history and marks of a sidecar, continues without it, and reconnects to the next one."""
    target = start("--idle", "2", "--burn", "30")
    pid = str(target.pid)
    options = ("--pid", pid, "--no-tcp", "--record-interval", "0.2")
    with top("--pid", pid, directory=tmp_path, columns=100) as view:
        with serving(tmp_path, *options) as (_, ready):
            view.until(lambda text: "via sidecar" in text and rows(text)[:1] == ["burn-0"])
            view.press("mlook here\r")
            view.until(lambda text: "mark: look here" in text)
            assert [mark["label"] for mark in ask(ready["socket"], "/marks")[1]] == ["look here"]
        view.until(lambda text: "sampled directly" in text and rows(text)[:1] == ["burn-0"])
        with serving(tmp_path, *options):
            view.until(lambda text: "via sidecar" in text and rows(text)[:1] == ["burn-0"])
            target.kill()
            view.until(lambda text: "has exited" in text and "exited: target" in text and rows(text))
        view.press("q")
        assert view.end() == 0


@pytest.mark.torture
def test_top_with_slow_samples_shows_every_mark(tmp_path: Path, start: Start) -> None:
    """A mark set right after a sample appears with the next one, however long that takes."""
    target = start("--idle", "1")
    with serving(tmp_path, "--pid", str(target.pid), "--record-interval", "0.2") as (_, ready):
        command = [*VITALSD, "top", "--interval", "12", "--count", "2", "--url", ready["url"]]
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=environment(tmp_path), **piped) as view:
            assert view.stdout is not None
            assert "TIME" in view.stdout.readline()
            assert view.stdout.readline()
            httpx.post(f"{ready['url']}/marks", json={"label": "look here"}, trust_env=False).raise_for_status()
            assert "mark: look here" in view.stdout.read()


def test_top_with_url_reconnects_to_the_same_address_only(tmp_path: Path, start: Start) -> None:
    """With --url no other sidecar is asked: the view shows the loss, and reconnects to the same address."""
    target = start("--burn", "30")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with serving(tmp_path, "--pid", str(target.pid), "--auth", "token", port=port) as (_, ready):
        view = top("--url", ready["url"], directory=tmp_path)
        with view:
            view.until(lambda text: rows(text)[:1] == ["burn-0"] and "http://127.0.0.1" in text)
            os.kill(ready["pid"], signal.SIGKILL)
            text = view.until(lambda text: "LOST" in text and "Connection refused" in text)
            assert rows(text)[:1] == ["burn-0"]
            with serving(tmp_path, "--pid", str(target.pid), "--auth", "token", port=port):
                view.until(lambda text: "LOST" not in text and rows(text)[:1] == ["burn-0"])
                view.press("q")
                assert view.end() == 0


def test_top_with_a_hung_sidecar_continues(tmp_path: Path, start: Start) -> None:
    """A sidecar that is stopped while it is asked costs a few seconds and not the view."""
    target = start("--burn", "30")
    with (
        serving(tmp_path, "--pid", str(target.pid), "--no-tcp", "--record-interval", "0.2") as (sidecar, _),
        top("--pid", str(target.pid), directory=tmp_path) as view,
    ):
        view.until(lambda text: "via sidecar" in text and rows(text)[:1] == ["burn-0"])
        sidecar.send_signal(signal.SIGSTOP)
        view.until(lambda text: "sampled directly" in text and rows(text)[:1] == ["burn-0"])
        view.press("q")
        assert view.end() == 0


def test_top_without_arguments_uses_the_newest_sidecar(tmp_path: Path, start: Start) -> None:
    """Its record's past is there from the first picture on."""
    target = start("--burn", "40")
    with serving(tmp_path, "--pid", str(target.pid), "--no-tcp", "--record-interval", "0.1") as (_, ready):
        eventually(lambda: len(ask(ready["socket"], "/history?seconds=60")[1]["time_ms"]) > 12, 20)
        with top(directory=tmp_path) as view:
            view.until(lambda text: re.search(r"burn-0 +\d+\.\d .*[▁-█]{10}", text))
            view.press("q")
            assert view.end() == 0


def test_top_into_a_pipe_prints_one_line_per_sample(tmp_path: Path, start: Start) -> None:
    """Without a terminal: a head and lines, or JSON; a reader that leaves ends it; so does the end of the target."""
    target = start("--burn", "30")
    command = [*VITALSD, "top", "--pid", str(target.pid), "--interval", "0.1"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 30, "env": environment(tmp_path)}
    out = subprocess.run([*command, "--count", "3"], **options)
    assert (out.returncode, out.stderr) == (0, "")
    head, *lines = out.stdout.splitlines()
    assert head.split() == ["TIME", "CPU%", "RSS_KB", "THREADS", "BUSIEST"]
    assert len(lines) == 3
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d +\d+\.\d +\d+ +2 +burn-0=\d+\.\d.*", line) for line in lines), lines
    out = subprocess.run([*command, "--count", "2", "--json"], **options)
    assert [type(parse_runtime_metrics(line)) for line in out.stdout.splitlines()] == [Measured, Measured]
    out = subprocess.run(["sh", "-c", '"$@" | head -n 2', "sh", *command], **options)
    assert len(out.stdout.splitlines()) == 2
    assert "Traceback" not in out.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        target.kill()
        assert f"target {target.pid} has exited" in running.stderr.read()
        assert running.wait(15) == 0


def test_top_with_fewer_samples_than_requested_exits_with_1(tmp_path: Path, start: Start) -> None:
    """A target that ends meanwhile, or has ended already, cannot give the numbers."""
    target = start()
    command = [*VITALSD, "top", "--pid", str(target.pid), "--interval", "0.1", "--count"]
    with subprocess.Popen(
        [*command, "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        os.kill(target.pid, signal.SIGKILL)  # and leave the zombie
        assert f"target {target.pid} has exited" in running.stderr.read()
        assert running.wait(15) == 1
    out = subprocess.run([*command, "1"], capture_output=True, text=True, timeout=30, env=environment(tmp_path))
    assert (out.returncode, out.stdout) == (1, "")
    assert "zombie" in out.stderr


def test_top_of_an_exited_target_into_a_pipe_prints_no_sample(short_path: Path, start: Start) -> None:
    """A sidecar that lingers still has its record; the command prints only that the target has exited."""
    target = start()
    with serving(short_path, "--pid", str(target.pid), "--record-interval", "0.1") as (_, ready):
        eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["snapshots"] > 4)
        target.kill()
        eventually(lambda: ask(ready["url"], "/info")[1]["recorder"]["ended"])
        for options in ((), ("--url", ready["url"])):
            out = subprocess.run(
                [*VITALSD, "top", *options, "--count", "1"],
                capture_output=True,
                text=True,
                timeout=30,
                env=environment(short_path),
            )
            assert (out.returncode, out.stdout) == (1, "")
            assert f"target {target.pid} has exited: killed by SIGKILL" in out.stderr


@pytest.mark.parametrize("recorded", [False, True])
def test_top_after_an_exec_shows_the_new_name(short_path: Path, recorded: bool) -> None:
    """The title and the event show it, sampled directly or by a sidecar."""
    code = "import os, sys; sys.stdin.readline(); os.execvp('sleep', ['sleep', '60'])"
    with ExitStack() as stack:
        target = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE))
        stack.callback(target.kill)
        if recorded:
            stack.enter_context(serving(short_path, "--pid", str(target.pid), "--record-interval", "0.1"))
        view = stack.enter_context(top("--pid", str(target.pid), directory=short_path))
        view.until(lambda text: f"python {target.pid}" in text.replace(Path(sys.executable).name, "python"))
        assert target.stdin is not None
        target.stdin.close()
        view.until(lambda text: f"sleep {target.pid}" in text and "another program: sleep" in text)


def test_top_with_name_follows_a_restart(tmp_path: Path, start: Start) -> None:
    """After a restart of the program the view shows the new process, with new counters."""
    name = f"vtop{os.getpid()}"
    first = start()
    first.ask(f"name {name.encode().hex()}")
    with top("--name", name, directory=tmp_path) as view:
        view.until(lambda text: f"{name} {first.pid}" in text and rows(text))
        first.kill()
        view.until(lambda text: "LOST" in text or "ENDED" in text)
        second = start()
        second.ask(f"name {name.encode().hex()}")
        view.until(lambda text: f"{name} {second.pid}" in text and "LOST" not in text and "ENDED" not in text)
        view.press("q")
        assert view.end() == 0


# Without a terminal


@pytest.mark.parametrize(
    ("typed", "found", "rest"),
    [
        ("q", ["q"], ""),
        ("\x1b[A\x1b[B", ["up", "down"], ""),
        ("\x1bOA", ["up"], ""),
        ("\x1b[5~\x1b[6~", ["pageup", "pagedown"], ""),
        ("\x1b", [], "\x1b"),
        ("\x1b[", [], "\x1b["),
        ("\x1b[1", [], "\x1b[1"),
        ("\x1bq", ["escape", "q"], ""),
        ("\x1b[1;5Cq", ["q"], ""),
        ("\x1b[200~q", ["q"], ""),
        ("\x1b[<0;1;1Mq", ["q"], ""),
        ("\r\n\x7f\x08\x15", ["enter", "enter", "backspace", "backspace", "clear"], ""),
        ("\x00\x01\t", [], ""),
        ("é漢", ["é", "漢"], ""),
    ],
)
def test_key_parser_turns_sequences_into_keys(typed: str, found: list[str], rest: str) -> None:
    """Known sequences are keys, unknown ones are swallowed whole, half ones wait for the rest."""
    assert keys(typed) == (found, rest)


NAMES = [
    "",
    "render",
    HOSTILE,
    "漢字漢字漢字漢字漢字",
    "e\u0301" * 30,
    "👩\u200d👩\u200d👧",
    "\udcff\udc80",
    "x" * 300,
    "[bold]",
]


def picture(names: list[str]) -> View:
    threads = tuple(ThreadMetrics(tid=10**n, name=name, cpu_percent=n * 17.3) for n, name in enumerate(names))
    process = ProcessMetrics(cpu_percent=123.4, rss_kb=65536, vm_size_kb=10**9, uptime_secs=1e6)
    metrics = Measured(sample_window_ms=1000, process=process, threads=threads, platform="linux")
    view = View()
    view.apply(TargetInfo(1, HOSTILE, "1-2-3", "a sidecar\x1b[2J"))
    for _ in range(3):
        view.apply(Sample(0, metrics, b""))
    view.apply(Note(0, "mark", HOSTILE))
    view.apply(Interrupted(HOSTILE))
    return view


@pytest.mark.parametrize("state", ["", "?", "/漢字", "m" + "w" * 250, "p", "n"])
def test_render_of_any_size_fills_it_exactly(state: str) -> None:
    """For any size and any names, no line is too long or missing, and none has a control character."""
    view = picture(NAMES)
    for key in state:
        view.press(key)
    for glyphs in (BLOCKS, ASCII):
        for width in (1, 2, 7, 20, 26, 39, 40, 71, 80, 200):
            for height in (1, 2, 3, 5, 6, 12, 13, 24, 100):
                lines = Renderer(view, width, glyphs).lines(height)
                assert len(lines) == height
                assert max(cell_len(line.plain) for line in lines) <= width, (width, height)
                assert all(line.plain.isprintable() for line in lines)
                assert glyphs is BLOCKS or all(line.plain.isascii() for line in lines)


def full_picture(*, known: bool = True, names: tuple[str, ...] = ("render", "audio", "ui"), **machine: Any) -> View:
    """Return the view of one full answer: threads that use 10, 20, … % and wait 30, 20, … %."""
    count = len(names)
    tids = range(1, count + 1)
    first = with_extras(snapshot(SECOND, [(tid, 1, 0) for tid in tids]))
    last = with_extras(
        snapshot(
            2 * SECOND,
            [(tid, 1, tid * SECOND // 10) for tid in tids],
            roster=roster([(tid, 1, 0) for tid in tids], names),
            thread_wait_ns=[(count + 1 - tid) * SECOND // 10 for tid in tids],
        )
    )
    for each, busy_ns in ((first, 0), (last, 1_820_000_000)):
        each.figures = FIGURES
        each.machine = MACHINE_FIGURES._replace(busy_ns=busy_ns, **machine) if known else None
        each.tree = None
        if not known:
            each.thread_wait_ns = each.wait_ns = each.figures = None
    last.figures = FIGURES._replace(reaped_ns=FIGURES.reaped_ns + SECOND // 2) if known else None  # type: ignore[operator]
    body = encode(measure(first, last), IDENTITY, requested_ms=1000, detail="full")
    metrics = parse_runtime_metrics(body)
    assert isinstance(metrics, FullMetrics)
    view = View()
    view.apply(TargetInfo(1, "app", "1-2-3", "a sidecar"))
    view.apply(Sample(0, metrics, body))
    return view


def plain(view: View, width: int = 80, height: int = 24) -> list[str]:
    return [line.plain.rstrip() for line in Renderer(view, width).lines(height)]


def test_render_of_full_answer_has_the_figures() -> None:
    """Wait, children, memory, machine: the numbers of the answer, at 80 columns."""
    lines = plain(full_picture(memory_pressure_level=0, thermal_level=0))
    assert lines[3] == " wait 60.0 %, children 50.0 %, anonymous 50.0 MiB, swap 3072 KiB, fds 12"
    assert lines[4].startswith(" machine 182 % busy, other 122 %, memory available 4096.0 MiB, swap 1024.0 MiB")
    waits = {line.split()[1]: line.split()[-2] for line in lines[6:9]}
    assert waits == {"ui": "10.0", "audio": "20.0", "render": "30.0"}


def test_render_of_slowed_machine_names_what_slows_it() -> None:
    """Throttling, pressure and heat are named if there is any."""
    (line,) = [line for line in plain(full_picture(), width=120) if line.startswith(" machine")]
    assert "memory pressure warning" in line
    assert "thermal throttled" in line
    assert "container" in plain(full_picture(in_container=True))[4]


def test_render_of_unknown_figures_has_dashes_and_no_zero() -> None:
    """What the platform does not give is a dash, in the lines and in the column."""
    lines = plain(full_picture(known=False))
    assert lines[3] == " wait \u2013, children \u2013, anonymous \u2013, swap \u2013, fds \u2013"
    assert lines[4] == " machine \u2013"
    assert [line.split()[-2] for line in lines[6:9]] == ["\u2013"] * 3


def test_render_of_basic_answer_has_no_wait_column() -> None:
    """An answer without waits, as of an older sidecar, has neither column nor lines."""
    lines = plain(picture(["a"]))
    assert not any("WAIT%" in line or "machine" in line for line in lines)


def test_top_sorts_by_wait() -> None:
    """The thread that waits most is first; reversed, last."""
    view = full_picture()
    assert [thread.name for thread in view.chosen()] == ["ui", "audio", "render"]
    view.press("w")
    assert [thread.name for thread in view.chosen()] == ["render", "audio", "ui"]
    assert any("WAIT%v" in line for line in plain(view))
    view.press("r")
    assert [thread.name for thread in view.chosen()] == ["ui", "audio", "render"]


@pytest.mark.parametrize("known", [False, True])
def test_render_of_full_answer_of_any_size_fills_it_exactly(known: bool) -> None:
    """With hostile names, in each size, as for the basic answer."""
    view = full_picture(known=known, names=tuple(name for name in NAMES if name.isascii() or "\udcff" not in name))
    for glyphs in (BLOCKS, ASCII):
        for width in (1, 7, 26, 39, 40, 60, 80, 200):
            for height in (1, 5, 6, 14, 15, 24, 100):
                lines = Renderer(view, width, glyphs).lines(height)
                assert len(lines) == height
                assert max(cell_len(line.plain) for line in lines) <= width, (width, height)
                assert all(line.plain.isprintable() for line in lines)
                assert glyphs is BLOCKS or all(line.plain.isascii() for line in lines)


def hang(at_ms: int, ms: int, *, heartbeat: str = "ui", cause: str = "blocked", ongoing: bool = False) -> HangNote:
    return HangNote(at_ms, heartbeat, ms, cause, "futex" if cause == "blocked" else "", ongoing)


def test_render_of_a_silent_heartbeat_names_it_in_the_header() -> None:
    """Which one, how long, why; over, the header has the longest of the last 5 min; later, nothing."""
    view = full_picture()

    def header(*hangs: HangNote) -> str:
        view.apply(Hangs(hangs))
        return plain(view)[1]

    table = [line for line in plain(view) if "TID" in line]
    assert header(hang(1000, 4230, ongoing=True)) == " ui silent for 4.2 s: blocked, futex"
    two = header(hang(1000, 4230, ongoing=True), hang(2000, 5230, heartbeat="net", cause="busy", ongoing=True))
    assert two == " net silent for 5.2 s: busy; ui silent for 4.2 s: blocked, futex"
    assert header(hang(1000, 6230)) == " 2 hangs in the last 5 min, the longest: ui 6.2 s, blocked"
    view.hangs.clear()
    assert header(hang(1000, 6230, cause="interpreter_lock")) == " 1 hang in the last 5 min: ui 6.2 s, interpreter lock"
    view.apply(Sample(1000 + 6230 + 300_001, view.metrics, b""))  # type: ignore[arg-type]
    assert plain(view)[1].startswith(" CPU")
    assert [line for line in plain(view) if "TID" in line] == table


def test_top_whose_samples_come_from_another_source_shows_no_silence_of_the_sidecar() -> None:
    """A hang that no sidecar reports any more does not last."""
    view = full_picture()
    view.apply(Hangs((hang(1000, 2000, ongoing=True),)))
    view.apply(TargetInfo(1, "app", "1-2-3", "sampled directly"))
    assert plain(view)[1] == " 1 hang in the last 5 min: ui 2.0 s, blocked"
    view.apply(TargetInfo(2, "app", "2-3-4", "sampled directly"))
    assert view.hang_line() == ""


def test_render_of_hostile_hang_is_printable_at_any_size() -> None:
    """Heartbeat, cause and detail of an untrusted answer are text."""
    view = full_picture()
    view.apply(Hangs((HangNote(0, HOSTILE, 10**15, HOSTILE, HOSTILE, ongoing=True),)))
    for glyphs in (BLOCKS, ASCII):
        for width in (1, 7, 40, 80, 200):
            for height in (1, 5, 6, 7, 15, 24):
                lines = Renderer(view, width, glyphs).lines(height)
                assert len(lines) == height
                assert max(cell_len(line.plain) for line in lines) <= width
                assert all(line.plain.isprintable() for line in lines)


def test_top_shows_a_hang_while_it_lasts_afterwards_and_in_replay(tmp_path: Path, short_path: Path) -> None:
    """The header names the silent heartbeat, then the hang; lines and JSON note it; a replay of a report has it."""
    env = environment(short_path)
    with BeatingClient(short_path) as client:
        client.beating()
        with top("--pid", str(client.pid), directory=short_path) as view:
            view.until(lambda text: "python" in text)
            assert "silent" not in view.text
            client.tell("block 5000")
            view.until(lambda text: re.search(r"^ ui silent for \d\.\d s: blocked, futex$", text, re.MULTILINE))
            during = tmp_path / "during.zip"
            during.write_bytes(httpx.get(f"{client.url}/report.zip?window_ms=100", trust_env=False, timeout=30).content)
            assert client.read() == "block 5000"
            text = view.until(lambda text: "1 hang in the last 5 min: ui " in text)
            view.until(lambda text: re.search(r"hang: ui silent for \d\.\d s: blocked, futex", text))
            assert len(text.splitlines()) <= 24
            view.press("q")
            assert view.end() == 0
        for options in ([], ["--json"]):
            command = [*VITALSD, "top", "--interval", "0.5", "--count", "2", "--pid", str(client.pid), *options]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            assert re.search(r"hang: ui silent for \d\.\d s: blocked, futex", done.stderr)
            assert "silent" not in done.stdout
    with (
        Serving(tmp_path, str(during), command="replay") as replay,
        top("--url", replay.url, directory=tmp_path) as view,
    ):
        view.until(lambda text: re.search(r"^ ui silent for \d\.\d s: blocked, futex$", text, re.MULTILINE))
        view.press("q")
        assert view.end() == 0


def test_top_after_a_long_pause_shows_what_arrived() -> None:
    """While paused nothing moves; afterwards all that came is there."""
    view = picture(["a"])
    view.press("p")
    before = [line.plain for line in Renderer(view, 80).lines(24)]
    for _ in range(10):
        view.apply(Sample(0, view.metrics, b""))  # type: ignore[arg-type]
    view.apply(Ended("gone"))
    assert [line.plain for line in Renderer(view, 80).lines(24)] == before
    view.press("p")
    assert len(view.cpu) == 13
    assert any("gone" in line.plain for line in Renderer(view, 80).lines(24))


def test_top_with_a_new_recording_keeps_its_samples() -> None:
    """The past of a sidecar that has none yet leaves what was seen so far."""
    view = picture(["a"])
    view.apply(InitialHistory((), (), {}))
    assert len(view.cpu) == 3
    Renderer(view, 80).lines(24)


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"[" * 100_000, b'{"recorder": {}}', b'{"recorder": null, "target": 5}', b"\xff"]
)
def test_top_with_url_of_another_server_exits_with_a_reason(body: bytes) -> None:
    """Something else at --url ends it with a sentence, whatever it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            out = CliRunner().invoke(main, ["top", "--url", f"http://127.0.0.1:{server.server_port}"])
        finally:
            server.shutdown()
            thread.join()
    assert (out.exit_code, out.stdout) == (1, "")
    assert "this is no answer of a sidecar" in out.stderr
