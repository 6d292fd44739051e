"""The layer's reference against one that looks every element up by itself, in float64; and that there is one only."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ramp_moe.errors import KernelError, ShapeError, UnknownNameError
from ramp_moe.runtime import reference as module
from ramp_moe.runtime.formats import dequantise
from ramp_moe.runtime.reference import activate, reference
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import ACTIVATIONS, Batch, MoEWeights
from ramp_moe.spec.shapes import scale_blocks
from torch import Tensor

ROOT = Path(__file__).parents[3]
EXPERTS, TOP_K, HIDDEN, TOKENS, LIMIT = 3, 2, 256, 5, 0.75
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
SCALED = [("fp8", inter, block) for inter in (128, 192, 80, 96) for block in scale_blocks(inter)]
CASES = [("bf16", 80, 0), ("fp16", 96, 0), *SCALED]
# Every case meets two activations, one of them with biases.
EACH = zip(CASES * 2, itertools.cycle((*ACTIVATIONS, ACTIVATIONS[0])), strict=False)
LAYERS = [(*case, activation, i >= len(CASES)) for i, (case, activation) in enumerate(EACH)]


def layer_of(dtype: str, inter: int, block: int, activation: str, biased: bool) -> MoEWeights:
    """Gate first. Scales differ by up to 16 from block to block, and biases are large: a wrong one shows."""
    generator = torch.Generator().manual_seed(inter + block)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float32)

    given: dict[str, Any] = {}
    if block:
        deep, wide = -(-inter // block), HIDDEN // block
        given["gate_up_scale"] = 4 ** (2 * torch.rand(EXPERTS, 2 * deep, wide, generator=generator) - 1) / 16
        given["down_scale"] = 4 ** (2 * torch.rand(EXPERTS, wide, deep, generator=generator) - 1) / 16
    if biased:
        given |= {"gate_up_bias": normal(EXPERTS, 2 * inter), "down_bias": normal(EXPERTS, HIDDEN).bfloat16()}
    if activation == "swiglu_clamped":
        given["limit"] = LIMIT
    gate_up, down = normal(EXPERTS, 2 * inter, HIDDEN) / 16, normal(EXPERTS, HIDDEN, inter) / 8
    return MoEWeights(gate_up.to(DTYPES[dtype]), down.to(DTYPES[dtype]), activation=activation, **given)


def batch_of(dtype: torch.dtype) -> Batch:
    """Experts named twice, and ids that are no expert's, at weights that must not be looked at."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, EXPERTS, (TOKENS, TOP_K), generator=generator, dtype=torch.int32)
    scores = torch.rand(ids.shape, generator=generator)
    ids[0], ids[1] = torch.tensor([1, 1]), torch.tensor([-1, EXPERTS])
    ids[2, 0], scores[2, 0], scores[1] = 2**31 - 1, math.nan, math.inf
    return Batch(torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype), ids, scores)


