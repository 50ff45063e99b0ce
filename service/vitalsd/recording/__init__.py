"""Record processes: in memory and on disk, and read what was recorded."""
