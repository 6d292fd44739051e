"""The Triton path in the formats with row scales, and of 4 bits: every code, routing, layout and kind of launch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from moe_cases import H200, ROUTINGS, batch, error
from ramp_moe import Hardware, MoEShape
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime import formats
from ramp_moe.runtime.formats import per_row, quantise, through_fp8
from ramp_moe.runtime.reference import experts, misfit, reference
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.formats import FORMATS
from ramp_moe.spec.kernel import LAYOUTS, why_unsupported
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_kernels.triton.config import GemmConfig, Path, Variant, multiplies_fp8, quantises_itself, scale_group
from ramp_moe_kernels.triton.gemm import _load_packed
from ramp_moe_kernels.triton.kernel import TritonMoE, _path
from tiers import slow_except

KERNEL = TritonMoE()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter truncates where a GPU rounds to bf16.
HALF = torch.bfloat16 if GPU else torch.float16
NEW = ("fp8-channel", "fp8-tensor", "int4-g32", "int4-g128", "mxfp4")
PACKED = tuple(name for name in NEW if FORMATS[name].packed)
# Against the reference fed the same rounded inputs and intermediates. Dequantised weights are rounded to the half.
TOLERANCE = {name: 5e-3 if GPU and name in PACKED else 1e-3 if name in PACKED else 1e-2 for name in NEW}


def layer(name: str, experts: int = 4, hidden: int = 128, inter: int = 128, bias: bool = False) -> MoEWeights:
    made = random_weights(MoEShape(experts, 1, hidden, inter, name), DEVICE, seed=experts)
    if not bias:
        return made
    generator = torch.Generator().manual_seed(1)
    sizes = (experts, 2 * inter), (experts, hidden)
    gate_up, down = (torch.randn(size, generator=generator).to(DEVICE) for size in sizes)
    return replace(made, gate_up_bias=gate_up, down_bias=down)


def given(tokens: int, routing: str, weights: MoEWeights, top_k: int = 2, seed: int = 0) -> Batch:
    return batch(tokens, top_k, weights.sizes[0], weights.sizes[1], routing, DEVICE, HALF, seed)


def run(path: Path | None, weights: MoEWeights, b: Batch) -> torch.Tensor:
    """The output of a path; of the default one if that is None."""
    shape = weights.shape(b.top_k)
    config = KERNEL.default_config(shape, H200, b.num_tokens) if path is None else KERNEL.describe(path, shape)
    out = torch.full_like(b.hidden_states, float("nan"))
    KERNEL.launch(config, KERNEL.prepare(weights), b, out, Workspace())
    return out


def wanted(path: Path | None, weights: MoEWeights, b: Batch) -> torch.Tensor:
    """The reference, fed what the path rounds to fp8: groups of a token's columns."""
    shape = weights.shape(b.top_k)
    if not multiplies_fp8(shape):
        return reference(weights, b)
    path = path or _path(KERNEL.default_config(shape, H200, b.num_tokens))
    through = partial(through_fp8, group=scale_group(shape))
    stored_as = torch.float32 if quantises_itself(path.up) else b.hidden_states.dtype
    fields = ("gate_up_scale", "down_scale", "gate_up_bias", "down_bias", "activation", "limit", "layout")
    return experts(
        through(b.hidden_states.float()),
        weights.gate_up,
        weights.down,
        b.topk_ids,
        b.topk_weights,
        stored=weights.stored,
        rounding=lambda h: through(h.to(stored_as).float()),
        **{field: getattr(weights, field) for field in fields},
    )


def check(path: Path | None, weights: MoEWeights, b: Batch) -> None:
    out, same, exact = run(path, weights, b), wanted(path, weights, b), reference(weights, b)
    assert error(out, same) < TOLERANCE[weights.stored.weights]
    # Rounding activations is most of the error; the kernel adds next to nothing.
    assert error(out, exact) <= 1.05 * error(same, exact) + 5e-3


# --- codes ------------------------------------------------------------------------------------------------------------


