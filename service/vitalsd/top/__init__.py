"""
Show a live view in the terminal: ``vitalsd top``.

`feed` yields the `events` of its `backends`. `view_state` holds the state of the view, `render` draws it, and
`fullscreen` writes it to a `terminal`; `line_output` writes to pipes and files.
"""
