"""Install the background agent under launchd or systemd."""

from typing import Literal

from vitalsd.agent.base import Agent, Plan
from vitalsd.agent.launchd import Launchd
from vitalsd.agent.systemd import Systemd

__all__ = ["Supervisor", "supervisor"]

Supervisor = Literal["launchd", "systemd"]


def supervisor(kind: Supervisor, plan: Plan) -> Agent:
    """Return the agent of `plan` under `kind`."""
    return Launchd(plan) if kind == "launchd" else Systemd(plan)
