"""
Declare every setting of a sidecar once: default, range, unit, help and the option of `vitalsd serve`.

The options of the commands, the defaults and checks of `start`, the command line of `spawn`, the options that an agent
refuses and the table in docs/operations.md (`make reference`) are made from it. A new setting is a field here and its
use in `vitalsd.sidecar.builder`; if a program may pass it, also an argument of `start` or `spawn`.

It needs the standard library alone, because a client that spawns imports it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

from vitalsd.contract.application import Application

__all__ = ["DEFAULTS", "DEFAULT_PORT", "SETTINGS", "TIMEOUT", "Auth", "Setting", "SidecarConfig", "serve_arguments"]

DEFAULT_PORT = 9779
"""Default TCP port. If another process listens on it, a sidecar without an explicit port takes a free one."""
COLLECTOR_URL = "http://127.0.0.1:4318"
"""Default URL of an OpenTelemetry Collector: 4318 is its port for OTLP/HTTP, on this machine."""
Auth = Literal["none", "token"]
LogFormat = Literal["text", "json"]
SECONDS = {"seconds": 1, "minutes": 60}
"""Units of an option that is a time, with the seconds in each."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Describe one setting. `default`, `low`, `high` and all values are in seconds if it is a time."""

    default: Any
    option: str = ""
    """Option of `vitalsd serve`: ``--name``, for a flag ``--name/--no-name``; one word alone reverses the default."""
    help: str = ""
    default_text: str = ""
    """What a default of ``None`` means."""
    whole: bool = False
    """Whether it is a whole number; with neither this nor `time` it is no number."""
    time: str = ""
    """Unit of the option, a key of `SECONDS`, if the setting is a time."""
    low: float = -inf
    high: float = inf
    or_zero: bool = False
    """Whether 0 is allowed although `low` is more."""
    choices: tuple[str, ...] = ()
    metavar: str = ""
    bare: str = ""
    """What the option without a value means; empty: it needs a value."""
    hidden: bool = False
    """Whether help and documentation leave it out, because `spawn` alone uses it."""
    set_by_agent: bool = False
    """Whether the supervisor decides it, or an option of `vitalsd agent` itself."""

    @property
    def is_flag(self) -> bool:
        """Return whether it is on or off."""
        return isinstance(self.default, bool)

    @property
    def flag(self) -> str:
        """Return the option as an error names it."""
        return self.option.partition("/")[0]

    @property
    def scale(self) -> int:
        """Return the seconds in one unit of the option; 1 if the setting is not a time."""
        return SECONDS.get(self.time, 1)

    @property
    def range_text(self) -> str:
        """Return the values that are allowed, in words; empty if there is no bound."""
        if self.choices:
            return " or ".join(map(repr, self.choices))
        if self.low == -inf:
            return ""
        zero = "0 or " if self.or_zero else ""
        return zero + (f"at least {self.low:g}" if self.high == inf else f"from {self.low:.10g} to {self.high:.10g}")

    def check(self, name: str, value: Any) -> None:
        """
        Check a value for the setting `name`.

        Raises:
            ValueError: it is out of range, or none of the choices.
        """
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} is {self.range_text}, not {value!r}")
        if value is None or self.low == -inf or (self.or_zero and value == 0):
            return
        if not self.low <= value <= self.high:
            raise ValueError(f"{name} is {self.range_text}")

    def arguments(self, value: Any) -> Sequence[str]:
        """Return the words of a command line that set it to `value`, which is not checked; none for the default."""
        if self.is_flag:
            value = bool(value)
        if value == self.default:
            return ()
        if self.is_flag:
            return (self.option.split("/")[not value] if "/" in self.option else self.option,)
        return (self.flag, str(value / self.scale if self.time else value))


