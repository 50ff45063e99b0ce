"""Build bug reports, and choose the crashed run that belongs to one."""
