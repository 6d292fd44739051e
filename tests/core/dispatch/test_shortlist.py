"""Which candidates a graph holds: those that win on average, as many as pay for the switch, and what pruning costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from ramp_moe import CostModel, KernelError, RampMoEError, RoutingError, expert_histogram, generate
from ramp_moe.dispatch import shortlist as module
from ramp_moe.dispatch.shortlist import (
    DRAWN,
    MOST_DRAWN,
    VALID,
    Shortlist,
    _drawn,
    choice_by_batch_size,
    representative,
    shortlist,
)
from ramp_moe.evaluation.replay import Replay
from ramp_moe.spec.routing import TUNE_KINDS, IntArray

FREE = {1: 0.0, 512: 0.0}
TOKENS = 64


@pytest.fixture
def model(replay: Replay) -> CostModel:
    """152 configurations of Alpha-MoE, 64 experts of which a token has 8, all of which can be chosen."""
    return replay.fit(form="active")


def cut(model: CostModel, most: int, histograms: IntArray | None = None) -> Shortlist:
    """Without any price on bodies."""
    return shortlist(model, TOKENS, FREE, most, 0.0, histograms)


def test_only_contenders_are_captured(replay: Replay) -> None:
    model = replay.fit()
    assert len(model.contenders) < len(model.candidates)
    assert set(cut(model, 152).columns) <= set(model.contenders.tolist())


def forget() -> None:
    """What earlier calls have drawn."""
    representative.cache_clear()
    _drawn.cache_clear()


def test_the_first_is_the_best_single_one(model: CostModel) -> None:
    us = model.cost(representative(TOKENS, 64, 8))
    found = cut(model, 8)
    assert found.columns[0] == us.mean(0).argmin()
    assert cut(model, 1).columns == found.columns[:1]
    assert cut(model, 1).loss == cut(model, 1).single_loss == found.single_loss
    assert found.single_loss == pytest.approx((us[:, found.columns[0]] / us.min(1)).mean() - 1)


def test_its_figures_are_those_of_the_model(model: CostModel) -> None:
    us = model.cost(representative(TOKENS, 64, 8))
    found = shortlist(model, TOKENS, {1: 0.0, 2: 0.25, 8: 0.25}, 4, 0.0)
    assert 1 < len(found.columns) <= 4
    assert len(set(found.columns)) == len(found.columns)
    fastest = us[:, found.columns].min(1)
    assert found.loss == pytest.approx((fastest / us.min(1)).mean() - 1)
    assert found.gain_us == pytest.approx(us[:, found.columns[0]].mean() - fastest.mean())
    assert found.overhead_us == 0.25
    assert found.pays


def test_more_bodies_lose_less_until_none_is_lost(model: CostModel) -> None:
    sizes = (1, 2, 3, 4, 8, 152, 1000)
    found = [cut(model, most) for most in sizes]
    assert all(a.loss >= b.loss and a.gain_us <= b.gain_us for a, b in itertools.pairwise(found))
    assert all(len(s.columns) <= most for s, most in zip(found, sizes, strict=True))
    assert all(found[-1].columns[: len(s.columns)] == s.columns for s in found), "greedy: those before stay"
    assert found[0].loss > 0.005
    assert found[-1].loss == 0
    winners = set(model.cost(representative(TOKENS, 64, 8)).argmin(1).tolist())
    assert len(found[-1].columns) <= len(winners), "one that wins nowhere is not needed"


def test_it_is_the_same_every_time(model: CostModel) -> None:
    first = cut(model, 8)
    forget()
    representative(2 * TOKENS - 1, 64, 8)
    assert cut(model, 8) == first


def test_overhead_decides_how_many(model: CostModel) -> None:
    assert len(shortlist(model, TOKENS, {1: 0.0, 8: 0.0}, margin=0.0).columns) > 2
    dear = shortlist(model, TOKENS, {1: 0.0, 2: 1e4, 8: 1e4}, margin=0.0)
    assert (len(dear.columns), dear.gain_us, dear.overhead_us, dear.pays) == (1, 0.0, 0.0, False)
    # The second body saves a share of a microsecond; those after it less than they take.
    each = shortlist(model, TOKENS, {1: 0.0, 2: 0.0, 8: 1e4}, margin=0.0)
    assert (len(each.columns), each.overhead_us) == (2, 0.0)
    # What is between two given numbers lies between their overheads, and one body may have some, too.
    between = shortlist(model, TOKENS, {1: 100.0, 2: 50.0, 4: 10.0, 8: 1e4}, 3, margin=0.0)
    assert (len(between.columns), between.overhead_us) == (3, 30.0)


def test_a_gain_within_the_margin_is_not_believed(model: CostModel) -> None:
    us = model.cost(representative(TOKENS, 64, 8)).mean(0).min()
    gain = cut(model, 8).gain_us / us
    assert shortlist(model, TOKENS, FREE, margin=0.99 * gain).pays
    assert not shortlist(model, TOKENS, FREE, margin=1.01 * gain).pays


def test_ties_go_to_the_lowest_index(model: CostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    us = np.array([[3.0, 1.0, 3.0, 1.0], [3.0, 2.0, 1.0, 2.0]])
    monkeypatch.setattr(CostModel, "cost", lambda self, histograms: us)
    model.contenders = np.arange(us.shape[1])
    assert cut(model, 8).columns == (1, 2)


def test_candidates_that_cannot_be_together_are_not(model: CostModel) -> None:
    us = model.cost(representative(TOKENS, 64, 8))
    free = cut(model, 4)
    # Those that would be chosen, each in another group; the rest are of a group of their own, or of none.
    groups: list[object] = ["rest" if i % 2 else None for i in range(len(model.candidates))]
    for i, column in enumerate(free.columns):
        groups[column] = i % 2
    found = shortlist(model, TOKENS, FREE, 4, 0.0, groups=groups)
    assert len({groups[c] for c in found.columns}) == 1
    assert None not in {groups[c] for c in found.columns} or len(found.columns) == 1
    expected = us[:, found.columns].min(1).mean()
    for group in (0, 1, "rest"):
        columns = [c for c in range(len(groups)) if groups[c] == group]
        assert expected <= us[:, columns].mean(0).min()
    assert found.loss == pytest.approx((us[:, found.columns].min(1) / us.min(1)).mean() - 1)
    assert shortlist(model, TOKENS, FREE, 4, 0.0, groups=["same"] * len(groups)) == free
    assert shortlist(model, TOKENS, FREE, 4, 0.0, groups=[None] * len(groups)).columns == free.columns[:1]


def test_recorded_batches_decide_in_place_of_drawn_ones(model: CostModel) -> None:
    crowded = np.zeros((3, 64), np.int64)
    crowded[:, :8] = TOKENS
    found = cut(model, 8, crowded)
    best = int(model.cost(crowded)[0].argmin())
    assert (found.columns, found.loss, found.gain_us) == ((best,), 0.0, 0.0)
    assert best != cut(model, 1).columns[0]


@pytest.mark.parametrize("tokens", [1, 3, 64, 65])
def test_representative_batches(tokens: int) -> None:
    drawn = representative(tokens, 64, 8)
    assert drawn.dtype == np.int64
    full = [expert_histogram(generate(kind, tokens, 64, 8, 0), 64).tolist() for kind in TUNE_KINDS]
    assert all(h in drawn.tolist() for h in full)
    sums = drawn.sum(1)
    assert sums.max() == tokens * 8
    assert sums.min() == -(-tokens * 5 // 8) * 8
    assert (sums == tokens * 8).sum() >= len(drawn) / len(VALID)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_tokens": 0}, RoutingError, "captured for at least one token, not 0"),
        ({"num_tokens": 0, "histograms": np.ones((1, 64), int)}, RoutingError, "at least one token, not 0"),
        ({"most": 0}, KernelError, "needs at least one body, not 0"),
        ({"histograms": np.ones((2, 32), int)}, RoutingError, "has 32 entries, the shape has 64 experts"),
        ({"histograms": np.full((2, 64), 9)}, RoutingError, "counts 576 ids, more than tokens x top_k = 512"),
        ({"histograms": np.ones(64, int)}, RoutingError, r"must be \[batches, 64\], not \[64\]"),
        ({"histograms": np.ones((0, 64), int)}, RoutingError, r"must be \[batches, 64\], not \[0, 64\]"),
        ({"overhead_us": {}}, KernelError, "overhead of 1 to 8 bodies is needed, it is given for none"),
        ({"overhead_us": {1: 0.0, 4: 5.0}}, KernelError, r"of 1 to 8 bodies is needed, it is given for \[1, 4\]"),
        ({"overhead_us": {2: 4.0, 8: 5.0}}, KernelError, r"of 1 to 8 bodies is needed, it is given for \[2, 8\]"),
        ({"overhead_us": {1: 0.0, 8: -1.0}}, KernelError, "microseconds of at least 0"),
        ({"overhead_us": {1: 0.0, 8: float("nan")}}, KernelError, "microseconds of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(
    model: CostModel, change: Mapping[str, object], error: type[RampMoEError], message: str
) -> None:
    with pytest.raises(error, match=message):
        shortlist(**({"model": model, "num_tokens": TOKENS, "overhead_us": FREE, "most": 8} | change))


def test_one_candidate_where_reading_back_takes_longer_than_it_gains(
    model: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size stands for those down to 4/5 of it; the price decides, and what was found is not sought again."""
    best = shortlist(model, TOKENS, {1: 0.0, 8: 1e6}).columns
    assert (
        choice_by_batch_size(model, TOKENS, 1e6)
        == choice_by_batch_size(model, TOKENS, math.inf)
        == model.candidates[best[0]]
    )
    assert choice_by_batch_size(model, TOKENS, 0.01) is None
    gains = shortlist(model, TOKENS, {1: 0.0, 2: 0.01, 8: 0.01}).gain_us
    assert choice_by_batch_size(model, TOKENS, 2 * gains) is not None
    assert choice_by_batch_size(model, 57, 1e6) is choice_by_batch_size(model, 64, 1e6)
    monkeypatch.setattr(module, "shortlist", None)
    for tokens in range(57, 65):
        choice_by_batch_size(model, tokens, 1e6)


