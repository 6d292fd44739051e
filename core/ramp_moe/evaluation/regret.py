"""How good a choice is, judged on measured times: regret against exhaustive search, and the policies to beat.

Regret of choosing c for a batch is time(c) / time(fastest) - 1, a fraction. The histogram choice of a row never comes
from a fit that saw the row. Either it is a test row, or rows are split into folds, and a fit on the other folds chooses
for each.

The fastest of many noisy cells flatters the oracle that everything is compared with. If batches were measured in
several runs, `selection_noise` tells how much: it chooses on one run and judges on another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ..cost_model.model import CostModel
from ..errors import ProfileError
from ..spec.routing import FloatArray, IntArray

IndexArray = NDArray[np.intp]
Labels = Sequence[tuple[int, str]]
"""Pairs (tokens, routing label), one for each row."""

DEALS = 5
"""Ways of dealing rows into folds over which a cross-validated figure is pooled. A single way would move it by a tenth.
"""

TABLE_SIZES = (1, 4, 16, 64, 256, 1024, 4096)
"""Batch sizes of the nearest-batch table: tuned at every fourth power of two, as shipped tables are at a few sizes."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Regret over batches, as fractions."""

    mean: float
    median: float
    p95: float
    max: float

    @classmethod
    def of(cls, regret: FloatArray) -> Summary:
        return cls(
            float(regret.mean()), float(np.median(regret)), float(np.quantile(regret, 0.95)), float(regret.max())
        )

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def regret(times_us: FloatArray, choices: IndexArray) -> FloatArray:
    """time(choice) / time(fastest) - 1 for each row of `times_us` [rows, candidates]."""
    chosen = times_us[np.arange(len(times_us)), choices]
    return np.asarray(chosen / times_us.min(1) - 1)


def folds(rows: int, num_folds: int = 5, seed: int = 0) -> list[IndexArray]:
    """Deal row indices at random into `num_folds` parts, fewer if there are fewer rows.

    Raises ProfileError below two rows.
    """
    if rows < 2:
        raise ProfileError(f"cross-validation needs at least two batches, there is {rows}; measure more routings")
    order = np.random.default_rng(seed).permutation(rows)
    n = min(num_folds, rows)
    return [np.sort(order[k::n]) for k in range(n)]


def cross_validated_choices(
    histograms: IntArray, fit: Callable[[IndexArray], CostModel], num_folds: int = 5, seed: int = 0
) -> IndexArray:
    """Choose for each row the candidate that a model fitted on the other folds predicts to be fastest.

    `fit(rows)` fits on those rows and must keep the order of candidates.
    """
    choices = np.empty(len(histograms), np.intp)
    for held_out in folds(len(histograms), num_folds, seed):
        rest = np.setdiff1d(np.arange(len(histograms)), held_out)
        choices[held_out] = fit(rest).cost(histograms[held_out]).argmin(1)
    return choices


def pooled_regret(times_us: FloatArray, deals: Sequence[IndexArray]) -> FloatArray:
    """Regret `[deals * rows]` of every row under every way of dealing the folds."""
    return np.concatenate([regret(times_us, choices) for choices in deals])


def static_table(times_us: FloatArray, labels: Labels) -> dict[int, int]:
    """Tune a static table: the fastest candidate by batch size on uniform routing, for a stack that sees the batch size
    alone."""
    uniform: dict[int, list[int]] = {}
    for i, (tokens, routing) in enumerate(labels):
        if routing == "uniform":
            uniform.setdefault(tokens, []).append(i)
    if not uniform:
        raise ProfileError("no batch with uniform routing was measured; static dispatch cannot be tuned without one")
    return {tokens: int(np.log(times_us[rows]).mean(0).argmin()) for tokens, rows in uniform.items()}


def table_choice(table: dict[int, int], tokens: int) -> int:
    """Look up the nearest batch size, the smaller one in a tie, as vLLM and Alpha-MoE do."""
    return table[min(sorted(table), key=lambda size: abs(size - tokens))]


def sparse_table(table: dict[int, int]) -> dict[int, int]:
    """Keep the entries at TABLE_SIZES only, or all if none was measured there."""
    return {tokens: c for tokens, c in table.items() if tokens in TABLE_SIZES} or table


def table_choices(table: dict[int, int], labels: Labels) -> IndexArray:
    """Choose for each row by the table: static dispatch."""
    return np.array([table_choice(table, tokens) for tokens, _ in labels], np.intp)


def single_choice(times_us: FloatArray) -> int:
    """Choose one candidate for everything: the best on geometric mean."""
    return int(np.log(times_us).mean(0).argmin())


def single_choices(times_us: FloatArray, num_folds: int = 5, seed: int = 0) -> IndexArray:
    """Choose one candidate for each fold: the best on the other folds."""
    choices = np.empty(len(times_us), np.intp)
    for held_out in folds(len(times_us), num_folds, seed):
        choices[held_out] = single_choice(times_us[np.setdiff1d(np.arange(len(times_us)), held_out)])
    return choices


def selection_noise(runs_us: FloatArray) -> FloatArray:
    """Regret, within one run, of what was fastest in another: what the noise of measuring alone costs.

    runs_us: `[runs, rows, candidates]`. Returns `[ordered pairs of runs, rows]`, without pairs if there is one run.
    """
    return np.array([regret(runs_us[judge], runs_us[chosen_on].argmin(1)) for chosen_on, judge in _pairs(runs_us)])


def split_half_regret(runs_us: FloatArray, choices: IndexArray) -> FloatArray:
    """Regret of choices within one run against the best of another run, `[ordered pairs, rows]`.

    It estimates time(choice) / time(best) - 1 against an oracle that noise does not flatter. Single values can be
    negative.
    """
    rows = np.arange(runs_us.shape[1])
    return np.array(
        [
            runs_us[judge, rows, choices] / runs_us[judge, rows, runs_us[chosen_on].argmin(1)] - 1
            for chosen_on, judge in _pairs(runs_us)
        ]
    )


def _pairs(runs_us: FloatArray) -> list[tuple[int, int]]:
    return list(itertools.permutations(range(len(runs_us)), 2))
