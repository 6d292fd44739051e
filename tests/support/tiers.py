"""Which cases of a test run before a commit, and which in CI alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """All values of a parameter; those that are not in `fast` are marked slow."""
    fast = list(fast)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
