"""Looks at the tensors that a layer is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RoutingError, ShapeError
from ..spec.dense import check_dense

if TYPE_CHECKING:
    from torch import Tensor


def check_given(x: object, ids: object, weights: object, out: object, num_valid: object) -> None:
    """Raises ShapeError or RoutingError for what is no dense tensor."""
    check_dense(ShapeError, hidden_states=x)
    check_dense(RoutingError, topk_ids=ids, topk_weights=weights)
    if out is not None:
        check_dense(ShapeError, out=out)
    if getattr(num_valid, "is_nested", False):
        check_dense(RoutingError, num_valid=num_valid)


def in_range(ids: Tensor, num_experts: int) -> Tensor:
    """The ids, with those outside [0, num_experts] as -1, which `expert_histogram` skips as the kernels do."""
    return ids.masked_fill((ids < 0) | (ids > num_experts), -1)
