"""The router's logits of a batch, for kernels that choose the experts themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RouterLogits:
    """What the experts of each token are chosen by: the k best scores, the lowest expert first among equal ones.

    logits: bf16, fp16 or float32 `[T, E]` with contiguous rows.
    sigmoid: scores are sigmoids of the logits; if not, their softmax. NaN and infinite scores count as 0.
    renormalise: weights are divided by their sum over the chosen experts, if that is above 0.
    padding: bool `[T]`, contiguous; tokens that visit no expert. None if every token does.
    """

    logits: Tensor
    sigmoid: bool = False
    renormalise: bool = True
    padding: Tensor | None = None
