"""Humming on a Hopper GPU: every code and scale exactly, every format over the hard routings, and graph replays."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import H200, LIMITS, ROUTINGS, batch, error
from ramp_moe import KernelConfig, KernelError, MoEShape
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime import formats
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.formats import FORMATS
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe.testing import KernelConformance
from ramp_moe_adapters.kernels.humming import package
from ramp_moe_adapters.kernels.humming.build import build
from ramp_moe_adapters.kernels.humming.config import WarpTile, invalid, tiles, tiles_of
from ramp_moe_adapters.kernels.humming.formats import KINDS, sizes
from ramp_moe_adapters.kernels.humming.kernel import PROJECTIONS, Humming
from ramp_moe_adapters.kernels.humming.launch import PreparedHumming, gemm, prepare
from ramp_moe_kernels.triton.schedule import allocate, launch_schedule

KERNEL = Humming()
NAMES = tuple(KINDS)
PACKED = tuple(name for name in NAMES if FORMATS[name].packed)
EXPERTS, TOP_K, HIDDEN, INTER = 32, 4, 512, 256
# Against float32 of the same weights, without rounded activations.
TOLERANCE = {16: 0.012, 8: 0.062}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(KERNEL.unavailable() is not None, reason=str(KERNEL.unavailable())),
]


def layer(name: str, bias: bool = False, seed: int = 0, **options: Any) -> MoEWeights:
    w = replace(random_weights(MoEShape(EXPERTS, 1, HIDDEN, INTER, name), torch.device("cuda"), seed), **options)
    if not bias:
        return w
    generator = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(EXPERTS, n, generator=generator).cuda() for n in (2 * INTER, HIDDEN))
    return replace(w, gate_up_bias=gate_up, down_bias=down)


@functools.cache
def repacked(name: str) -> tuple[MoEWeights, PreparedHumming]:
    w = layer(name)
    return w, prepare(w)


def given(tokens: int, routing: str, seed: int = 0) -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, "cuda", torch.bfloat16, seed)


def run(c: KernelConfig, p: PreparedHumming, b: Batch, workspace: Workspace | None = None) -> torch.Tensor:
    out = torch.full_like(b.hidden_states, float("nan"))
    KERNEL.launch(c, p, b, out, workspace or Workspace())
    return out


def check(c: KernelConfig, w: MoEWeights, p: PreparedHumming, b: Batch) -> None:
    found = error(run(c, p, b), reference(w, b))
    assert found < TOLERANCE[p.kind.a_bits], f"{c.name}: {found}"


def some_configs(name: str) -> list[KernelConfig]:
    """A few pairs of every token block; each tile of the up projection is once among those of a block."""
    shape = MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, name)
    pairs = [(tiles(shape, "up")[i], tiles(shape, "down")) for i in range(0, len(tiles(shape, "up")), 3)]
    return [
        KERNEL.describe(up, downs[i % len(downs)], shape, H200)
        for i, (up, every) in enumerate(pairs)
        for downs in ([t for t in every if t.block_m == up.block_m],)
    ]


# --- packing ----------------------------------------------------------------------------------------------------------


def every_code(name: str, wide: bool = False) -> MoEWeights:
    """Two experts that hold every byte, at every column of a group, under scales that differ everywhere.

    wide: True if MXFP4 scales differ by more than 2^11 from row to row.
    """
    w = random_weights(MoEShape(2, 1, 512, 256, name), torch.device("cuda"), 3)
    if not FORMATS[name].packed:
        return w
    made = {}
    for key in ("gate_up", "down"):
        made[key] = torch.arange(getattr(w, key).numel(), device="cuda").to(torch.uint8).view_as(getattr(w, key))
    if name.startswith("mxfp4"):
        for key in ("gate_up_scale", "down_scale"):
            scale = getattr(w, key)
            steps = torch.arange(scale.numel(), device="cuda").view_as(scale) % 11
            rows = torch.arange(scale.shape[1], device="cuda")[None, :, None] % 7 * 4 if wide else 0
            made[key] = (110 + steps + rows).to(torch.uint8)
    return replace(w, **made)


CODES = [(name, False) for name in NAMES if name != "fp8-tensor"]


@pytest.mark.parametrize("case", [*CODES, ("mxfp4-a8", True)], ids=str)
def test_every_code_under_every_scale(case: tuple[str, bool]) -> None:
    """Tokens of a one in each column read the weights out: a product with bf16 weights is exact."""
    name, wide = case
    w = every_code(name, wide)
    p = prepare(w)
    if name == "mxfp4-a8":
        assert (json.loads(p.up.layer)["weight_scale_2_type"] == "channel") == wide
    stored = formats.format_of(w)
    sides = (w.gate_up, w.gate_up_scale, 2), (w.down, w.down_scale, 1)
    for which, (weight, scale, matrices) in zip(PROJECTIONS, sides, strict=True):
        of = sizes(p.shape, which)
        ids = torch.arange(2, dtype=torch.int32, device="cuda").repeat(of.k)[:, None]
        ones = torch.eye(of.k, device="cuda").repeat_interleave(2, 0)
        a, a_scale = ones.bfloat16(), None
        if p.kind.a_bits == 8:
            a, a_scale = formats.quantise_activations(ones, p.kind.a_group or None)
        dense = torch.stack([formats.plain(m, s, stored, matrices) for m, s in zip(weight, scale, strict=True)])
        expected = dense.transpose(1, 2).transpose(0, 1).reshape(2 * of.k, of.n)
        tile = next(t for t in tiles(p.shape, which) if t.block_m == 16)
        schedule = allocate(len(ids), 2, tile.block_m, "cuda")
        launch_schedule(ids, 2, (tile.block_m,), schedule)
        out = torch.full((len(ids), of.n), float("nan"), dtype=torch.bfloat16, device="cuda")
        gemm(p, which, tile, a, a_scale, out, schedule, torch.zeros(1 << 14, dtype=torch.int32, device="cuda"), 1)
        # A product with rounded scales is exact to bf16's last bit or so.
        torch.testing.assert_close(out.float(), expected, rtol=2**-6 if a_scale is not None else 2**-7, atol=1e-30)


def test_scales_that_rounded_activations_rule_out() -> None:
    w = every_code("mxfp4-a8")
    scale = w.gate_up_scale.clone()
    scale[1, 3, 0] -= 40
    with pytest.raises(KernelError, match=r"row of expert 1 differ by more than 2\^11"):
        prepare(replace(w, gate_up_scale=scale))
    scale[1, 3, 0] = 255
    with pytest.raises(KernelError, match="NaN"):
        prepare(replace(w, gate_up_scale=scale))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_hard_routings(name: str) -> None:
    """By Humming's own choice, whose GEMMs may have unlike token blocks."""
    w, p = repacked(name)
    for tokens in (1, 2, 33, 300):
        c = KERNEL.default_config(w.shape(TOP_K), H200, tokens)
        for routing in ROUTINGS:
            check(c, w, p, given(tokens, routing))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_tile(name: str) -> None:
    w, p = repacked(name)
    skewed, workspace = given(150, "skewed"), Workspace()
    expected = reference(w, skewed)
    for c in some_configs(name):
        found = error(run(c, p, skewed, workspace), expected)
        assert found < TOLERANCE[p.kind.a_bits], f"{c.name}: {found}"


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-a8", "int4-g32", "fp8", "fp8-channel"])
def test_few_and_many_tokens(name: str) -> None:
    w, p = repacked(name)
    for tokens in (1, 8, 40, 1500):
        for c in some_configs(name)[::5]:
            check(c, w, p, given(tokens, "skewed"))


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu_oai", "swiglu_clamped"])
@pytest.mark.parametrize("name", ["mxfp4", "int4-g32-a8", "fp8"])
def test_biases_and_activations(name: str, activation: str) -> None:
    w = layer(name, bias=True, activation=activation, limit=LIMITS.get(activation))
    check(KERNEL.default_config(w.shape(TOP_K), H200, 33), w, prepare(w), given(33, "padded"))


