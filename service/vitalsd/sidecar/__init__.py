"""Configure one sidecar, start it inside its client or as a process of its own, and end it."""
