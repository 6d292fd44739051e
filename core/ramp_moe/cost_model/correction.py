"""What measuring on the GPU at hand corrects a cost model by.

A correction is a factor for each candidate at each of a few batch sizes. Its logarithm is interpolated linearly in the
logarithm of the number of tokens, and stays as it is beyond the first and the last size. `CostModel.at` makes the model
that predicts batches of one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..spec.routing import FloatArray


@dataclass(frozen=True)
class Corrections:
    """Natural logarithms of the factors, float64 `[sizes]` by a candidate's name; `tokens [sizes]` ascend. A candidate
    that is not among them is not corrected."""

    tokens: tuple[int, ...]
    log_factors: Mapping[str, FloatArray]

    def at(self, names: Sequence[str], num_tokens: int) -> FloatArray:
        """The logarithms `[names]` for batches of `num_tokens`."""
        where, known = np.log(max(num_tokens, 1)), np.log(self.tokens)
        return np.array(
            [np.interp(where, known, self.log_factors[n]) if n in self.log_factors else 0.0 for n in names], np.float64
        )
