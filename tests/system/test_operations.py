"""The configurations and commands of docs/operations.md, given to the programs they are for."""

import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml

from agent.test_agent import a_plan
from support.paths import ROOT
from support.serving import Serving
from support.sidecars import VITALSD, environment, serving
from support.target import Target
from support.tools import program
from vitalsd.agent.systemd import Systemd
from vitalsd.cli import main
from vitalsd.cli.logging_setup import logging_as
from vitalsd.exporters.otlp import CREDENTIALS, DEFAULT_URL, endpoint_of

Start = Callable[..., Target]

TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = {found[1]: body for _, body in BLOCKS if (found := re.match(r"# (\S+)\n", body)) is not None}
COMMANDS = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
COLLECTORS = [name for name in FILES if name.startswith("collector-")]


def vitalsd(arguments: list[str]) -> None:
    """Parse a command line as `vitalsd` would, and run nothing. Raises `click.UsageError`."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.name is not None
    command.make_context(command.name, arguments)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vitalsd ")])
def test_operations_page_commands_parse(line: str) -> None:
    """Each line that calls vitalsd is one that it takes."""
    words = list(shlex.shlex(line, posix=True, punctuation_chars="|>"))
    arguments = shlex.split(line.partition("|")[0])[1:]
    assert "vitalsd" in words
    vitalsd(arguments)


def test_operations_page_has_the_expected_commands_and_files() -> None:
    """There are commands and files, or the tests above and below test nothing; and the shell can read the commands."""
    assert len(COMMANDS) > 10
    assert set(FILES) == {
        "~/.config/systemd/user/vitalsd.service.d/local.conf",
        "prometheus.yml",
        "vitalsd.rules.yml",
        "collector-scrape.yaml",
        "collector-otlp.yaml",
    }
    for line in COMMANDS:
        subprocess.run(["sh", "-n", "-c", line], check=True)
    with pytest.raises(click.UsageError):
        vitalsd(["serve", "--otpl"])


def test_operations_page_configuration_passes_promtool(tmp_path: Path) -> None:
    """Promtool finds no fault in the scrape configuration, in the rules, nor in what the Collector is to scrape."""
    promtool = program("promtool", package="prometheus")
    for name in ("prometheus.yml", "vitalsd.rules.yml"):
        (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    (tmp_path / "vitalsd.json").write_text('[{"targets": ["127.0.0.1:9779"]}]', encoding="utf-8")
    scraped = yaml.safe_load(FILES["collector-scrape.yaml"])["receivers"]["prometheus"]["config"]
    (tmp_path / "scraped.yml").write_text(yaml.safe_dump(scraped), encoding="utf-8")
    for name in ("prometheus.yml", "scraped.yml"):
        out = subprocess.run([promtool, "check", "config", name], cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr


@pytest.mark.live
def test_operations_page_configuration_runs_in_prometheus(tmp_path: Path, start: Start) -> None:
    """A Prometheus with this very configuration, but for port and pace, has the target up and the rules recorded."""
    prometheus = program("prometheus", package="prometheus")
    jq = program("jq", package="jq")
    target = start("--burn", "30")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with serving(tmp_path, "--pid", str(target.pid)) as (_, ready):
        port = ready["url"].rpartition(":")[2]
        config = FILES["prometheus.yml"].replace("15s", "500ms\n  evaluation_interval: 500ms").replace("9779", port)
        (tmp_path / "prometheus.yml").write_text(config, encoding="utf-8")
        rules = FILES["vitalsd.rules.yml"].replace("[1m]", "[5s]")
        (tmp_path / "vitalsd.rules.yml").write_text(rules, encoding="utf-8")
        (listing,) = [line for line in COMMANDS if "endpoints --json" in line]
        run = listing.replace("vitalsd endpoints", shlex.join([*VITALSD, "endpoints"])).replace("| jq", f"| {jq}")
        subprocess.run(["sh", "-c", run], cwd=tmp_path, env=environment(tmp_path), check=True)
        assert json.loads((tmp_path / "vitalsd.json").read_text()) == [{"targets": [f"127.0.0.1:{port}"]}]
        database = subprocess.Popen(
            [prometheus, "--config.file=prometheus.yml", f"--web.listen-address={address}", "--log.level=error"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=5) as client:
                wanted = {
                    'up{job="vitalsd"}': [1.0],
                    'up{job="vitalsd-all"}': [1.0],
                    "count(vitalsd:cpu_percent)": [1.0],
                    "count(vitalsd:busiest_threads)": [2.0],
                }
                deadline = time.monotonic() + 40
                while (found := {query: ask(client, query) for query in wanted}) != wanted:
                    assert time.monotonic() < deadline, found
                    time.sleep(0.2)
        finally:
            database.kill()
            database.wait()


def ask(client: httpx.Client, query: str) -> list[float]:
    with suppress(httpx.TransportError, ValueError, KeyError):
        answer = client.get("/api/v1/query", params={"query": query}).json()
        return [float(series["value"][1]) for series in answer["data"]["result"]]
    return []


@pytest.mark.live
def test_scrape_without_thread_metrics_has_about_thirty_series(tmp_path: Path) -> None:
    """Without threads of its own a scrape is as small as the page says."""
    with Serving(tmp_path, "--no-thread-metrics") as served:
        text = served.client.get("/metrics", headers={"Accept": "text/plain"}).text
    assert 10 <= sum(not line.startswith("#") for line in text.splitlines()) <= 40


@pytest.mark.parametrize("name", COLLECTORS)
def test_operations_page_pipelines_use_exactly_what_they_define(name: str) -> None:
    """Each Collector configuration is YAML, and its pipelines name exactly what it defines."""
    config: dict[str, Any] = yaml.safe_load(FILES[name])
    for part in ("receivers", "processors", "exporters"):
        used = {each for pipeline in config["service"]["pipelines"].values() for each in pipeline[part]}
        assert used == set(config[part])


def test_operations_page_collector_listens_at_the_default_url() -> None:
    """Its receiver is at the address that --otlp means by default."""
    receiver = yaml.safe_load(FILES["collector-otlp.yaml"])["receivers"]["otlp"]
    assert endpoint_of(DEFAULT_URL) == f"http://{receiver['protocols']['http']['endpoint']}/v1/metrics"


def test_operations_page_lists_every_pushed_metric() -> None:
    """The table of metrics and the tested list are one; so are the variables that are let through."""
    from exporters.test_otlp import REASONS, SIGNALS, UNITS

    table = TEXT[TEXT.index("| Metric |") : TEXT.index("The conventions have no CPU time")]
    named = set(re.findall(r"`((?:process|vitalsd)\.[a-z0-9_.]+)`", table)) - {"vitalsd.thread.id"}
    assert named == UNITS.keys() | REASONS.keys() | SIGNALS | {"vitalsd.thread.wait.time"}
    assert set(re.findall(r"`(OTEL_[A-Z_]+)`", TEXT)) == CREDENTIALS


def test_operations_page_log_example_has_the_real_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """The example of a log line has the keys that a log line has."""
    (example,) = [body for kind, body in BLOCKS if kind == "json"]
    with logging_as("json") as log:
        log.info("serving")
    assert list(json.loads(example)) == list(json.loads(capsys.readouterr().err))


def test_operations_page_drop_in_passes_systemd_analyze(short_path: Path) -> None:
    """The drop-in fits the unit that agent install writes."""
    for path, content in Systemd(a_plan(short_path, name="myapp", options=("--otlp",))).files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    drop_in = path.parent / "vitalsd.service.d" / "local.conf"
    drop_in.parent.mkdir()
    (body,) = [body for name, body in FILES.items() if name.endswith(drop_in.name)]
    drop_in.write_text(body, encoding="utf-8")
    analyze = program("systemd-analyze", package="systemd")
    command = [analyze, "--user", "--man=no", "--recursive-errors=no", "verify", str(path)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(short_path), "XDG_RUNTIME_DIR": str(short_path)}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (out.returncode, out.stderr) == (0, "")
    drop_in.write_text(body.replace("Nice", "Nicer"), encoding="utf-8")
    assert "Nicer" in subprocess.run(command, capture_output=True, text=True, env=env).stderr
