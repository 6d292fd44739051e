"""Weights in another order of rows: where each row goes, and that nothing else changes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from moe_cases import weights
from ramp_moe import MoEShape, ShapeError, UnknownNameError
from ramp_moe.runtime.reference import reference
from ramp_moe.runtime.relayout import relayout, to_give
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import Batch, MoEWeights

GATE_FIRST, INTERLEAVED, UP_FIRST = LAYOUTS
FP8 = torch.float8_e4m3fn
ORDERED = ("gate_up", "gate_up_scale", "gate_up_bias")


def random_bits(*shape: int) -> torch.Tensor:
    """Every bit pattern, NaN and both zeros included."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def layer(dtype: str, inter: int = 256, layout: str = GATE_FIRST, block: int = 128) -> MoEWeights:
    """Random bits, with a bias; NaN in the bias too."""
    experts, hidden = 3, 128
    biases = random_bits(experts, 4 * inter).view(torch.bfloat16), torch.zeros(experts, hidden)
    if dtype == "fp8":
        wide, deep = hidden // block, -(-inter // block)
        scales = torch.rand(experts, 2 * deep, wide), torch.rand(experts, wide, deep)
        weights = random_bits(experts, 2 * inter, hidden).view(FP8), random_bits(experts, hidden, inter).view(FP8)
        return MoEWeights(*weights, *scales, *biases, layout=layout)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    gate_up, down = random_bits(experts, 2 * inter, 2 * hidden), random_bits(experts, hidden, 2 * inter)
    return MoEWeights(gate_up.view(kind), down.view(kind), None, None, *biases, layout=layout)


def bits(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.view(torch.uint8)


def same(a: MoEWeights, b: MoEWeights) -> bool:
    pairs = [(bits(getattr(a, name)), bits(getattr(b, name))) for name in (*ORDERED, "down", "down_scale", "down_bias")]
    return a.layout == b.layout and all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def places(layout: str, rows: int, chunk: int) -> list[tuple[int, int]]:
    """Where gate row r and up row r lie, for each r."""
    if layout == GATE_FIRST:
        return [(r, rows + r) for r in range(rows)]
    if layout == UP_FIRST:
        return [(rows + r, r) for r in range(rows)]
    return [(r // chunk * 2 * chunk + r % chunk, r // chunk * 2 * chunk + r % chunk + chunk) for r in range(rows)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize(("given", "wanted"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_row_goes_where_it_belongs_and_back(dtype: str, given: str, wanted: str) -> None:
    there_and_back(layer(dtype, layout=given), wanted)


@pytest.mark.parametrize(("inter", "block"), [(80, 128), (192, 128), (192, 64), (96, 32)])
@pytest.mark.parametrize("wanted", LAYOUTS[1:])
def test_scale_blocks_that_straddle(inter: int, block: int, wanted: str) -> None:
    there_and_back(layer("fp8", inter, block=block), wanted)


def there_and_back(before: MoEWeights, wanted: str) -> None:
    given = before.layout
    after = relayout(before, wanted)
    assert after.layout == wanted
    for name in ORDERED:
        old, new = bits(getattr(before, name)), bits(getattr(after, name))
        if old is None or new is None:
            assert old is new
            continue
        if name == "gate_up_bias":  # two bytes a row
            old, new = (t.view(3, -1, 2) for t in (old, new))
        assert old.shape == new.shape
        rows, chunk = old.shape[1] // 2, 1 if name == "gate_up_scale" else 8
        for was, now in zip(places(given, rows, chunk), places(wanted, rows, chunk), strict=True):
            assert torch.equal(new[:, now], old[:, was])
    assert after.down is before.down
    assert after.down_scale is before.down_scale
    assert same(relayout(after, given), before)


def test_what_is_in_the_layout_is_not_touched() -> None:
    for key in LAYOUTS:
        given = layer("fp8", layout=key)
        assert relayout(given, key) is given


def test_sizes_that_do_not_interleave() -> None:
    odd = MoEWeights(torch.randn(2, 24, 16).bfloat16(), torch.randn(2, 16, 12).bfloat16())
    swapped = relayout(odd, UP_FIRST)
    assert torch.equal(swapped.gate_up, odd.gate_up.roll(12, 1))
    assert same(relayout(swapped, GATE_FIRST), odd)
    message = "gate-up-interleaved-8 needs an intermediate size in multiples of 8, not 12"
    for given in (odd, swapped):
        with pytest.raises(ShapeError, match=message):
            relayout(given, INTERLEAVED)
    with pytest.raises(ShapeError, match=message):
        replace(odd, layout=INTERLEAVED)


def test_names_that_are_no_layouts() -> None:
    given = layer("bf16")
    with pytest.raises(UnknownNameError, match="unknown weight layout 'up-fist'; did you mean 'up-first'"):
        relayout(given, "up-fist")
    with pytest.raises(UnknownNameError, match="unknown weight layout 'tiled'"):
        replace(given, layout="tiled")


def test_what_a_kernel_is_given() -> None:
    assert to_give((UP_FIRST, GATE_FIRST)) == UP_FIRST
    assert to_give(("tiled", UP_FIRST)) == UP_FIRST
    assert to_give(("tiled",)) == GATE_FIRST


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_bench_s_reference_knows_them(dtype: str) -> None:
    plain = weights(4, 128, 256, dtype, "cpu")
    shape: MoEShape = plain.shape(2)
    ids = torch.arange(6, dtype=torch.int32).view(3, 2) % shape.num_experts
    given = Batch(torch.randn(3, 128).bfloat16(), ids, torch.rand(3, 2))
    wanted = reference(plain, given)
    for key in LAYOUTS:
        assert torch.equal(reference(relayout(plain, key), given), wanted)