def element_by_element(weights: MoEWeights, batch: Batch, block: int) -> Tensor:
    """float64 `[T, H]`, of gate-first weights."""
    _, hidden, inter = weights.down.shape
    gate_up, down = weights.gate_up.double(), weights.down.double()
    if weights.gate_up_scale is not None and weights.down_scale is not None:
        rows = [half * -(-inter // block) + row // block for half in (0, 1) for row in range(inter)]
        columns, deep = [c // block for c in range(hidden)], [i // block for i in range(inter)]
        gate_up = gate_up * weights.gate_up_scale.double()[:, rows][:, :, columns]
        down = down * weights.down_scale.double()[:, columns][:, :, deep]
    out = torch.zeros(len(batch.hidden_states), hidden, dtype=torch.float64)
    for t, slot in itertools.product(range(batch.num_tokens), range(batch.top_k)):
        e = int(batch.topk_ids[t, slot])
        if not 0 <= e < EXPERTS:
            continue
        both = gate_up[e] @ batch.hidden_states[t].double()
        if weights.gate_up_bias is not None:
            both = both + weights.gate_up_bias[e].double()
        gate, up = both[:inter], both[inter:]
        match weights.activation:
            case "swiglu":
                act = gate / (1 + torch.exp(-gate)) * up
            case "gelu_tanh":
                act = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
            case "swiglu_oai":
                gate = gate.minimum(torch.tensor(7.0))
                act = gate / (1 + torch.exp(-1.702 * gate)) * (up.clip(-7, 7) + 1)
            case "swiglu_clamped":
                gate = gate.minimum(torch.tensor(LIMIT))
                act = gate / (1 + torch.exp(-gate)) * up.clip(-LIMIT, LIMIT)
            case unknown:
                raise AssertionError(f"write {unknown} here")
        y = down[e] @ act
        if weights.down_bias is not None:
            y = y + weights.down_bias[e].double()
        out[t] += float(batch.topk_weights[t, slot]) * y
    return out


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "inter", "block", "activation", "biased"), LAYERS)
def test_it_is_the_layer(dtype: str, inter: int, block: int, activation: str, biased: bool) -> None:
    weights = layer_of(dtype, inter, block, activation, biased)
    batch = batch_of(torch.float16 if dtype == "fp16" else torch.bfloat16)
    expected = element_by_element(weights, batch, block)
    for layout in LAYOUTS:
        out = reference(relayout(weights, layout), batch)
        assert (out.dtype, out.shape) == (torch.float32, (TOKENS, HIDDEN))
        assert error(out, expected) < 2e-6, layout
        assert not out[1].any(), "no id of this token is an expert"


@pytest.mark.parametrize(("dtype", "inter", "block"), CASES)
def test_our_kernels_reference_without_rounding_is_this_one(dtype: str, inter: int, block: int) -> None:
    kernels = pytest.importorskip("ramp_moe_kernels.reference")
    weights, batch = layer_of(dtype, inter, block, "swiglu", True), batch_of(torch.bfloat16)
    batch.topk_ids[2, 0] = -1  # it refuses other ids that are no expert
    scales = {name: getattr(weights, name) for name in ("gate_up_scale", "down_scale", "gate_up_bias", "down_bias")}
    out = kernels.experts(
        batch.hidden_states, weights.gate_up, weights.down, batch.topk_ids, batch.topk_weights, **scales
    )
    assert torch.equal(out, reference(weights, batch))


def test_parts_of_an_expert_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, batch = layer_of("bf16", 80, 0, "swiglu", True), batch_of(torch.bfloat16)
    whole = reference(weights, batch)
    monkeypatch.setattr(module, "PART", 2)
    assert error(reference(weights, batch), whole.double()) < 1e-6


def test_it_leaves_the_precision_of_products_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        reference(layer_of("bf16", 80, 0, "swiglu", False), batch_of(torch.bfloat16))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_it_refuses() -> None:
    one = torch.ones(1)
    with pytest.raises(UnknownNameError, match="swiglu"):
        activate(one, one, "swigloo")
    with pytest.raises(KernelError, match="swiglu_clamped needs a limit"):
        activate(one, one, "swiglu_clamped")
    with pytest.raises(ShapeError, match=r"must be \[1, 2\], not \[2, 1\]"):
        dequantise(torch.zeros(128, 256).to(torch.float8_e4m3fn), torch.ones(2, 1))


def test_nothing_else_computes_the_layer_in_torch() -> None:
    """Whoever calls an activation of torch's computes the layer once more."""
    found = set()
    for package in ("core", "kernels", "adapters"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    name = getattr(node.func, "attr", getattr(node.func, "id", None))
                    if name in ("silu", "gelu"):
                        found.add(file.relative_to(ROOT).as_posix())
    assert found == {"core/ramp_moe/runtime/reference.py"}, "build on ramp_moe.runtime.reference instead"
