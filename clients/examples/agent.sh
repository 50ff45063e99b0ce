#!/bin/sh
# Have launchd or systemd follow a program by name, ask it once, and take everything back:
#
#     sh clients/examples/agent.sh myapp
#
# VITALSD names another vitalsd than the one on PATH; further arguments go to `vitalsd agent`.
set -eu
vitalsd=${VITALSD:-vitalsd}
name=$1
shift

$vitalsd agent install --name "$name" "$@"
trap '$vitalsd agent uninstall "$@"' EXIT
$vitalsd agent status "$@"
# The first connection starts it, if it does not run yet.
curl -s --max-time 10 "http://127.0.0.1:9779/metrics?window_ms=200" || echo "nobody answers yet"
