"""Measure windows of targets once for all requests that ask at the same time."""
