"""Bug reports: which crashed run belongs to one, and how its members become an archive."""
