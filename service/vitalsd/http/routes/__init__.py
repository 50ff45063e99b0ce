"""Answer requests: one module of routes for each subject."""
