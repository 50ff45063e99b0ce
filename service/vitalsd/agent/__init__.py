"""The background agent, under launchd or systemd."""
