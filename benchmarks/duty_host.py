"""
A Python program that has the thread of `native/duty.c` in it, and a sidecar: what `accuracy.py` measures from inside.

    python benchmarks/duty_host.py DUTY_LIBRARY BURST_US PERIOD_US

Prints the address of the sidecar, and then all that `duty` prints. The thread never takes the interpreter's
lock, so what its clock says at the edges of its bursts is the truth to the microsecond.
"""

import ctypes
import sys

import vitalsd


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    words = (ctypes.c_char_p * 3)(b"duty", *(word.encode() for word in sys.argv[2:4]))
    with vitalsd.start(port=0, record_interval_s=0) as sidecar:
        print(sidecar.url, flush=True)
        library.main(len(words), words)


if __name__ == "__main__":
    main()
