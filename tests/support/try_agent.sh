#!/bin/sh
# Install, ask, update and remove the background agent: tests/support/try_agent.sh .venv/bin/vitalsd
#
# It runs on a Mac under its launchd, and in tests/system/test_workflow.py over a stub of launchctl. Another agent of this user is
# replaced and removed.
set -eu
vitalsd=$1

ask() { # URL: an agent that is being started answers when it is there
	curl --silent --show-error --fail --max-time 30 --output /dev/null "$@"
}

fails() {
	if "$@" 2>/dev/null; then
		echo "this should have failed: $*" >&2
		exit 1
	fi
}

trap '"$vitalsd" agent uninstall >/dev/null 2>&1 || true' EXIT

echo "install"
"$vitalsd" agent install --port 19779
ask http://127.0.0.1:19779/healthz
"$vitalsd" agent status

echo "install again, unchanged"
"$vitalsd" agent install --port 19779
ask http://127.0.0.1:19779/healthz

echo "update"
"$vitalsd" agent install --port 19780
ask http://127.0.0.1:19780/healthz
fails ask http://127.0.0.1:19779/healthz

echo "uninstall"
"$vitalsd" agent uninstall
fails ask http://127.0.0.1:19780/healthz
test ! -e "$HOME/Library/LaunchAgents/org.vitalsd.agent.plist"
trap - EXIT
echo "the agent starts, answers, is updated and removed"
