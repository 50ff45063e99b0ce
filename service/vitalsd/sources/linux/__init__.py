"""Processes of Linux, read from /proc."""
