"""Pages are compared by what they say: words exactly, computed numbers to their last digit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import assert_same, assert_says

ROW = "| olmoe-1b-7b fp8 | cute 0.1.0+a57c171e | 48 | 2026-11-22T00:46 | 1.045x | 12% | 1,234.5 | -0.1 | 1.2e-05 |"


@pytest.mark.parametrize(
    ("before", "after"),
    [("1.045x", "1.044x"), ("12%", "13%"), ("1,234.5", "1,234.6"), ("-0.1", "-0.2"), ("1.2e-05", "1.3e-05")],
)
def test_the_last_digit_may_differ_by_one(before: str, after: str) -> None:
    assert_same(ROW.replace(before, after), ROW)
    assert_says(f"so:\n{ROW}", ROW.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1.045x", "1.043x"),
        ("1.045x", "1.04x"),
        ("12%", "14%"),
        ("48", "49"),  # a count
        ("a57c171e", "a57c171f"),
        ("olmoe-1b", "olmoe-2b"),
        ("2026-11-22", "2026-11-23"),
        ("-0.1", "0.1"),
        ("1.2e-05", "1.2e-04"),
    ],
)
def test_anything_else_is_another_page(before: str, after: str) -> None:
    with pytest.raises(AssertionError, match="expected"):
        assert_same(ROW.replace(before, after), ROW)
    with pytest.raises(AssertionError, match="is not said"):
        assert_says(ROW, ROW.replace(before, after))


def test_neighbours_of_a_table_may_change_places() -> None:
    rows = ["| a | 1.05 |", "| b | 1.04 |", "| c | 1.03 |"]
    page = "\n".join(rows)
    assert_same("\n".join([rows[1], rows[0], rows[2]]), page)
    with pytest.raises(AssertionError, match="line 1"):
        assert_same("\n".join([rows[2], rows[1], rows[0]]), page)
    with pytest.raises(AssertionError, match="2 lines, not 3"):
        assert_same("\n".join(rows[:2]), page)


def test_no_page_is_compared_byte_for_byte() -> None:
    """What `filled` computes has floats in it, whose last bits are the processor's."""
    for path in Path(__file__).parents[1].glob("**/test_*.py"):
        assert not re.search(r"filled\([^)]*\)\)? == ", path.read_text()), path
