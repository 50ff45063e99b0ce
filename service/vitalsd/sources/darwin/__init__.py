"""Processes of macOS, read through Mach and libproc."""
