"""Text from files, plugins and the environment, made fit to be shown."""

from __future__ import annotations

import re

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but the newline, marks that change the direction of text, and halves of characters."""


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or could not show, as escapes."""
    return STEERING.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
