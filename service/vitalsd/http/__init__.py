"""Serve the HTTP API: server, access control, routes and the live page."""
