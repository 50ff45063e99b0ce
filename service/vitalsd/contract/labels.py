"""Clean the label of a mark, as a client passed it."""

import logging

from vitalsd.contract.limits import LABEL_CHARACTERS

__all__ = ["clean_label"]

log = logging.getLogger("vitalsd")


def clean_label(label: object) -> str | None:
    """
    Return a label that can be recorded, made from what a program passed; never raise.

    A program must not fail because of the text of a mark. Each run of white space, such as a line break, becomes one
    space, characters that do not print become ``?``, and the 200th character of longer text becomes ``…``.

    Returns:
        The label; ``None``, with a warning in the log, for a value that is empty or no text.
    """
    if not isinstance(label, str):
        log.warning("a mark was not recorded: a label is text, not %s", type(label).__name__)
        return None
    label = label[: LABEL_CHARACTERS * 16]  # A label of megabytes would hold up its thread.
    text = "".join(c if c.isprintable() else "?" for c in " ".join(label.split()))
    if not text:
        log.warning("a mark was not recorded: its label is empty")
        return None
    return text if len(text) <= LABEL_CHARACTERS else f"{text[: LABEL_CHARACTERS - 1]}…"
