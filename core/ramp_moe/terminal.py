"""Makes text from files, plugins and the environment safe to print."""

from __future__ import annotations

import re

STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except the newline, marks that change the direction of text, and lone surrogates."""


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not show."""
    return STEERING.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
