#!/bin/sh
# Run a program with a sidecar that ends with it, from a shell, and print its metrics once:
#
#     sh clients/examples/watch.sh sleep 10
#
# VITALSD is the vitalsd to run instead of the one in PATH.
set -eu
vitalsd=${VITALSD:-vitalsd}

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
mkfifo "$directory/ready"

"$@" &
target=$!

# The sidecar writes one line of JSON to a descriptor when it is ready, so the script need not sleep.
$vitalsd serve --pid "$target" --exit-with-target --port 0 --ready-fd 3 3>"$directory/ready" 2>/dev/null &
sidecar=$!
read -r ready <"$directory/ready" || ready='{"error": "the sidecar did not start"}'

url=$(printf '%s\n' "$ready" | sed -n 's/.*"url": "\([^"]*\)".*/\1/p')
if [ -z "$url" ]; then
    echo "no sidecar: $ready" >&2
    wait "$target"
    exit 1
fi
curl -s "$url/metrics?window_ms=200"
echo

status=0
wait "$target" || status=$?
wait "$sidecar"
exit "$status"
