"""Files by which the programs of one user find each other."""
