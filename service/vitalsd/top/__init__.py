"""
``vitalsd top``: a live view in the terminal.

`feed` yields `events` of its `backends`. `view_state` has what is shown, `render` draws it, and `fullscreen` writes it
to a `terminal`; `line_output` writes to pipes and files.
"""
