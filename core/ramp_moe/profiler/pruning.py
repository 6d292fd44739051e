"""Choosing which candidates are worth measuring on which batches, as far as the times so far tell.

Kernels are not rivals: a layer may have but one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..cost_model.model import Candidate
from ..spec.routing import IntArray
from .journal import Taken

BEHIND, TOO_FAR = 2.0, 20.0
"""A candidate is not timed on a batch if two things hold. There it is estimated to take TOO_FAR times as long as its
kernel's best. On the batch that the estimate comes from it took BEHIND times as long. These are tiny tiles on thousands
of tokens, which would otherwise take most of the time.
"""

KEPT = 3
"""Candidates of each kernel, the nearest to the best, that are never pruned."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimated time in microseconds, and whether the candidate was behind already.

    It assumes that time grows as the CTAs do. That is too much if the weights bind, which few CTAs read once.
    """

    us: float
    behind: bool


class Contest:
    """The candidates by name, and what a journal has of them. `histogram_of(row)` is int64 `[num_experts]`."""

    def __init__(
        self, candidates: Mapping[str, Candidate], histogram_of: Callable[[int], IntArray], taken: Taken
    ) -> None:
        self._candidates, self._histogram_of, self._taken = candidates, histogram_of, taken
        self._grids = {n: c.config.gemms[:1] for n, c in candidates.items()}
        self._blocks = {g[0].block_m: g[0] for g in self._grids.values() if g}
        self._tiles: dict[int, dict[int, int]] = {}

    def kernel_of(self, name: str) -> str:
        return self._candidates[name].kernel

    def best(self, us: Mapping[str, float]) -> dict[str, float]:
        """The shortest of these times, by kernel."""
        best: dict[str, float] = {}
        for name, t in us.items():
            kernel = self.kernel_of(name)
            best[kernel] = min(t, best.get(kernel, math.inf))
        return best

    def ratios(self, row: int, names: Collection[str], turns: int | None = None) -> dict[str, float]:
        """Median time of each visited candidate on a row, over that of its kernel's best. `turns` limits the visits
        that count."""
        visits = self._taken.visits.get(row, {})
        us = {n: float(np.median(np.concatenate(v[:turns]))) for n, v in visits.items() if n in names}
        best = self.best(us)
        return {n: t / best[self.kernel_of(n)] for n, t in us.items()}

    def estimates(self, row: int) -> dict[str, Estimate]:
        """Estimate each candidate's time on a row, from the timed batch with the most CTAs that has no more than this
        row.

        A candidate that was never timed on a batch with few enough CTAs has no estimate.
        """
        here = self._tiles_of(row)
        found: dict[str, tuple[int, Estimate]] = {}
        for other, visits in self._taken.visits.items():
            if other == row:
                continue
            there = self._tiles_of(other)
            us = {n: of_candidate[0][0] for n, of_candidate in visits.items() if self._grids[n]}
            best = self.best(us)
            for name, t in us.items():
                block = self._grids[name][0].block_m
                if found.get(name, (0,))[0] < there[block] <= here[block]:
                    behind = t >= BEHIND * best[self.kernel_of(name)]
                    found[name] = there[block], Estimate(t * here[block] / there[block], behind)
        return {name: estimate for name, (_, estimate) in found.items()}

    def _tiles_of(self, row: int) -> dict[int, int]:
        """M-tiles by token block: a candidate's CTAs are proportional to them."""
        if row not in self._tiles:
            histogram = self._histogram_of(row)
            self._tiles[row] = {block: int(grid.m_tiles(histogram)) for block, grid in self._blocks.items()}
        return self._tiles[row]

    def losers(self, rows: Sequence[int], factor: float, most: int, spared: Iterable[str]) -> list[str]:
        """List the candidates to prune, in the candidates' order.

        On none of these rows they are among the `most` fastest of their kernel and within `factor` of its best. KEPT of
        each kernel, and those that are `spared`, stay.
        """
        # Those that were pruned before an interruption count, too, so that the outcome is the same.
        dropped = self._taken.dropped
        names = [n for n in self._candidates if n not in dropped or dropped[n].pruned]
        nearest: dict[str, float] = {}
        winners = set(spared)
        for row in rows:
            ratios = self.ratios(row, names)
            for kernel in {self.kernel_of(n) for n in ratios}:
                own = sorted((n for n in ratios if self.kernel_of(n) == kernel), key=ratios.__getitem__)
                winners.update(n for n in own[:most] if ratios[n] <= factor)
            for name, ratio in ratios.items():
                nearest[name] = min(ratio, nearest.get(name, math.inf))
        for kernel in {self.kernel_of(n) for n in nearest}:
            winners.update(sorted((n for n in nearest if self.kernel_of(n) == kernel), key=nearest.__getitem__)[:KEPT])
        return [n for n in names if n in nearest and n not in winners and n not in dropped]


def cover(wanted: Mapping[str, Collection[str]]) -> list[str]:
    """Choose few names that have all keys between them: next is always the name with the most keys still missing."""
    missing = {key for keys in wanted.values() for key in keys}
    chosen = []
    while missing:
        name = max(wanted, key=lambda n: len(missing.intersection(wanted[n])))
        chosen.append(name)
        missing.difference_update(wanted[name])
    return chosen
