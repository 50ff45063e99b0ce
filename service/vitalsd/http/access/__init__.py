"""Check each request before a route handles it."""
