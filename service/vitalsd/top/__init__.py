"""``vitalsd top``: a live view in the terminal. `feed` brings the numbers, `view` draws, `screen` has the keys."""
