"""The checks that a request passes before a route sees it."""
