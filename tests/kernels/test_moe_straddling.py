"""fp8 layers whose intermediate size is no multiple of the scale block: against an oracle that looks up each element's
scale by its row and column, and each kernel that cannot compute them refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from moe_cases import H200, ROUTINGS, batch, error, expected, weights
from ramp_moe import MoEShape, get_registry
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.reference import activate, reference
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS, why_unsupported
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe.spec.shapes import scale_blocks
from ramp_moe_adapters.kernels.deep_gemm.kernel import DeepGEMM
from ramp_moe_kernels.cute.kernel import CuteMoE
from ramp_moe_kernels.triton.config import GemmConfig, Path, quantises_itself, scale_group
from ramp_moe_kernels.triton.kernel import TritonMoE, _path

KERNEL = TritonMoE()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter truncates where a GPU rounds to bf16.
DTYPE = torch.bfloat16 if GPU else torch.float16
EXPERTS, TOP_K, HIDDEN = 3, 2, 256
SIZES = [(16, 128), (80, 128), (192, 128), (192, 64), (320, 64)]
TOLERANCE = 1e-2
W8A8 = 0.1
"""Rounding normal values to fp8 is 0.043 from the exact layer on average."""


def layer_of(inter: int, block: int, hidden: int = HIDDEN, experts: int = EXPERTS) -> MoEWeights:
    """Scales that differ by up to 16 from block to block, so that a wrong one shows."""
    plain = weights(experts, hidden, inter, "fp8", DEVICE, block=block)
    generator = torch.Generator().manual_seed(inter + block)

    def spread(scale: torch.Tensor | None) -> torch.Tensor:
        assert scale is not None
        return scale * (4 ** (2 * torch.rand(scale.shape, generator=generator) - 1)).to(scale.device)

    return replace(plain, gate_up_scale=spread(plain.gate_up_scale), down_scale=spread(plain.down_scale))


def looked_up(layer: MoEWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 gate, up `[E, I, H]` and down `[E, H, I]` of a gate-first layer, each element by its own scale."""
    _, hidden, inter = layer.down.shape
    assert layer.gate_up_scale is not None
    assert layer.down_scale is not None
    block = hidden // layer.down_scale.shape[1]
    row, column = torch.arange(inter) // block, torch.arange(hidden) // block
    in_half = -(-inter // block)
    gate, up = (
        layer.gate_up[:, half * inter :][:, :inter].float() * layer.gate_up_scale[:, half * in_half + row][:, :, column]
        for half in (0, 1)
    )
    return gate, up, layer.down.float() * layer.down_scale[:, column][:, :, row]


def oracle(layer: MoEWeights, given: Batch) -> torch.Tensor:
    """float32 `[T, H]`, token by token, slot by slot."""
    gate, up, down = looked_up(layer)
    out = torch.zeros(given.hidden_states.shape, device=gate.device)
    for token, x in enumerate(given.hidden_states.float()):
        for e, weight in zip(given.topk_ids[token].tolist(), given.topk_weights[token], strict=True):
            if 0 <= e < len(gate):
                out[token] += weight * (down[e] @ activate(gate[e] @ x, up[e] @ x, "swiglu"))
    return out


def run(path: Path, layer: MoEWeights, given: Batch) -> torch.Tensor:
    out = torch.full_like(given.hidden_states, torch.nan)
    KERNEL.launch(KERNEL.describe(path, layer.shape(TOP_K)), KERNEL.prepare(layer), given, out, Workspace())
    return out


def check(path: Path, plain: MoEWeights, given: Batch, layout: str = "gate-first") -> None:
    """plain: gate first."""
    out = run(path, relayout(plain, layout), given)
    stored_as = torch.float32 if quantises_itself(path.up) else given.hidden_states.dtype
    same, exact = expected(plain, given, quantise=True, stored_as=stored_as), oracle(plain, given)
    assert error(out, same) < TOLERANCE
    assert error(out, exact) <= 1.1 * error(same, exact) < W8A8


def paths(inter: int) -> dict[str, Path]:
    """One of each kind of launch."""
    group = scale_group(MoEShape(EXPERTS, TOP_K, HIDDEN, inter))
    whole, narrow = GemmConfig(16, group, group), GemmConfig(16, max(32, group // 2), group)
    swap = group >= 64
    return {
        "quantises itself": Path(whole, replace(whole, swap=swap)),
        "quantises later": Path(narrow, narrow),
        "direct": Path(replace(narrow, split_k=2 if group < 128 else 1), narrow, direct=True),
        "direct, quantises itself": Path(whole, whole, direct=True),
        "swapped": Path(replace(whole, swap=swap), replace(whole, block_n=min(64, group), swap=swap)),
        "atomic": Path(narrow, replace(narrow, split_k=2 if inter > group else 1), atomic=True),
    }


# In one layout after the other, so that each size meets all.
KINDS = list(paths(192))
EACH = [*itertools.product(SIZES[1:4], KINDS), *itertools.product((SIZES[0], SIZES[4]), KINDS[:3])]
LAUNCHES = [(*size, case, layout) for (size, case), layout in zip(EACH, itertools.cycle(LAYOUTS), strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize(("inter", "block", "case", "layout"), LAUNCHES)
def test_every_launch(inter: int, block: int, case: str, layout: str) -> None:
    # Blocks of several steps are told apart by a second block.
    hidden = 256 if block > scale_blocks(inter)[-1] else 128
    given = batch(2, TOP_K, EXPERTS, hidden, "uniform", DEVICE, DTYPE)
    check(paths(inter)[case], layer_of(inter, block, hidden), given, layout)


@pytest.mark.parametrize("routing", [*ROUTINGS, "nobody"])
def test_every_routing(routing: str) -> None:
    plain = layer_of(80, 128, hidden=128)
    given = batch(3, TOP_K, EXPERTS, 128, "uniform" if routing == "nobody" else routing, DEVICE, DTYPE)
    if routing == "nobody":
        given = replace(given, topk_ids=torch.full_like(given.topk_ids, -1))
    check(_path(KERNEL.default_config(plain.shape(TOP_K), H200, 3)), plain, given)


@pytest.mark.parametrize(("inter", "block"), SIZES)
def test_references_look_scales_up_alike(inter: int, block: int) -> None:
    plain, given = layer_of(inter, block), batch(4, TOP_K, EXPERTS, HIDDEN, "uniform", DEVICE, DTYPE)
    assert error(expected(plain, given, quantise=False), oracle(plain, given)) < 1e-5
    assert error(reference(plain, given), oracle(plain, given)) < 1e-5
    for layout in LAYOUTS:
        assert torch.equal(expected(relayout(plain, layout), given, False), expected(plain, given, False))


@pytest.mark.parametrize("inter", [16, 80, 192])
def test_random_layers_of_the_profiler(inter: int) -> None:
    plain = random_weights(MoEShape(EXPERTS, TOP_K, HIDDEN, inter), DEVICE, 0)
    given = batch(4, TOP_K, EXPERTS, HIDDEN, "uniform", DEVICE, torch.bfloat16)
    assert error(reference(plain, given), oracle(plain, given)) < 1e-5


def test_a_wrong_block_would_show() -> None:
    """The scales of the neighbouring block are far beyond the tolerances."""
    plain, given = layer_of(192, 64), batch(4, TOP_K, EXPERTS, HIDDEN, "uniform", DEVICE, DTYPE)
    right = oracle(plain, given)
    for shift in (1, -1):
        assert plain.gate_up_scale is not None
        shifted = replace(plain, gate_up_scale=plain.gate_up_scale.roll(shift, 1))
        assert error(oracle(shifted, given), right) > 3 * W8A8


@pytest.mark.parametrize("inter", range(16, 513, 16))
def test_every_size_has_configurations(inter: int) -> None:
    shape = MoEShape(EXPERTS, TOP_K, HIDDEN, inter)
    group = scale_group(shape)
    assert KERNEL.unsupported(shape, H200) is None
    for path in KERNEL.paths(shape, H200):
        for gemm in (path.up, path.down):
            assert gemm.block_k == group
            assert group % gemm.block_n == 0
    # Blocks of every size that the weights may come with are whole groups, and no tile straddles the last of them.
    assert all(block % group == 0 for block in scale_blocks(inter))
    assert inter % group == 0 or scale_blocks(inter) == (128,)


def others(dtype: str) -> list[str]:
    """Kernels that are registered beside ours and compute blocks of 128."""
    shape, registry = MoEShape(128, 8, 4096, 256, dtype), get_registry()
    known = [name for name, k in registry.kernels.items() if why_unsupported(k, shape, H200) is None]
    return [name for name in known if name != KERNEL.name]


@pytest.mark.parametrize("name", others("fp8"))
@pytest.mark.parametrize("inter", [16, 80, 192, 320])
def test_the_others_refuse_in_one_short_line(inter: int, name: str) -> None:
    reason = get_registry().kernels[name].unsupported(MoEShape(128, 8, 4096, inter), H200)
    assert reason is not None
    assert f"intermediate_size {inter} is not a multiple of" in reason
    assert len(reason) < 100
    assert "\n" not in reason


def test_what_is_left_to_refuse() -> None:
    for hidden in (192, 2880):
        reason = KERNEL.unsupported(MoEShape(4, 2, hidden, 128), H200)
        assert reason == f"hidden_size {hidden} is not a multiple of the fp8 scale block 128"
    assert KERNEL.unsupported(MoEShape(4, 2, 256, 200), H200) is not None


def test_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As engines make one: kernels that need whole blocks are left out, with their reasons."""
    others = [DeepGEMM(), CuteMoE()]
    for kernel in others:
        monkeypatch.setattr(kernel, "unavailable", lambda: None)
    plain, given = layer_of(80, 128, hidden=128), batch(3, TOP_K, EXPERTS, 128, "uniform", DEVICE, DTYPE)
    layer = LayerRuntime(plain, TOP_K, H200, [*others, KERNEL])
    assert list(layer.configs()) == [KERNEL.name]
    out = layer(given.hidden_states, given.topk_ids, given.topk_weights)
    assert error(out, oracle(plain, given)) < W8A8


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33, 700])
@pytest.mark.parametrize(("inter", "block"), [(16, 128), (80, 128), (96, 32), (192, 64), (320, 128), (1472, 64)])
def test_sizes_on_a_gpu(inter: int, block: int, tokens: int) -> None:
    plain = layer_of(inter, block, hidden=1024, experts=16)
    path = _path(KERNEL.default_config(plain.shape(TOP_K), H200, tokens))
    stored_as = torch.float32 if quantises_itself(path.up) else DTYPE
    for routing, layout in zip(("skewed", "padded", "duplicates"), LAYOUTS, strict=True):
        given = batch(tokens, TOP_K, 16, 1024, routing, DEVICE, DTYPE)
        out = run(path, relayout(plain, layout), given)
        assert error(out, expected(plain, given, quantise=True, stored_as=stored_as)) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("inter", "block"), [(80, 128), (96, 32), (192, 64), (320, 128)])
def test_configurations_on_a_gpu(inter: int, block: int) -> None:
    plain = layer_of(inter, block, hidden=1024, experts=16)
    given = batch(40, TOP_K, 16, 1024, "skewed", DEVICE, DTYPE)
    wanted = {
        itself: expected(plain, given, quantise=True, stored_as=torch.float32 if itself else DTYPE)
        for itself in (True, False)
    }
    for path in KERNEL.paths(plain.shape(TOP_K), H200)[::6]:
        assert error(run(path, plain, given), wanted[quantises_itself(path.up)]) < TOLERANCE, path.name