@triton.jit
def dequantise_kernel(w, s, out, C: tl.constexpr, PACKED: tl.constexpr, SCALE: tl.constexpr):
    row = tl.arange(0, C.BN)
    ptrs = w + row[:, None] * (C.BK // 2) + tl.arange(0, C.BK // 2)
    tile = _load_packed(ptrs, s + row * (C.BK // SCALE), 0, C.BK, tl.float32, C, PACKED, SCALE)
    tl.store(out + row[:, None] * C.BK + tl.arange(0, C.BK), tile)


@pytest.mark.parametrize("name", PACKED)
def test_every_byte_under_every_scale(name: str) -> None:
    """Each row has a scale of its own, or as many as groups; rows hold all 256 bytes, the scales all powers of two."""
    group = FORMATS[name].scale_columns
    assert group is not None
    columns, rows = 512, 256
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(rows, 1)
    if name == "mxfp4":
        scale = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None].repeat(1, columns // group)
        scale = (scale.int() + torch.arange(columns // group, device=DEVICE)).to(torch.uint8)
    else:
        scale = torch.randn(rows, columns // group, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    out = torch.empty(rows, columns, dtype=torch.float32, device=DEVICE)
    whole = Variant(BM=16, BN=rows, BK=columns, GROUP_M=1, SWAP=False, EVEN_K=True, EVEN_N=True, STAGES=0)
    dequantise_kernel[(1,)](packed, scale, out, C=whole, PACKED=FORMATS[name].element, SCALE=group, num_warps=8)
    expected = formats.plain(packed, scale, FORMATS[name])
    assert expected.isnan().any() == (name == "mxfp4"), "255 is no power of two"
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


# --- layers -----------------------------------------------------------------------------------------------------------


ROUTED = [(name, 5, routing) for name in ("fp8-channel", "int4-g32", "mxfp4") for routing in ROUTINGS]
ROUTED += [(name, 5, "padded") for name in ("fp8-tensor", "int4-g128")] + [(name, 1, "uniform") for name in NEW]


@pytest.mark.parametrize("case", slow_except([r for r in ROUTED if r[2] == "padded"], ROUTED))
def test_default_configurations(case: tuple[str, int, str]) -> None:
    name, tokens, routing = case
    weights = layer(name)
    check(None, weights, given(tokens, routing, weights))


STEP, GROUP = GemmConfig(16, 64, 64), GemmConfig(16, 64, 128)
PATHS = {
    "direct": Path(replace(STEP, block_n=32), STEP, direct=True),
    "direct split-k": Path(replace(STEP, split_k=2), STEP, direct=True),
    "atomic": Path(replace(STEP, split_k=2), replace(STEP, split_k=2), atomic=True),
    "swapped": Path(replace(STEP, swap=True), replace(STEP, swap=True)),
    "wide": Path(GemmConfig(64, 32, 128), GemmConfig(64, 64, 128, group_m=8)),
}
FP8_PATHS = {  # a step is a group of activations
    "direct": Path(replace(GROUP, block_n=128), GROUP, direct=True),
    "split-k": Path(replace(GROUP, split_k=2), GROUP),
    "atomic": Path(GROUP, GROUP, atomic=True),
    "swapped": Path(replace(GROUP, block_n=128, swap=True), replace(GROUP, swap=True)),
}
KINDS = [(name, case) for name in ("int4-g32", "mxfp4") for case in PATHS] + [("int4-g128", "direct split-k")]


@pytest.mark.parametrize("kind", slow_except([k for k in KINDS if "split-k" in k[1]], KINDS))
def test_every_kind_of_launch(kind: tuple[str, str]) -> None:
    name, case = kind
    weights = layer(name, bias=True)
    check(PATHS[case], weights, given(3, "padded", weights))


@pytest.mark.parametrize("case", slow_except(["direct"], FP8_PATHS))
def test_every_kind_of_launch_with_channel_scales(case: str) -> None:
    weights = layer("fp8-channel", hidden=256, bias=True)
    check(FP8_PATHS[case], weights, given(3, "padded", weights))


@pytest.mark.parametrize("name", ["int4-g32", "mxfp4"])
@pytest.mark.parametrize("case", slow_except(["swapped"], ["direct split-k", "swapped", "wide"]))
def test_sizes_off_every_tile(name: str, case: str) -> None:
    """The last step is of one group, or of two of four; gpt-oss has 2880 columns."""
    weights = layer(name, 4, 160, 96, bias=True)
    check(PATHS[case], weights, given(3, "uniform", weights))


@pytest.mark.parametrize("inter", [192, 80, 96])
def test_channel_scales_of_shards_with_a_short_group(inter: int) -> None:
    weights = layer("fp8-channel", inter=inter, bias=True)
    for tokens in (1, 3):
        check(None, weights, given(tokens, "uniform", weights))


@pytest.mark.parametrize("name", slow_except(["fp8-tensor", "mxfp4"], NEW))
def test_every_layout_gives_the_same_bits(name: str) -> None:
    weights, path = layer(name, bias=True), PATHS["swapped"]
    if not FORMATS[name].packed:
        path = None
    b = given(3, "padded", weights)
    outs = [run(path, relayout(weights, layout), b) for layout in LAYOUTS]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert error(outs[0], wanted(path, weights, b)) < TOLERANCE[name]


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("name", ["fp8-channel", "mxfp4"])
def test_activations(name: str, activation: str) -> None:
    weights = replace(layer(name, bias=True), activation=activation)
    check(None, weights, given(5, "duplicates", weights))


@pytest.mark.parametrize("name", ["fp8-channel", "int4-g32"])
def test_nan_stays_in_its_token(name: str) -> None:
    weights = layer(name)
    for tokens in (2, 5):
        b = given(tokens, "uniform", weights)
        clean = run(None, weights, b)
        b.hidden_states[1, 7] = float("nan")
        out = run(None, weights, b)
        assert out[1].isnan().all()
        others = torch.arange(tokens, device=DEVICE) != 1
        assert torch.equal(out[others], clean[others])


def test_one_workspace_serves_layers_of_every_format() -> None:
    """INT4 and MXFP4 have tensors of the same shapes: a plan of one is none of the other's."""
    workspace = Workspace()
    for name in ("int4-g32", "mxfp4", "int4-g32", "fp8-tensor", "fp8-channel"):
        weights = layer(name)
        b = given(5, "uniform", weights)
        out = torch.full_like(b.hidden_states, float("nan"))
        config = KERNEL.default_config(weights.shape(2), H200, 5)
        KERNEL.launch(config, KERNEL.prepare(weights), b, out, workspace)
        assert error(out, wanted(None, weights, b)) < TOLERANCE[name], name


def test_another_order_of_nibbles_is_another_layer() -> None:
    weights = layer("int4-g32")
    b = given(5, "uniform", weights)
    swapped = replace(weights, gate_up=weights.gate_up << 4 | weights.gate_up >> 4)
    assert misfit(run(None, swapped, b), reference(weights, b), "int4-g32-a8") is not None


def test_scales_of_any_float() -> None:
    weights = layer("int4-g32")
    b = given(5, "uniform", weights)
    for dtype in (torch.float16, torch.float32):
        check(None, replace(weights, gate_up_scale=weights.gate_up_scale.to(dtype)), b)
    channel = layer("fp8-channel")
    check(None, replace(channel, down_scale=channel.down_scale.bfloat16()), b)


def test_a_scale_of_a_matrix_is_one_for_each_row() -> None:
    weights = layer("fp8-tensor")
    b = given(5, "uniform", weights)
    assert KERNEL.prepare(layer("int4-g32")).stored.name == "int4-g32"
    assert torch.equal(run(None, weights, b), run(None, per_row(weights), b))


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_kernel_that_works_everywhere(name: str, h200: Hardware) -> None:
    shape = MoEShape(64, 8, 2048, 1024, name)
    reason = why_unsupported(KERNEL, shape, h200)
    if FORMATS[name].element == "e4m3" and not FORMATS[name].rounds:
        assert "takes weights in" in (reason or "")
    else:
        assert reason is None
        assert len(KERNEL.configs(shape, h200)) >= 100
    if FORMATS[name].packed:
        assert "is not a multiple of the" in (why_unsupported(KERNEL, replace(shape, intermediate_size=48), h200) or "")


@pytest.mark.parametrize("device", ["a100-sxm", "mi300x", "l40s", "rtx-pro-6000"])
def test_4_bits_need_no_fp8_units(device: str) -> None:
    from ramp_moe import get_registry

    hardware = get_registry().device(device)
    for name in PACKED:
        shape = MoEShape(64, 8, 2048, 1024, name)
        assert why_unsupported(KERNEL, shape, hardware) is None
        assert KERNEL.configs(shape, hardware)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEW)
def test_hard_routings_on_a_gpu(name: str) -> None:
    """At sizes whose tiles are not whole, too, as gpt-oss' are not."""
    for experts_, hidden, inter in (
        (32, 768, 384),
        (16, 2880, 2880) if name in ("int4-g32", "mxfp4") else (8, 512, 256),
    ):
        weights = layer(name, experts_, hidden, inter)
        for tokens in (1, 2, 33, 300):
            for routing in ROUTINGS:
                check(None, weights, given(tokens, routing, weights, top_k=4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEW)
def test_a_share_of_all_configurations_on_a_gpu(name: str, h200: Hardware) -> None:
    weights = layer(name, 24, 512, 512)
    shape, b = weights.shape(4), given(150, "skewed", weights, top_k=4)
    known: dict[bool, torch.Tensor] = {}
    for config in KERNEL.configs(shape, h200)[::7]:
        path = _path(config)
        expected = known.setdefault(quantises_itself(path.up), wanted(path, weights, b))
        assert error(run(path, weights, b), expected) < TOLERANCE[name], config.name


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEW)
def test_captured_in_a_graph_it_follows_new_routings(name: str) -> None:
    weights = layer(name, 16, 512, 256)
    b, workspace = given(20, "uniform", weights, top_k=4), Workspace()
    config, prepared = KERNEL.default_config(weights.shape(4), H200, 20), KERNEL.prepare(weights)
    out, side = torch.empty_like(b.hidden_states), torch.cuda.Stream()
    with torch.cuda.stream(side):
        KERNEL.launch(config, prepared, b, out, workspace)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            KERNEL.launch(config, prepared, b, out, workspace)
    for seed, routing in enumerate(ROUTINGS):
        new = given(20, routing, weights, top_k=4, seed=seed)
        for old in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(b, old).copy_(getattr(new, old))
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, wanted(None, weights, b)) < TOLERANCE[name], routing


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_real_weights_keep_their_accuracy_on_a_gpu(name: str) -> None:
    """Of normal weights that are rounded to the format, not of random codes."""
    generator = torch.Generator().manual_seed(2)
    gate_up, down = (torch.randn(8, r, c, generator=generator) * c**-0.5 for r, c in ((1024, 512), (512, 512)))
    (g, gs), (d, ds) = (quantise(w.cuda(), name) for w in (gate_up, down))
    weights = MoEWeights(g, d, gs, ds, format=name)
    b = given(64, "skewed", weights)
    assert error(run(None, weights, b), reference(weights, b)) < 5e-3
