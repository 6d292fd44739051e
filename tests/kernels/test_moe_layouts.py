"""The Triton path reads the weights in every layout: the same numbers give the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import batch, error, expected, weights
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import MoEWeights, Workspace
from ramp_moe_kernels.triton.config import GemmConfig, Path
from ramp_moe_kernels.triton.kernel import TritonMoE
from tiers import slow_except

KERNEL = TritonMoE()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW, WIDE = GemmConfig(16, 64, 128), GemmConfig(16, 128, 128)
PATHS = {
    "direct": Path(NARROW, NARROW, direct=True),
    "scheduled": Path(WIDE, NARROW),
    "swapped": Path(replace(WIDE, swap=True), replace(NARROW, swap=True)),
    "split_k": Path(replace(NARROW, split_k=2), NARROW),
    "direct split_k": Path(replace(NARROW, split_k=2), NARROW, direct=True),
}


def run(path: Path, layer: MoEWeights, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's output and the reference's."""
    experts, hidden = layer.down.shape[:2]
    given = batch(tokens, 2, experts, hidden, "padded", DEVICE, dtype)
    out = torch.full_like(given.hidden_states, float("nan"))
    KERNEL.launch(KERNEL.describe(path, layer.shape(2)), KERNEL.prepare(layer), given, out, Workspace())
    return out, expected(layer, given, quantise=layer.gate_up_scale is not None)


@pytest.mark.parametrize("case", slow_except(["swapped"], PATHS))
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_every_layout_gives_the_same_bits(dtype: str, case: str) -> None:
    layer = weights(4, 256, 128, dtype, DEVICE, bias=True)
    outs, references = zip(*(run(PATHS[case], relayout(layer, k), 3, torch.bfloat16) for k in LAYOUTS), strict=True)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(out, references[0]) for out in references)
    # The interpreter truncates where a GPU rounds to bf16.
    assert error(outs[0], references[0]) < 2e-2
    # And it does matter: the same bytes under another name are another layer.
    other, _ = run(PATHS[case], replace(layer, layout=LAYOUTS[1]), 3, torch.bfloat16)
    assert error(other, references[0]) > 0.5


@pytest.mark.parametrize("case", ["scheduled", "direct split_k"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_off_every_tile(layout: str, case: str) -> None:
    plain = weights(3, 528, 80, "fp16", DEVICE, "swiglu_oai", bias=True)
    wanted, reference_out = run(PATHS[case], plain, 3, torch.float16)
    out, _ = run(PATHS[case], relayout(plain, layout), 3, torch.float16)
    assert torch.equal(out, wanted)
    assert error(out, reference_out) < 5e-3


def test_it_says_so() -> None:
    assert KERNEL.readable_layouts(weights(1, 16, 16, "bf16", "cpu").shape(1)) == LAYOUTS
