"""Let the programs of one user find each other through files."""
