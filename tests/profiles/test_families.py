"""What the cross-kernel study counts, of the profiles that ship."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from studies.families import tables

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages")]


def test_policies() -> None:
    """None is faster than the oracle; overheads are added; on one copy dispatch runs what that serves."""
    for case in tables.cases():
        us = case.policies
        for times in us.values():
            known = np.isfinite(times)
            assert (times[known] >= us["oracle"][known]).all()
        assert (us["choosing"] > us["one copy"] + 3).all()
        assert set(case.layouts(1).kernels) <= set(case.layouts(2).kernels) <= set(case.families)


def test_dispatch_is_worth_it_before_overheads() -> None:
    for dtype in tables.DTYPES:
        some = tables.judged(dtype=dtype)
        for policy in ("static", *(f"{f} tuned" for f in tables.present)):
            ratios = [c.over(policy, "dispatch") for c in some if policy in c.us]
            assert not ratios or np.log(ratios).mean() > 0


def test_the_trace_is_judged_on_its_second_half() -> None:
    """Of every dtype five batches of each size; choosing is paid."""
    cells = tables.unseen_cells()
    for dtype in tables.DTYPES:
        sizes = Counter(c.tokens for c in cells if (c.dtype, c.routing) == (dtype, tables.TRACE))
        assert dict(sizes) == dict.fromkeys((4, 16, 64, 256, 1024), 5)
    for c in cells:
        assert c.us["choosing"] > c.us["oracle"] + 3
        assert c.chosen.split("/")[0] in tables.present
