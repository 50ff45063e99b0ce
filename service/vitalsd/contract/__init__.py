"""Define the formats that other programs read."""
