"""Run the HTTP server: connections, their limits and their log."""
