"""A local metrics sidecar: one process's CPU, memory and threads, on Linux and macOS."""
