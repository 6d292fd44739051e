"""Which candidates are worth compiling: the few without which dispatch would lose most."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..cost_model.model import Candidate, CostModel
from ..spec.routing import FloatArray
from .shortlist import met_at

SIZES = tuple(1 << i for i in range(15))
"""Batch sizes on which candidates are weighed, if nothing is known of those that will be met. They count alike."""
ENOUGH = 0.002
"""Mean loss from which no further candidate is worth its seconds of compiling. For the recorded shapes about 20
configurations of the kernel that is compiled ahead reach it (`profiles/studies/compiling`)."""
MOST = 32
"""Most candidates that are worth compiling. Bounds the work for models of a kind that was never seen."""


class Worth:
    """Weighs candidates that can be launched at once against those that would have to be compiled.

    ready: names of candidates that can be launched. The loss of a batch is the time of the fastest of them over that of
    the fastest of all, less one.
    """

    def __init__(self, model: CostModel, ready: Collection[str], ep_size: int = 1) -> None:
        self._model, self._ep_size = model, ep_size
        self._column = {model.candidates[i].name: i for i in model.contenders.tolist()}
        self._ready = {name for name in self._column if name in ready}
        self._gone = set[str]()
        self._us: dict[int, FloatArray] = {}

    def add(self, name: str) -> None:
        """Count a candidate as one that can be launched."""
        self._ready |= {name} & self._column.keys()

    def remove(self, name: str) -> None:
        """Count a candidate as one that can never be launched."""
        self._ready.discard(name)
        self._gone.add(name)

    def loss(self, sizes: Sequence[int]) -> float:
        """Mean loss at these numbers of tokens; infinite if nothing is ready."""
        return float(np.mean([(now / best).mean() - 1 for now, best, _ in map(self._at, sizes)]))

    def next(self, sizes: Sequence[int], kernel: str | None = None) -> Candidate | None:
        """The candidate, of one kernel if that is named, that leaves the least mean loss at these numbers of tokens.
        None if the loss is small already, or nothing lowers it."""
        loss = self.loss(sizes)
        if not loss > ENOUGH:
            return None
        done, known = self._ready | self._gone, self._model.candidates
        open_ = [i for name, i in self._column.items() if name not in done and kernel in (None, known[i].kernel)]
        if not open_:
            return None
        after = np.zeros(len(open_))
        for now, best, us in map(self._at, sizes):
            after += (np.minimum(us[:, open_], now) / best).mean(0) / len(sizes)
        first = int(after.argmin())
        return self._model.candidates[open_[first]] if after[first] - 1 < loss else None

    def _at(self, tokens: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Predicted microseconds at a number of tokens: of the fastest that is ready and the fastest of all `[batches,
        1]`, and of each candidate `[batches, candidates]`."""
        if tokens not in self._us:
            shape = self._model.shape
            met = met_at(tokens, shape.num_experts, shape.top_k, self._ep_size)
            self._us[tokens] = self._model.at(tokens).cost(met)
        us = self._us[tokens]
        ready = [self._column[name] for name in self._ready]
        every = [i for name, i in self._column.items() if name not in self._gone]
        now = us[:, ready].min(1, keepdims=True) if ready else np.full((len(us), 1), np.inf)
        return now, us[:, every].min(1, keepdims=True), us


def worth_compiling(model: CostModel, ready: Collection[str], ep_size: int = 1) -> Iterator[Candidate]:
    """The candidates to compile for SIZES, those that save most first. Ends if ENOUGH is reached, or at MOST."""
    worth = Worth(model, ready, ep_size)
    for _ in range(MOST):
        if (found := worth.next(SIZES)) is None:
            return
        worth.add(found.name)
        yield found
