"""
Run the thread of `native/duty.c` in a Python program with a sidecar, which `accuracy.py` measures from inside.

    python benchmarks/duty_host.py DUTY_LIBRARY BURST_US PERIOD_US

Prints the address of the sidecar, and then the output of `duty`. The thread never takes the interpreter lock, so its
clock at the edges of its bursts is exact to the microsecond.
"""

import ctypes
import sys

import vitalsd


def main() -> None:
    """Run the command line."""
    library = ctypes.CDLL(sys.argv[1])
    words = (ctypes.c_char_p * 3)(b"duty", *(word.encode() for word in sys.argv[2:4]))
    with vitalsd.start(port=0, record_interval_s=0) as sidecar:
        print(sidecar.url, flush=True)
        library.main(len(words), words)


if __name__ == "__main__":
    main()
