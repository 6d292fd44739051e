"""Marlin's path: its tiles, its layout code by code, and its launches over an emulation of its GEMM."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_cases import H200, LIMITS, ROUTINGS, batch, error
from ramp_moe import Hardware, KernelConfig, KernelError, MoEShape, expert_histogram, generate
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime import formats
from ramp_moe.runtime.reference import reference
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.marlin import launch
from ramp_moe_adapters.kernels.marlin.config import TOKEN_BLOCKS, TYPES, own_block, tiles, tiles_of
from ramp_moe_adapters.kernels.marlin.kernel import Marlin
from ramp_moe_adapters.kernels.marlin.launch import MarlinWeights, PreparedMarlin
from ramp_moe_adapters.kernels.marlin.layout import repack, repack_scales
from tiers import slow_except

KERNEL = Marlin()


# --- the description --------------------------------------------------------------------------------------------------


def test_tiles_divide_the_weights_and_grids_count_them() -> None:
    shape = MoEShape(384, 6, 7168, 384, "mxfp4")
    histogram = expert_histogram(generate("zipf1.2", 100, 384, 6), 384)
    found = KERNEL.configs(shape, H200)
    assert len(found) == len({c.name for c in found}) == 5 * 16
    for c in found:
        p = dict(c.params)
        for grid, n, k, which in zip(c.gemms, (768, 7168), (7168, 384), ("up", "down"), strict=True):
            assert n % p[f"{which}_thread_n"] == k % p[f"{which}_thread_k"] == 0
            m_tiles = sum(math.ceil(h / p["block_m"]) for h in histogram.tolist())
            assert int(grid.logical(histogram)) == m_tiles * n // p[f"{which}_thread_n"]
            resident = 4 if p[f"{which}_chosen"] and p["block_m"] <= 16 else 1
            assert grid.launched(600, 384) == resident * H200.num_sms
            assert grid.stream_k
    for tokens in (1, 64, 8192):
        assert KERNEL.default_config(shape, H200, tokens) in found


def test_vllms_own_token_block() -> None:
    shape = MoEShape(256, 8, 7168, 256, "int4-g32")
    assert [own_block(shape, n) for n in (1, 230, 231, 460, 512, 1024, 1380, 8192)] == [8, 8, 16, 16, 32, 48, 48, 64]


REFUSED = [
    ({"arch": "sm_80", "name": "a100"}, {}, "described for Hopper (sm_90), a100 is sm_80"),
    ({}, {"hidden_size": 2880, "intermediate_size": 2880}, "the down projection, 2880 x 2880, is divided by neither"),
    ({}, {"intermediate_size": 48}, "intermediate_size 48 is not a multiple of the 32 weights that share a scale"),
    ({}, {"num_experts": 2000}, "2000 experts are more than the schedule's 1024"),
]


@pytest.mark.parametrize(("hardware", "changed", "reason"), REFUSED, ids=[r for *_, r in REFUSED])
def test_what_it_cannot_do(h200: Hardware, hardware: dict[str, Any], changed: dict[str, int], reason: str) -> None:
    shape = replace(MoEShape(64, 8, 2048, 1024, "mxfp4"), **changed)
    assert (KERNEL.unsupported(shape, replace(h200, **hardware)) or "").startswith(reason)


# --- the layout -------------------------------------------------------------------------------------------------------


def test_every_code_is_where_marlins_instructions_read_it() -> None:
    """By the mapping of mma.m16n8k16's second operand: a lane has columns of one pair and of the pair 8 further on."""
    k, n = 64, 128
    codes = torch.randint(0, 16, (1, n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = repack(formats.pack(codes))[0]
    assert packed.shape == (k // 16, 2 * n)
    words, wanted = packed.tolist(), codes[0].tolist()
    for at_k, at_n in itertools.product(range(k), range(n)):
        tile, column, row = at_k // 16, at_k % 16, at_n % 16
        lane = row % 8 * 4 + column % 8 // 2
        eighth = row // 8 * 4 + column // 8 * 2 + column % 2
        nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(eighth)
        word = at_n // 64 * 128 + lane * 4 + at_n % 64 // 16
        assert words[tile][word] >> 4 * nibble & 15 == wanted[at_n][at_k], (at_k, at_n)


def test_scales_are_where_they_are_read() -> None:
    scale = torch.randn(2, 128, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = repack_scales(scale)
    assert found.shape == (2, 4, 128)
    for e, g, n in itertools.product(range(2), range(4), range(128)):
        at = n // 64 * 64 + n % 8 * 8 + n % 64 // 8
        assert found[e, g, at] == scale[e, n, g]
    exponents = torch.randint(0, 250, (1, 128, 4), dtype=torch.uint8)
    bytes_ = repack_scales(exponents).view(torch.uint8)
    for g, n in itertools.product(range(4), range(128)):
        at = n // 64 * 64 + n % 8 * 8 + n % 64 // 8
        swapped = at // 4 * 4 + (0, 2, 1, 3)[at % 4]
        assert bytes_[0, g, swapped] == exponents[0, n, g]


# --- launches, over an emulation --------------------------------------------------------------------------------------


class Emulation:
    """What Marlin's operator computes of dense weights, and what it trusts its caller in."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, a: Any, out: Any, w: Any, bias: Any, s: Any, *rest: Any) -> Any:
        a_scale, second, zeros, locks, sorted_ids, expert_ids, used, weights = rest[:8]
        block, top_k, weighted, kind, m, n, k, atomic, in_float, float_zero, *tile = rest[8:]
        assert bias is a_scale is second is zeros is None
        assert (weighted, atomic, in_float, float_zero) == (False, False, True, False)
        assert kind in TYPES.values()
        assert a.dtype == out.dtype == torch.bfloat16
        assert (m, k) == a.shape
        assert out.shape == (m * top_k, n)
        assert weights.dtype == torch.float32
        assert int(locks.count_nonzero()) == 0
        assert tile == [-1, -1, -1] or n % tile[1] == k % tile[0] == 0
        self.seen.append((block, *tile))
        for i in range(int(used) // block):
            ids = sorted_ids[i * block : (i + 1) * block]
            ids = ids[ids < len(out)].long()
            out[ids] = (a.float()[ids // top_k] @ w[int(expert_ids[i])].T).bfloat16()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    made = Emulation()
    monkeypatch.setattr(launch, "operator", lambda: made)
    return made


def prepared(w: MoEWeights) -> PreparedMarlin:
    """As `launch.prepare`, with dense weights in place of Marlin's layout."""
    w = relayout(w, "gate-first")

    def side(weight: Any, scale: Any, matrices: int) -> MarlinWeights:
        dense = [formats.plain(a, b, w.stored, matrices) for a, b in zip(weight, scale, strict=True)]
        return MarlinWeights(torch.stack(dense), scale)

    sides = side(w.gate_up, w.gate_up_scale, 2), side(w.down, w.down_scale, 1)
    return PreparedMarlin(w.shape(1), *sides, w.gate_up_bias, w.down_bias, w.activation, w.limit)


def layer(name: str, **options: Any) -> MoEWeights:
    w = replace(random_weights(MoEShape(4, 1, 128, 128, name), "cpu", seed=1), **options)
    generator = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(4, n, generator=generator) for n in (256, 128))
    return replace(w, gate_up_bias=gate_up, down_bias=down)


def run(c: KernelConfig, w: MoEWeights, b: Batch) -> torch.Tensor:
    out = torch.full_like(b.hidden_states, float("nan"))
    assert list(KERNEL.steps(c, prepared(w), b, out, Workspace())) == [s.key for s in c.stages]
    return out


CASES = [("mxfp4", routing) for routing in ROUTINGS] + [("int4-g32", "padded"), ("int4-g128", "padded")]


@pytest.mark.parametrize("case", slow_except([c for c in CASES if c[1] == "padded"], CASES))
def test_emulated(case: tuple[str, str], emulation: Emulation) -> None:
    w, b = layer(case[0]), batch(7, 2, 4, 128, case[1], "cpu", torch.bfloat16)
    shape = w.shape(2)
    for c in (KERNEL.default_config(shape, H200, 7), KERNEL.configs(shape, H200)[-1]):
        assert error(run(c, w, b), reference(w, b)) < 0.01
        block, *pair = tiles_of(c.params)
        assert emulation.seen[-2:] == [(block, *tile.arguments) for tile in pair]
        assert all(tile.arguments == (-1, -1, -1) for tile in pair) == (c == KERNEL.default_config(shape, H200, 7))


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu_oai", "swiglu_clamped"])
def test_activations(activation: str, emulation: Emulation) -> None:
    w = layer("mxfp4", activation=activation, limit=LIMITS.get(activation))
    b = batch(5, 2, 4, 128, "padded", "cpu", torch.bfloat16)
    assert error(run(KERNEL.default_config(w.shape(2), H200, 5), w, b), reference(w, b)) < 0.01


def test_every_layout_gives_the_same_bits(emulation: Emulation) -> None:
    w, b = layer("int4-g32"), batch(5, 2, 4, 128, "uniform", "cpu", torch.bfloat16)
    c = KERNEL.default_config(w.shape(2), H200, 5)
    outs = [run(c, relayout(w, key), b) for key in LAYOUTS]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_what_it_refuses(emulation: Emulation) -> None:
    w = layer("mxfp4")
    with pytest.raises(KernelError, match="runs on Hopper"):
        KERNEL.prepare(w)
    with pytest.raises(KernelError, match="takes weights in int4-g32 or"):
        KERNEL.prepare(random_weights(MoEShape(2, 1, 128, 128, "fp8"), "cpu", 0))
    half = batch(3, 2, 4, 128, "uniform", "cpu", torch.float16)
    with pytest.raises(KernelError, match="bf16 only"):
        run(KERNEL.default_config(w.shape(2), H200, 3), w, half)


def test_tiles_follow_the_token_block() -> None:
    shape = MoEShape(64, 8, 2048, 1024, "mxfp4")
    assert {tiles(shape, "up", b)[0].name for b in TOKEN_BLOCKS} == {"auto"}
    assert {b: tiles(shape, "up", b)[1].name for b in TOKEN_BLOCKS} == {
        8: "k128n128", 16: "k128n128", 32: "k64n256", 48: "k64n256", 64: "k64n256"
    }  # fmt: skip
