"""Splits batches of more tokens than a kernel takes in one launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..spec.launchable import Batch

if TYPE_CHECKING:
    from torch import Tensor

ALIGNED_TOKENS = 16
"""Parts begin at multiples of this many tokens, so that their tensors start as aligned as the whole batch's."""


def parts(batch: Batch, out: Tensor, most: int | None) -> Iterator[tuple[Batch, Tensor]]:
    """Yield views of the batch and of its output, with at most `most` tokens each and nearly equal in size.

    most: the kernel's limit; None if it takes any number.

    Each part writes its own rows of out, which may be hidden_states itself. If the two overlap otherwise, the parts
    read a copy.
    """
    tokens = batch.num_tokens
    if most is None or tokens <= most:
        yield batch, out
        return
    x = batch.hidden_states
    if overlap(x, out) and x.data_ptr() != out.data_ptr():
        x = x.clone()
    if most > ALIGNED_TOKENS:
        most -= most % ALIGNED_TOKENS
    each = -(-tokens // -(-tokens // most))
    each = min(most, -(-each // ALIGNED_TOKENS) * ALIGNED_TOKENS)
    for first in range(0, tokens, each):
        some = slice(first, first + each)
        yield Batch(x[some], batch.topk_ids[some], batch.topk_weights[some]), out[some]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