def _setting(default: Any, option: str, help: str, **more: Any) -> Any:
    """Declare a field of `SidecarConfig`; see `Setting`."""
    return field(default=default, metadata={"setting": Setting(default, option, help, **more)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarConfig:
    """The settings of one sidecar, in the order in which ``vitalsd serve --help`` shows them."""

    pid: int | None = _setting(
        None,
        "--pid",
        "Measure the process with this id.",
        whole=True,
        low=1,
        high=2**31 - 1,
        metavar="N",
        set_by_agent=True,
    )
    name: str | None = _setting(
        None,
        "--name",
        "Measure your process of this name: of several the common ancestor of the others, or else the newest.",
        metavar="NAME",
        set_by_agent=True,
    )
    app: str | None = _setting(
        None, "--app", "Set the application id, by which reports find the runs of this program.", metavar="ID"
    )
    app_version: str | None = _setting(None, "--app-version", "Set the version of the application.", metavar="VERSION")
    exit_note_fd: int | None = _setting(
        None, "--exit-note-fd", "Of spawn(), see ExitNoteReader.", whole=True, low=0, hidden=True
    )
    target_script: str | None = _setting(
        None, "--target-script", "What the target runs, from spawn(), which knows.", hidden=True
    )
    proc_root: str = _setting(
        "/proc",
        "--proc-root",
        "Read procfs at this path (Linux), for example /host/proc in a container.",
        metavar="DIR",
    )
    host: str = _setting("127.0.0.1", "--host", "Listen on this address.", metavar="ADDRESS", set_by_agent=True)
    port: int | None = _setting(
        None,
        "--port",
        "Listen on this TCP port; 0 takes a free one.",
        default_text=f"{DEFAULT_PORT}, or a free one",
        whole=True,
        low=0,
        high=65535,
        metavar="PORT",
        set_by_agent=True,
    )
    record_interval_s: float = _setting(
        1.0,
        "--record-interval",
        "Record a snapshot at this interval; 0 records nothing.",
        time="seconds",
        low=0.01,
        high=3600,
        or_zero=True,
    )
    retention_s: float = _setting(900.0, "--retention", "Keep this much history.", time="minutes", low=1, high=86400)
    black_box: bool = _setting(
        True, "--black-box/--no-black-box", "Keep the record on disk as well, where it survives a crash."
    )
    children: bool = _setting(
        False,
        "--children",
        "Record the processes that the target has started, and theirs, with their names.",
    )
    tcp: bool = _setting(True, "--no-tcp", "Listen on the Unix socket alone.", set_by_agent=True)
    uds: str | Path | None = _setting(
        None,
        "--uds",
        "Create the Unix socket at this path.",
        default_text="in the runtime directory",
        metavar="PATH",
        set_by_agent=True,
    )
    auth: Auth = _setting(
        "none", "--auth", "With token, require the token of the runtime file over TCP.", choices=get_args(Auth)
    )
    allow_remote: bool = _setting(
        False, "--allow-remote", "Allow a --host that other machines can reach; needs --auth token."
    )
    ready_fd: int | None = _setting(
        None,
        "--ready-fd",
        "Write a line of JSON to this descriptor when ready.",
        whole=True,
        low=0,
        metavar="FD",
        set_by_agent=True,
    )
    exit_with_target: bool = _setting(
        False, "--exit-with-target", "End when the target of --pid ends.", set_by_agent=True
    )
    linger_s: float = _setting(
        30.0,
        "--linger",
        "Keep answering for this long after the target of --pid has ended, then end.",
        time="seconds",
        low=0,
    )
    thread_metrics: bool = _setting(
        True, "--thread-metrics/--no-thread-metrics", "Export a series for each thread to scrapers."
    )
    max_thread_metrics: int = _setting(
        256,
        "--max-thread-metrics",
        "Export at most N thread series to scrapers, the busiest ones.",
        whole=True,
        low=1,
        high=20_000,
        metavar="N",
    )
    otlp: str | None = _setting(
        None,
        "--otlp",
        "Push to this OpenTelemetry Collector over OTLP/HTTP.",
        bare=COLLECTOR_URL,
        metavar="[URL]",
    )
    otlp_interval_s: float = _setting(
        60.0, "--otlp-interval", "Push at this interval.", time="seconds", low=1, high=3600
    )
    log_format: LogFormat = _setting(
        "text",
        "--log-format",
        "Write stderr in this format: a line when ready, then only warnings and errors.",
        choices=get_args(LogFormat),
    )

    @classmethod
    def checked(cls, **values: Any) -> "SidecarConfig":
        """
        Return the configuration of `values`; what is not among them has its default.

        Raises:
            ValueError: a value is out of range, or the application cannot be one.
        """
        for name, value in values.items():
            SETTINGS[name].check(name, value)
        Application.checked(values.get("app"), values.get("app_version"))
        return cls(**values)

    @property
    def application(self) -> Application:
        """Return the application that the client named."""
        return Application(self.app, self.app_version)

    @property
    def needs_token(self) -> bool:
        """Return whether a client on TCP must send the token."""
        return self.auth == "token"

    @property
    def thread_series(self) -> int:
        """Return the number of threads that the answer to a scraper has."""
        return self.max_thread_metrics if self.thread_metrics else 0


SETTINGS: dict[str, Setting] = {each.name: each.metadata["setting"] for each in fields(SidecarConfig)}
"""Description of each field of `SidecarConfig`, in order."""
DEFAULTS = SidecarConfig()
"""The configuration without any option."""
TIMEOUT = Setting(10.0, help="Time for the start as a whole.", time="seconds", low=0, high=3600)
"""`timeout_s` of `start` and `spawn`."""


def serve_arguments(**values: Any) -> list[str]:
    """Return the options of `vitalsd serve` for settings, which it checks itself; a default needs none."""
    return [word for name, value in values.items() for word in SETTINGS[name].arguments(value)]
