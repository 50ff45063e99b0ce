"""One sidecar: its configuration, its start inside the client or beside it, and its end."""
