"""``vitalsd doctor``: what a sidecar promises, tried out on this machine, one line each."""
