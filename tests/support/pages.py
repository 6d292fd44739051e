"""Text with computed numbers in it, compared as what it is: words exactly, numbers to their last printed digit."""

from __future__ import annotations

import re

FIGURE = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?"
NUMBER = re.compile(rf"(?<![\w.+-]){FIGURE}(?=x?(?:[^\w.]|\.(?!\w)|$))")
"""Counts, decimals and percents, ratios as 1.05x; not what a date, a version or a name is made of."""
SLACK = 1.001
"""A unit of the last digit, and what subtracting decimals as floats adds."""


def near(found: str, expected: str) -> bool:
    """Whether two printed numbers are at most a unit of the last digit apart. Counts must be equal."""
    if found == expected:
        return True
    (a, digits), (b, other) = _number(found), _number(expected)
    return None not in (digits, other) and digits == other and abs(a - b) <= SLACK * 10.0 ** -(digits or 0)


def _number(text: str) -> tuple[float, int | None]:
    """A number, and how many digits it has behind the point; None for a count."""
    plain = text.rstrip("%").replace(",", "")
    mantissa, _, exponent = plain.partition("e")
    _, point, decimals = mantissa.partition(".")
    if not point and not exponent and not text.endswith("%"):
        return float(plain), None
    return float(plain), len(decimals) - int(exponent or 0)


def same_line(found: str, expected: str) -> bool:
    """Whether two lines have the same words, and numbers that are near."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return False
    return all(map(near, NUMBER.findall(found), NUMBER.findall(expected)))


def assert_same(found: str, expected: str) -> None:
    """Fail with the lines that differ. Neighbouring rows of a table may have changed places: near values order them."""
    ours, theirs = found.splitlines(), expected.splitlines()
    assert len(ours) == len(theirs), f"{len(ours)} lines, not {len(theirs)}"
    at, wrong = 0, []
    while at < len(ours):
        if same_line(ours[at], theirs[at]):
            at += 1
        elif ours[at].startswith("|") and _swapped(ours[at : at + 2], theirs[at : at + 2]):
            at += 2
        else:
            wrong.append(f"line {at + 1}\n  found    {ours[at]}\n  expected {theirs[at]}")
            at += 1
    assert not wrong, "\n".join(wrong)


def _swapped(ours: list[str], theirs: list[str]) -> bool:
    return len(ours) == 2 and same_line(ours[0], theirs[1]) and same_line(ours[1], theirs[0])


def assert_says(page: str, text: str) -> None:
    """Fail unless a page has a text somewhere, its numbers near; line breaks are spaces."""
    page, text = " ".join(page.split()), " ".join(text.split())
    words = [re.escape(part) for part in NUMBER.split(text)]
    there = [m.group() for m in re.finditer(FIGURE.join(words), page)]
    assert any(same_line(t, text) for t in there), f"{text!r} is not said; near it: {there}"
