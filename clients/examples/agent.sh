#!/bin/sh
# Install an agent that follows a program by name, ask it for metrics once, and uninstall it:
#
#     sh clients/examples/agent.sh myapp
#
# VITALSD is the vitalsd to run instead of the one in PATH; further arguments are passed to `vitalsd agent`.
set -eu
vitalsd=${VITALSD:-vitalsd}
name=$1
shift

$vitalsd agent install --name "$name" "$@"
trap '$vitalsd agent uninstall "$@"' EXIT
$vitalsd agent status "$@"
# The first connection starts the agent if it is not running.
curl -s --max-time 10 "http://127.0.0.1:9779/metrics?window_ms=200" || echo "the agent does not answer yet"
