"""Run vitalsd: ``python -m vitalsd``, or a frozen application as its own sidecar."""

import sys

from vitalsd.sidecar.frozen import FLAG, supports_own_sidecar

__all__ = ["freeze_support"]


def freeze_support() -> None:
    """
    Let a frozen application be its own sidecar; its main module calls this before anything else.

    ``spawn()``, ``vitalsd doctor`` and ``vitalsd agent install`` run a frozen application again. In that second process
    this function runs vitalsd and does not return. In the application itself it returns at once.
    """
    supports_own_sidecar()
    if sys.argv[1:2] == [FLAG]:
        del sys.argv[1]
        _run()
        sys.exit()


def _run() -> None:
    from vitalsd.cli import main  # An application that is no sidecar need not import it.

    main(prog_name="vitalsd")


if __name__ == "__main__":
    _run()
