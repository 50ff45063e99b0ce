"""
A client that gets frozen; see `test_frozen.py`.

CLIENT_MODE says how it calls vitalsd, CLIENT_COMMAND what `spawn` is given as `command`, and to CLIENT_LOG each copy
of it adds a line with its pid and arguments. After eight copies it ends at once: a defect must not fill the machine.
"""

import json
import os
import sys

with open(os.environ["CLIENT_LOG"], "a+", encoding="utf-8") as log:
    log.write(json.dumps([os.getpid(), sys.argv[1:]]) + "\n")
    log.flush()
    log.seek(0)
    if sum("--vitalsd-sidecar" not in line for line in log) > 8:
        sys.exit("too many copies")

mode = os.environ["CLIENT_MODE"]
if mode == "unmarked":  # as in a program that embeds Python, where nothing says that it is frozen
    del sys.frozen  # type: ignore[attr-defined]

import vitalsd  # noqa: E402

if mode == "supported":
    vitalsd.freeze_support()
if mode == "command line":  # the main module of a bundled vitalsd
    from vitalsd.cli import main

    main(prog_name="vitalsd")
command = json.loads(os.environ.get("CLIENT_COMMAND", "null"))
try:
    sidecar = vitalsd.spawn(port=0, command=command, options=["--linger", "30"], timeout_s=60)
except vitalsd.SpawnError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(3)
found = {"pid": os.getpid(), "sidecar": sidecar.pid, "url": sidecar.url, "unpacked": sys._MEIPASS}  # type: ignore[attr-defined]
print(json.dumps(found), flush=True)
if sys.stdin.readline() == "stop\n":
    print(sidecar.stop(), flush=True)
