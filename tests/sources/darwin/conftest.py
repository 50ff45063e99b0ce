"""Which of these tests a machine can run: the simulator needs Linux beneath it, and a Mac needs none."""

import sys

if sys.platform == "darwin":
    collect_ignore = [
        "test_as_on_a_mac.py",
        "test_birth.py",
        "test_end_to_end.py",
        "test_exit.py",
        "test_libsystem.py",
        "test_simulator.py",
        "test_soak.py",
        "test_sources.py",
        "test_tape.py",
    ]
else:
    collect_ignore = ["test_emulated.py", "test_mac.py"]
