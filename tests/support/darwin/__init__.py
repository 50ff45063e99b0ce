"""Simulate the kernel and libSystem of macOS on Linux."""
