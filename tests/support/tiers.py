"""Marks the cases of a test that run only in CI, not before a commit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """All values of a parameter. Values that are not in `fast` are marked slow."""
    fast = list(fast)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
