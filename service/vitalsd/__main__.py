"""``python -m vitalsd``: the command line."""

from vitalsd.cli import main

main(prog_name="vitalsd")
