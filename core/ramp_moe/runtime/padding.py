"""How many tokens of a batch are none of its padding, as a user says it and as kernels read it."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, SupportsIndex

from ..errors import RoutingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def valid_tokens(num_valid: Tensor | SupportsIndex | None, num_tokens: int, device: torch.device) -> Tensor | None:
    """num_valid as int32 `[1]` on `device`; the same memory if it is that already, or int32 `[]`.

    An int becomes a tensor, so a CUDA graph would hold it for good: in a capture it is refused. Below 0 it counts as
    0, above num_tokens as num_tokens. Raises RoutingError for what is no integer, has several, or lies elsewhere.
    """
    import torch

    if num_valid is None:
        return None
    if not isinstance(num_valid, torch.Tensor):
        return _from_int(num_valid, num_tokens, device)
    integral = not (num_valid.is_floating_point() or num_valid.is_complex() or num_valid.dtype == torch.bool)
    if not integral or num_valid.numel() != 1:
        raise RoutingError(
            f"num_valid must be one integer, an int or int32 [1], not {num_valid.dtype} {list(num_valid.shape)}"
        )
    if num_valid.device != device:
        raise RoutingError(f"num_valid is on {num_valid.device}, topk_ids on {device}; move it there")
    if num_valid.dtype != torch.int32:  # not a cast alone: a larger number must not wrap around
        num_valid = num_valid.long().clamp(0, num_tokens).to(torch.int32)
    return num_valid.reshape(1)


def _from_int(num_valid: SupportsIndex, num_tokens: int, device: torch.device) -> Tensor:
    import torch

    try:
        count = operator.index(num_valid)
    except TypeError:
        count = None
    if count is None or isinstance(num_valid, bool):
        raise RoutingError(f"num_valid must be one integer, an int or int32 [1], not {num_valid!r}")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RoutingError(
            f"num_valid is the int {count}, which a CUDA graph would keep; give an int32 [1] tensor on {device}"
        )
    return torch.full((1,), min(max(count, 0), num_tokens), dtype=torch.int32, device=device)