@pytest.mark.parametrize("name", ["mxfp4", "int4-g32", "int4-g32-a8"])
def test_padded_sizes(name: str) -> None:
    """gpt-oss has 2880 columns, which Humming pads to 2944, and 5760 rows, which it pads to 5888."""
    w = random_weights(MoEShape(4, 1, 320, 160, name), torch.device("cuda"), 1)
    p, b = prepare(w), batch(50, 2, 4, 320, "skewed", "cuda", torch.bfloat16)
    shape = w.shape(2)
    for up, down in ((tiles(shape, "up")[i], tiles(shape, "down")[i]) for i in (0, 5, -1)):
        check(KERNEL.describe(up, down, shape, H200), w, p, b)


def test_unlike_token_blocks() -> None:
    w, p = repacked("mxfp4-a8")
    shape = w.shape(TOP_K)
    up = next(t for t in tiles(shape, "up") if t.block_m == 32)
    down = next(t for t in tiles(shape, "down") if t.block_m == 8)
    check(KERNEL.describe(up, down, shape, H200), w, p, given(60, "skewed"))


def test_nan_stays_in_its_token() -> None:
    w, p = repacked("mxfp4")
    c, b = KERNEL.default_config(w.shape(TOP_K), H200, 9), given(9, "uniform")
    clean = run(c, p, b)
    b.hidden_states[1, 7] = float("nan")
    out = run(c, p, b)
    others = torch.arange(9, device="cuda") != 1
    assert out[1].isnan().all()
    assert torch.equal(out[others], clean[others])


