"""The settings of a sidecar: `vitalsd.sidecar.config`, and what is made from it."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from math import inf, nan
from pathlib import Path
from typing import Any

import click
import pytest

import vitalsd
from support.sidecars import environment
from vitalsd.cli.options import config_of
from vitalsd.cli.serve import serve
from vitalsd.exporters.otlp import DEFAULT_URL
from vitalsd.exporters.prometheus import THREAD_METRICS
from vitalsd.recording.recorder import RecorderConfig
from vitalsd.recording.series import Record
from vitalsd.sidecar.config import COLLECTOR_URL, DEFAULTS, SETTINGS, TIMEOUT, Setting, SidecarConfig, serve_arguments

OTHER: dict[str, Any] = {
    "pid": 4242,
    "name": "viewer",
    "app": "viewer",
    "app_version": "3.1",
    "exit_note_fd": 5,
    "target_script": "/main.py",
    "proc_root": "/host/proc",
    "host": "127.0.0.2",
    "port": 0,
    "record_interval_s": 0.25,
    "retention_s": 90.0,
    "black_box": False,
    "children": True,
    "tcp": False,
    "uds": "/tmp/v.sock",
    "auth": "token",
    "allow_remote": True,
    "ready_fd": 3,
    "exit_with_target": True,
    "linger_s": 7.5,
    "thread_metrics": False,
    "max_thread_metrics": 12,
    "otlp": "http://127.0.0.1:9",
    "otlp_interval_s": 15.0,
    "log_format": "json",
}
"""A value that is not the default, for each setting."""


def parsed(arguments: list[str]) -> SidecarConfig:
    return config_of(serve.make_context("serve", arguments))


def test_config_without_options_is_the_default() -> None:
    """`vitalsd serve` without options has the defaults of the table."""
    assert parsed([]) == DEFAULTS == SidecarConfig.checked()


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_travels_from_argument_to_option_and_back(name: str) -> None:
    """`serve` reads each option that `spawn` writes as the same value; nothing else changes."""
    value = OTHER[name]
    assert value != getattr(DEFAULTS, name)
    config = parsed(serve_arguments(**{name: value}))
    assert {each.name: getattr(config, each.name) for each in fields(config)} == {
        each: value if each == name else setting.default for each, setting in SETTINGS.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_default_of_a_setting_needs_no_option(name: str) -> None:
    """A command line holds what differs."""
    assert serve_arguments(**{name: getattr(DEFAULTS, name)}) == []


@pytest.mark.parametrize(("call", "takes"), [(vitalsd.start, 12), (vitalsd.spawn, 9)])
def test_arguments_of_a_start_are_settings_with_their_defaults(call: Callable[..., object], takes: int) -> None:
    """`start` and `spawn` have the names and defaults of the table, and document each argument."""
    settings = {**SETTINGS, "timeout_s": TIMEOUT}
    parameters = inspect.signature(call).parameters
    shared = {name: parameter.default for name, parameter in parameters.items() if name in settings}
    assert shared == {name: settings[name].default for name in shared}
    assert len(shared) == takes + 1
    documented = re.findall(r"^ {4}(\w+): ", inspect.getdoc(call).partition("Args:")[2], re.MULTILINE)  # type: ignore[union-attr]
    assert [name for name in documented if name in parameters] == list(parameters)


BOUNDED = [name for name, setting in SETTINGS.items() if setting.low != -inf]
BOUNDS = [(name, value) for name in BOUNDED for value in (SETTINGS[name].low, SETTINGS[name].high) if value != inf]
BEYOND = [
    (name, value)
    for name in BOUNDED
    for value in (-1, SETTINGS[name].low / 2, SETTINGS[name].high + 1)
    if value not in (inf, SETTINGS[name].low)
]


def option(setting: Setting, value: float) -> list[str]:
    return [setting.flag, str(value / setting.scale if setting.time else value)]


@pytest.mark.parametrize(("name", "value"), BOUNDS)
def test_bound_of_a_range_is_allowed_as_argument_and_as_option(name: str, value: float) -> None:
    """Both ends of a range belong to it."""
    SETTINGS[name].check(name, value)
    assert getattr(parsed(option(SETTINGS[name], value)), name) == value


@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_value_out_of_range_is_refused_as_argument_and_as_option(name: str, value: float) -> None:
    """The error names the setting, or the option."""
    setting = SETTINGS[name]
    with pytest.raises(ValueError, match=f"{name} is {setting.range_text}"):
        SidecarConfig.checked(**{name: value})
    with pytest.raises(click.UsageError) as raised:
        parsed(option(setting, value))
    assert setting.flag in raised.value.format_message()


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("value", [nan, -inf])
def test_setting_of_nan_or_infinity_is_refused(name: str, value: float) -> None:
    """It is in no range."""
    with pytest.raises(ValueError, match=f"{name} is "):
        SidecarConfig.checked(**{name: value})


def test_retention_has_one_range_in_minutes_and_in_seconds() -> None:
    """An option in minutes and an argument in seconds are one setting: from 1 s to a day."""
    assert parsed(["--retention", "15"]).retention_s == DEFAULTS.retention_s == 900
    assert parsed(["--retention", "0.5"]).retention_s == SidecarConfig.checked(retention_s=30).retention_s == 30
    with pytest.raises(ValueError, match="retention_s is from 1 to 86400"):
        SidecarConfig.checked(retention_s=0.5)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (Setting(None), ""),
        (Setting(1.0, low=0), "at least 0"),
        (Setting(1.0, low=0.01, high=3600, or_zero=True), "0 or from 0.01 to 3600"),
        (Setting("a", choices=("a", "b")), "'a' or 'b'"),
    ],
)
def test_range_of_a_setting_is_described_in_words(setting: Setting, text: str) -> None:
    """Errors and the documentation use the same description."""
    assert setting.range_text == text


def test_import_of_config_loads_only_the_standard_library() -> None:
    """`vitalsd.spawn` and ``vitalsd --help`` import it."""
    code = "import sys; before = {*sys.modules}; import vitalsd.sidecar.config; print(*{*sys.modules} - before)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in out.split()} - {"vitalsd"}
    assert loaded <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--bogus", "--ready-fd", "FD", "--log-format", "json"], "No such option '--bogus'"),
        (["--log-format=json", "--ready-fd=FD", "--port", "65536"], "65536 is not in the range"),
        (["--ready-fd", "FD", "surplus", "--log-format", "json"], "unexpected extra argument (surplus)"),
        (["--ready-fd", "FD", "--log-format", "json", "--port"], "'--port' requires an argument"),
        (["--log-format", "json", "--pid", "1", "--name", "x", "--ready-fd", "FD"], "--pid and --name exclude"),
    ],
)
def test_wrong_usage_is_reported_on_the_ready_fd_and_in_the_log_format(
    arguments: list[str], error: str, short_path: Path
) -> None:
    """Although the options could not all be read, the client gets the reason, and the log stays JSON."""
    reader, writer = os.pipe()
    try:
        process = subprocess.run(
            [sys.executable, "-m", "vitalsd", "serve", *(each.replace("FD", str(writer)) for each in arguments)],
            pass_fds=[writer],
            env=environment(short_path),
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    finally:
        os.close(writer)
    with open(reader, encoding="utf-8") as answers:
        [answer] = answers.read().splitlines()
    assert process.returncode == 2
    [logged] = map(json.loads, process.stderr.splitlines())
    assert error in json.loads(answer)["error"]
    assert error in logged["message"]


def test_defaults_below_the_sidecar_equal_those_of_the_settings() -> None:
    """Recorder and exporters may not import the settings; what they default to must not differ."""
    assert (RecorderConfig().interval_s, RecorderConfig().retention_s) == (
        DEFAULTS.record_interval_s,
        DEFAULTS.retention_s,
    )
    assert inspect.signature(Record).parameters["retention_ns"].default == DEFAULTS.retention_s * 10**9
    assert DEFAULTS.max_thread_metrics == THREAD_METRICS
    assert DEFAULT_URL == COLLECTOR_URL
