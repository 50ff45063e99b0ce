"""Check for `vitalsd doctor`, on this machine, what a sidecar promises: one line for each check."""
