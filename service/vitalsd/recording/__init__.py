"""Records of processes: in memory, on disk, and read back."""
