"""The cross-kernel study's page says what is computed from the profiles that ship."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pages import assert_same

FOLDER = Path(__file__).parents[2] / "examples" / "families"


@pytest.fixture(scope="module")
def families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", FOLDER / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec.loader.exec_module(module)
        for name in ("policies", "unseen"):
            sys.modules.pop(name)
    return module


def test_the_page_is_that_of_the_profiles(families: ModuleType) -> None:
    page = (FOLDER / "README.md").read_text()
    assert_same(families.filled(page), page)
    front = families.FRONT.read_text()
    assert_same(families.filled(front, ["headline"]), front)
    assert_same(families.sheet().replace(",", " | "), (FOLDER / "cells.csv").read_text().replace(",", " | "))


def test_policies(families: ModuleType) -> None:
    """None is faster than hindsight; overheads are added; on one copy dispatch runs what that serves."""
    for case in families.cases():
        us = case.policies
        for times in us.values():
            known = np.isfinite(times)
            assert (times[known] >= us["hindsight"][known]).all()
        assert (us["choosing"] > us["one copy"] + 3).all()
        assert set(case.layouts(1).kernels) <= set(case.layouts(2).kernels) <= set(case.families)


def test_dispatch_is_worth_it_before_overheads(families: ModuleType) -> None:
    for dtype in families.DTYPES:
        some = families.judged(dtype=dtype)
        for policy in ("static", *(f"{f} tuned" for f in families.present)):
            ratios = [c.over(policy, "dispatch") for c in some if policy in c.us]
            assert not ratios or np.log(ratios).mean() > 0


def test_the_trace_is_judged_on_its_second_half(families: ModuleType) -> None:
    """Of every dtype five batches of each size; choosing is paid."""
    cells = families.unseen_cells()
    for dtype in families.DTYPES:
        sizes = Counter(c.tokens for c in cells if (c.dtype, c.routing) == (dtype, families.TRACE))
        assert dict(sizes) == dict.fromkeys((4, 16, 64, 256, 1024), 5)
    for c in cells:
        assert c.us["choosing"] > c.us["hindsight"] + 3
        assert c.chosen.split("/")[0] in families.present
