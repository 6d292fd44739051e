"""The layer in plain torch, float32: what every kernel and every other implementation of it is compared with; and how
far an output may be from it.

T tokens, k experts per token, E experts, hidden size H, intermediate size I, scale blocks of `[B, B]`. Nothing here is
meant to be fast. Products follow `torch.get_float32_matmul_precision()`, but for `reference`, which sets it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from ..errors import KernelError, ShapeError, UnknownNameError
from ..spec.launchable import ACTIVATIONS, Batch, MoEWeights
from ..spec.shapes import SCALE_BLOCK, scale_block
from .relayout import copy_rows

LIMITS = {"fp8": 0.06, "bf16": 0.01, "fp16": 0.01}
"""Allowed relative error of the output, by weight dtype; one token, and one block of columns, may have twice as much.
What rounds x and the intermediates to fp8 is by that alone 0.041 to 0.046 from the exact layer."""


COLUMNS = 64
"""Columns of a block that is judged alone: no more than a tile that could be left out."""


PART = 4096
"""Routed ids that the reference computes at a time: its memory is small whatever one expert has to do."""


NEGLIGIBLE = 1e-3
"""A token's reference below this part of the usual one counts as if it were that large."""


OAI_LIMIT, OAI_SLOPE = 7.0, 1.702
"""Of swiglu_oai."""

Rounding = Callable[[Tensor], Tensor]
"""What becomes of an intermediate `[ids, I]`, float32, before the down projection."""


def reference(weights: MoEWeights, batch: Batch) -> Tensor:
    """The layer, float32 `[T, H]`, with nothing rounded on the way; ids out of range are skipped."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        return experts(
            batch.hidden_states.float(),
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
    rounding: Rounding | None = None,
) -> Tensor:
    """float32 `[T, H]`: the sum over each token's experts of weight * (down @ activation(gate_up @ x)).

    `x [T, H]` is float32. Weights of any float dtype, scales, biases, activation, limit and layout are those of
    MoEWeights, and are not checked again. Ids out of range are skipped, and their weights not looked at. `rounding` is
    applied to the intermediate; by default nothing is.
    """
    out = torch.zeros_like(x)
    inter = down.shape[2]
    block = SCALE_BLOCK if gate_up_scale is None else scale_block(gate_up_scale.shape[-1], x.shape[1], inter)

    def of(t: Tensor | None, e: int) -> Tensor | None:
        return None if t is None else t[e]

    def gate_first(t: Tensor | None, e: int, scale: bool = False) -> Tensor | None:
        if t is None or layout == "gate-first":
            return of(t, e)
        return copy_rows(t[e : e + 1], layout, torch.empty_like(t[e : e + 1]), "gate-first", inter, scale)[0]

    present = topk_ids[(topk_ids >= 0) & (topk_ids < len(down))]
    for e in torch.bincount(present).nonzero().flatten().tolist():
        of_gate_up = gate_first(gate_up, e)
        assert of_gate_up is not None
        whole_gate_up = plain(of_gate_up, gate_first(gate_up_scale, e, scale=True), block, matrices=2)
        whole_down = plain(down[e], of(down_scale, e), block)
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
    """One expert, float32 `[T, H]`, of float32 `x [T, H]`, `gate_up [2 I, H]`, gate rows first, and `down [H, I]`."""
    projected = x @ gate_up.T
    if gate_up_bias is not None:
        projected = projected + gate_up_bias.float()
    gate, up = projected.chunk(2, -1)
    intermediate = activate(gate, up, activation, limit)
    y = (intermediate if rounding is None else rounding(intermediate)) @ down.T
    return y if down_bias is None else y + down_bias.float()


def activate(gate: Tensor, up: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """The gated activation of two tensors of one shape. Raises UnknownNameError for one not in ACTIVATIONS,
    KernelError for swiglu_clamped without a limit.

    swiglu: silu(gate) * up. gelu_tanh: gelu(gate), by its tanh form, * up. swiglu_oai (gpt-oss): gate is cut off
    above 7 and up to [-7, 7], then gate * sigmoid(1.702 * gate) * (up + 1). swiglu_clamped (DeepSeek-V4): gate is cut
    off above `limit` and up to [-limit, limit], then silu(gate) * up.
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


def plain(w: Tensor, scale: Tensor | None, block: int, matrices: int = 1) -> Tensor:
    """float32 of `w [R, C]`: so many matrices, one above the other, with scale blocks of their own; None: unscaled."""
    if scale is None:
        return w.float()
    pairs = zip(w.chunk(matrices), scale.chunk(matrices), strict=True)
    return torch.cat([dequantise(part, blocks, block) for part, blocks in pairs])


def dequantise(w: Tensor, scale: Tensor, block: int = SCALE_BLOCK) -> Tensor:
    """float32 `[..., R, C]` of fp8 `w [..., R, C]` and `scale [..., ceil(R/B), ceil(C/B)]`; value = fp8 * scale.

    B is `block`; the last blocks may be short. Raises ShapeError for a scale of another shape.
    """
    rows, columns = w.shape[-2:]
    expected = (*w.shape[:-2], -(-rows // block), -(-columns // block))
    if scale.shape != expected:
        raise ShapeError(f"the scale of a weight {list(w.shape)} must be {list(expected)}, not {list(scale.shape)}")
    return w.float() * expanded(scale.float(), rows, columns, block)


def expanded(scale: Tensor, rows: int, columns: int, block: int) -> Tensor:
    """`[..., rows, columns]`: each element's scale, of `scale [..., ceil(rows/B), ceil(columns/B)]`; B is `block`."""
    return scale.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :columns]


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
