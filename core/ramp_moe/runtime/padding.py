"""Converts the number of valid tokens of a batch, those before its padding, to what kernels read."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, SupportsIndex

from ..errors import RoutingError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def valid_tokens(num_valid: Tensor | SupportsIndex | None, num_tokens: int, device: torch.device) -> Tensor | None:
    """Convert num_valid to int32 `[1]` on `device`; None stays None.

    A tensor int32 `[1]` or `[]` keeps its memory. An int becomes a new tensor, which a CUDA graph would hold for good,
    so a capture refuses ints. An int, or an integer of another dtype, is clamped to [0, num_tokens].

    Raises RoutingError for anything but one integer, for a tensor on another device, and for an int in a capture.
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
    if num_valid.dtype != torch.int32:  # clamped first, since a mere cast would wrap around
        num_valid = num_valid.long().clamp(0, num_tokens).to(torch.int32)
    return num_valid.reshape(1)


def valid_count(num_valid: SupportsIndex, num_tokens: int) -> int:
    """Convert num_valid, which is no tensor, to an int, clamped to [0, num_tokens]. Raises RoutingError for anything
    but one integer."""
    try:
        count = operator.index(num_valid)
    except TypeError:
        count = None
    if count is None or isinstance(num_valid, bool):
        raise RoutingError(f"num_valid must be one integer, an int or int32 [1], not {shown(num_valid)}")
    return min(max(count, 0), num_tokens)


def _from_int(num_valid: SupportsIndex, num_tokens: int, device: torch.device) -> Tensor:
    import torch

    count = valid_count(num_valid, num_tokens)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RoutingError(
            f"num_valid is the int {count}, which a CUDA graph would keep; give an int32 [1] tensor on {device}"
        )
    return torch.full((1,), count, dtype=torch.int32, device=device)