def test_another_order_of_nibbles_is_another_layer() -> None:
    w = layer("int4-g32")
    b = given(33, "uniform")
    swapped = replace(w, gate_up=w.gate_up << 4 | w.gate_up >> 4)
    c = KERNEL.default_config(w.shape(TOP_K), H200, 33)
    assert error(run(c, prepare(swapped), b), reference(w, b)) > 0.5


@pytest.mark.parametrize("name", ["mxfp4", "int4-g32-a8", "fp8"])
def test_captured_in_a_graph_it_follows_new_routings(name: str) -> None:
    w, p = repacked(name)
    b, workspace = given(20, "uniform"), Workspace()
    for c in (KERNEL.default_config(w.shape(TOP_K), H200, 20), *some_configs(name)[1::7]):
        out, side = torch.empty_like(b.hidden_states), torch.cuda.Stream()
        with torch.cuda.stream(side):
            KERNEL.launch(c, p, b, out, workspace)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                KERNEL.launch(c, p, b, out, workspace)
        for seed, routing in enumerate(ROUTINGS):
            new = given(20, routing, seed=seed)
            for old in ("hidden_states", "topk_ids", "topk_weights"):
                getattr(b, old).copy_(getattr(new, old))
            graph.replay()
            torch.cuda.synchronize()
            assert error(out, reference(w, b)) < TOLERANCE[p.kind.a_bits], (c.name, routing)


# --- beside the package -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [MoEShape(256, 8, 7168, 256, "int4-g32"), MoEShape(64, 8, 2048, 1024, "mxfp4-a8")])
def test_hummings_own_choice_is_among_the_configurations(shape: MoEShape) -> None:
    found = KERNEL.configs(shape, H200)
    for which in PROJECTIONS:
        own = package.own_table(shape, which)
        assert len(own) >= 10
        for most, tile in own:
            assert invalid(tile, KINDS[shape.dtype], sizes(shape, which)) is None
            assert package.own_choice(shape, which, most) == tile
    for tokens in (1, 8, 64, 512, 8192):
        assert KERNEL.default_config(shape, H200, tokens) in found


def test_shared_memory_is_what_the_kernels_take() -> None:
    for name in NAMES:
        _, p = repacked(name)
        tile: WarpTile = tiles_of(some_configs(name)[-1].params)[0]
        kernel = package.compiled(p.up.layer, tile).kernel
        kernel.assert_smem_size_matches_estimate()


def test_a_build_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(tmp_path))
    c, told = some_configs("mxfp4")[:1], list[tuple[int, int, str]]()
    shape = MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, "mxfp4")
    first = build(shape, H200, c, lambda *part: told.append(part), 2)
    assert (first.compiled, first.reused, first.dropped) == ((c[0].name,), (), {})
    assert [done for done, _, _ in told] == [0, 1, 2]
    assert len([*tmp_path.glob("*/kernel.cubin")]) == 2
    again = build(shape, H200, c, lambda *part: None, 2)
    assert (again.compiled, again.reused, again.bytes) == ((), (c[0].name,), first.bytes)
    assert KERNEL.prune() == 0


class TestConformance(KernelConformance):
    kernel = KERNEL
    shapes = (MoEShape(64, 8, 2048, 1024, "mxfp4"), MoEShape(64, 8, 2048, 1024, "int4-g32-a8"))
    launch_shape = MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, "mxfp4")
    configs = 6