def test_large_sizes_are_chosen_for_by_batches_of_fewer_tokens(
    model: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    drawn = []
    monkeypatch.setattr(module, "generate", lambda kind, n, *of: drawn.append(n) or generate(kind, n, *of))
    for tokens in (1000, 1024, 1025, 30_000):
        assert choice_by_batch_size(model, tokens, 1e6) is not None
    assert max(drawn) == DRAWN
    forget()
    for tokens in (1024, 2048, 8192):  # as by batches of so many
        us = model.cost(representative(tokens, 64, 8)).mean(0)
        found = next(i for i, c in enumerate(model.candidates) if c == choice_by_batch_size(model, tokens, 1e6))
        assert us[found] < 1.01 * us.min()


def test_a_rank_gets_its_part_of_what_is_routed(model: CostModel) -> None:
    """64 experts of 256: a quarter of the ids on average, and the choice by batch size is made for them."""
    whole, part = (representative(TOKENS, 64, 8, ep_size) for ep_size in (1, 4))
    assert whole.shape == part.shape
    assert part.sum() == pytest.approx(whole.sum() / 4, rel=0.1)
    assert choice_by_batch_size(model, 256, 1e6, 4) != choice_by_batch_size(model, 256, 1e6)


@pytest.mark.parametrize("tokens", [MOST_DRAWN, MOST_DRAWN + 1, 3 * MOST_DRAWN, 2**20])
def test_long_batches_are_many_times_shorter_ones(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which no more than so many tokens are drawn: a graph of a million is planned in a second."""
    forget()
    drawn: list[int] = []
    monkeypatch.setattr("ramp_moe.dispatch.shortlist._drawn", lambda n, *of: drawn.append(n) or _drawn(n, *of))
    found = representative(tokens, 16, 2)
    assert max(drawn) <= MOST_DRAWN
    assert 2 * tokens * 0.99 < found.sum(1).max() <= 2 * tokens
    assert not found.flags.writeable
