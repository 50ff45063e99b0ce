"""Read processes of macOS through Mach and libproc."""
