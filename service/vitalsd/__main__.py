"""``python -m vitalsd``, where the script directory is not on PATH."""

from vitalsd.cli import main

main(prog_name="vitalsd")
