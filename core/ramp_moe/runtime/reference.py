"""The reference layer in plain torch and float32, and the error that a kernel's output may have against it.

Every other implementation of the layer is compared with this one. There are T tokens, k experts per token and E
experts, with hidden size H and intermediate size I. Nothing here is meant to be fast.
`reference` computes products in full float32; the other functions follow `torch.get_float32_matmul_precision()`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from ..errors import KernelError, UnknownNameError
from ..spec.formats import FORMATS, Format
from ..spec.launchable import ACTIVATIONS, Batch, MoEWeights
from ..spec.shapes import scale_blocks
from .formats import format_of, plain, through_fp8
from .relayout import copy_rows

LIMITS = {"fp8": 0.06, "bf16": 0.01}
"""Allowed relative error of the output, by what activations may be rounded to. One token, and one block of columns, may
have twice as much.

Rounding x and the intermediates to fp8 alone causes a relative error of 0.041 to 0.046."""
COLUMNS = 64
"""Columns of a block that is judged by itself: no more than a tile that a kernel might leave out."""
PART = 4096
"""Routed ids that the reference computes at a time, so that its memory stays small however many an expert has."""
NEGLIGIBLE = 1e-3
"""Least size of a token's reference in a relative error, as a share of the mean size. Smaller ones count as this."""
OAI_LIMIT, OAI_SLOPE = 7.0, 1.702
"""Constants of swiglu_oai (see ACTIVATIONS)."""

Rounding = Callable[[Tensor], Tensor]
"""Rounds an intermediate, float32 `[ids, I]`, before the down projection."""


def reference(weights: MoEWeights, batch: Batch, activations: str = "bf16") -> Tensor:
    """Compute the layer of the dequantised weights, float32 `[T, H]`. Ids out of range are skipped.

    activations: "bf16" rounds nothing on the way. "fp8" rounds the hidden states and the intermediates to fp8, with a
        scale for as many columns as the engines that serve the format take.

    Raises UnknownNameError for another word.
    """
    stored, x = format_of(weights), batch.hidden_states.float()
    if activations not in LIMITS:
        raise UnknownNameError("rounding of activations", activations, LIMITS)
    rounding = None
    if activations == "fp8":
        blocks = scale_blocks(weights.sizes[2])
        rounding = partial(through_fp8, group=blocks[-1] if stored.weights == "fp8" else stored.activation_group)
        x = rounding(x)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        return experts(
            x,
            weights.gate_up,
            weights.down,
            batch.topk_ids,
            batch.topk_weights,
            activation=weights.activation,
            limit=weights.limit,
            gate_up_scale=weights.gate_up_scale,
            down_scale=weights.down_scale,
            gate_up_bias=weights.gate_up_bias,
            down_bias=weights.down_bias,
            layout=weights.layout,
            stored=stored,
            rounding=rounding,
        )
    finally:
        torch.set_float32_matmul_precision(precision)


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str,
    limit: float | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: str,
    stored: Format,
    rounding: Rounding | None = None,
) -> Tensor:
    """Compute float32 `[T, H]`: the sum over each token's experts of weight * (down @ activation(gate_up @ x)).

    x: float32 `[T, H]`.
    topk_ids, topk_weights: `[T, k]`. Ids out of range are skipped, and their weights are not read.
    stored: format of the weights, with the side of their scale blocks (`formats.format_of`).
    rounding: applied to the intermediates; None leaves them.

    The other arguments are those of MoEWeights, with weights without scales of any float dtype. They are not checked
    again.
    """
    out = torch.zeros_like(x)
    inter = gate_up.shape[1] // 2

    def of(t: Tensor | None, e: int) -> Tensor | None:
        return None if t is None else t[e]

    def gate_first(t: Tensor | None, e: int) -> Tensor | None:
        if t is None or layout == "gate-first":
            return of(t, e)
        return copy_rows(t[e : e + 1], layout, torch.empty_like(t[e : e + 1]), "gate-first", inter)[0]

    present = topk_ids[(topk_ids >= 0) & (topk_ids < len(down))]
    for e in torch.bincount(present).nonzero().flatten().tolist():
        of_gate_up = gate_first(gate_up, e)
        assert of_gate_up is not None
        whole_gate_up = plain(of_gate_up, gate_first(gate_up_scale, e), stored, matrices=2)
        whole_down = plain(down[e], of(down_scale, e), stored)
        biases = gate_first(gate_up_bias, e), of(down_bias, e)
        for part in (topk_ids == e).nonzero().split(PART):
            token, slot = part.unbind(1)
            y = mlp(x[token], whole_gate_up, whole_down, activation, limit, *biases, rounding=rounding)
            out.index_add_(0, token, topk_weights[token, slot, None].float() * y)
    return out


def mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """Compute one expert, float32 `[T, H]`, of float32 `x [T, H]`, gate-first `gate_up [2 I, H]` and `down [H, I]`."""
    projected = x @ gate_up.T
    if gate_up_bias is not None:
        projected = projected + gate_up_bias.float()
    gate, up = projected.chunk(2, -1)
    intermediate = activate(gate, up, activation, limit)
    y = (intermediate if rounding is None else rounding(intermediate)) @ down.T
    return y if down_bias is None else y + down_bias.float()


def activate(gate: Tensor, up: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """Apply one of ACTIVATIONS, which has the formulas, to two tensors of one shape.

    Raises UnknownNameError for another activation, and KernelError for swiglu_clamped without a limit.
    """
    match activation:
        case "swiglu":
            return silu(gate) * up
        case "gelu_tanh":
            return gelu(gate, approximate="tanh") * up
        case "swiglu_oai":
            gate, up = gate.clamp(max=OAI_LIMIT), up.clamp(-OAI_LIMIT, OAI_LIMIT)
            return gate * torch.sigmoid(OAI_SLOPE * gate) * (up + 1)
        case "swiglu_clamped":
            if limit is None:
                raise KernelError("swiglu_clamped needs a limit")
            return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    raise UnknownNameError("activation", activation, ACTIVATIONS)


def misfit(out: Tensor, expected: Tensor, dtype: str) -> str | None:
    """Describe the error of `out` `[T, H]` against float32 `expected`, if it exceeds LIMITS for the format `dtype`.

    Returns None if it does not. NaN always exceeds them.
    """
    limit = LIMITS[FORMATS[dtype].activations]
    for where, error in _errors(out, expected).items():
        allowed = limit if where == "output" else 2 * limit
        if not error <= allowed:  # also refuses NaN
            return f"relative error {error:.3g} of {where}; at most {allowed} is allowed"
    return None


def _errors(out: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative errors, by Frobenius norms, of the output, of its worst token and of its worst COLUMNS columns.

    An error is NaN if its part of the output has a NaN.
    """
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
    """The relative error from sums of squares. If the reference is zero, an error is huge, and no error gives 0."""
    floor = (NEGLIGIBLE**2 * size.mean()).clamp(min=torch.finfo(size.dtype).tiny)
    return (wrong / size.maximum(floor)).sqrt()
