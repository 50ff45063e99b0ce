"""Windows over targets: measured once, shared by all requests that ask at the same time."""
