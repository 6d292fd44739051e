"""The layer in float32 torch, and how far an output may be from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from ..spec.launchable import Batch, MoEWeights
from ..spec.shapes import SCALE_BLOCK
from .relayout import relayout

LIMITS = {"fp8": 0.06, "bf16": 0.01, "fp16": 0.01}
"""Allowed relative error of the output, by weight dtype; one token, and one block of columns, may have twice as much.
What rounds x and the intermediates to fp8 is by that alone 0.041 to 0.046 from the exact layer."""


COLUMNS = 64
"""Columns of a block that is judged alone: no more than a tile that could be left out."""


PART = 4096
"""Routed ids that the reference computes at a time: its memory is small whatever one expert has to do."""


NEGLIGIBLE = 1e-3
"""A token's reference below this part of the usual one counts as if it were that large."""


def reference(weights: MoEWeights, batch: Batch) -> Tensor:
    """The layer, float32 `[T, H]`, with nothing rounded on the way; ids out of range are skipped."""
    x, ids = batch.hidden_states.float(), batch.topk_ids
    weights = relayout(weights, "gate-first")
    out = torch.zeros_like(x)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        for e in torch.bincount(ids[(ids >= 0) & (ids < len(weights.down))]).nonzero().flatten().tolist():
            gate_up = _dequantised(weights.gate_up[e].chunk(2), weights.gate_up_scale, e)
            down = _dequantised([weights.down[e]], weights.down_scale, e)
            for part in (ids == e).nonzero().split(PART):
                token, slot = part.unbind(1)
                projected = x[token] @ gate_up.T
                if weights.gate_up_bias is not None:
                    projected += weights.gate_up_bias[e]
                gate, up = projected.chunk(2, 1)
                y = _activated(gate, up, weights) @ down.T
                if weights.down_bias is not None:
                    y += weights.down_bias[e]
                out.index_add_(0, token, y * batch.topk_weights[token, slot, None])
    finally:
        torch.set_float32_matmul_precision(precision)
    return out


def _activated(gate: Tensor, up: Tensor, weights: MoEWeights) -> Tensor:
    """As ACTIVATIONS describes them."""
    if weights.activation == "swiglu_oai":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        return gate * torch.sigmoid(1.702 * gate) * up
    if weights.limit is not None:
        gate, up = gate.clamp(max=weights.limit), up.clamp(-weights.limit, weights.limit)
    return (gelu(gate, approximate="tanh") if weights.activation == "gelu_tanh" else silu(gate)) * up


def _dequantised(matrices: Sequence[Tensor], scale: Tensor | None, expert: int) -> Tensor:
    """float32 of one expert's matrices `[rows, columns]`, one above the other, which have scale blocks of their own."""
    plain = [w.float() for w in matrices]
    if scale is not None:
        for w, blocks in zip(plain, scale[expert].chunk(len(plain)), strict=True):
            rows, columns = w.shape
            w *= blocks.repeat_interleave(SCALE_BLOCK, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
    return torch.cat(plain)


def misfit(out: Tensor, expected: Tensor, dtype: str) -> str | None:
    """How far `out` `[T, H]` is from the float32 `expected`, where that is more than LIMITS allow for weights of
    `dtype`; None where it is near enough."""
    for where, error in _errors(out, expected).items():
        allowed = LIMITS[dtype] if where == "output" else 2 * LIMITS[dtype]
        if not error <= allowed:  # NaN is not, either
            return f"relative error {error:.3g} of {where}, allowed are {allowed}"
    return None


def _errors(out: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative error by Frobenius norms of the output, of its worst token and of its worst COLUMNS columns; NaN where
    anything is NaN."""
    wrong, size = (out.float() - expected).square(), expected.square()
    rows = _relative(wrong.sum(1), size.sum(1))
    padding = 0, -out.shape[1] % COLUMNS
    blocks = _relative(*(pad(t.sum(0), padding).view(-1, COLUMNS).sum(1) for t in (wrong, size)))
    token, block = int(rows.argmax()), int(blocks.argmax())  # NaN counts as the largest
    return {
        "output": float(_relative(wrong.sum(), size.sum())),
        f"token {token}": float(rows[token]),
        f"columns from {block * COLUMNS} on": float(blocks[block]),
    }


def _relative(wrong: Tensor, size: Tensor) -> Tensor:
    """Of sums of squares. Where the reference is zero, any error is infinite or next to it, none is 0."""
    floor = (NEGLIGIBLE**2 * size.mean()).clamp(min=torch.finfo(size.dtype).tiny)
    return (wrong / size.maximum(floor)).sqrt()
