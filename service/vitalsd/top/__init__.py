"""
``vitalsd top``: a live view in the terminal.

`feed` has `news` from its `sessions`; `view` knows what is shown, `picture` draws it, `screen` puts it on a `terminal`,
and `plain` does without one.
"""
