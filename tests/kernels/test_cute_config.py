"""The fused kernel's configurations: which are valid and why others are not, their names, their grids, the defaults."""

from __future__ import annotations

import importlib
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ramp_moe import Hardware, MoEShape, Registry, expert_histogram, generate
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe_kernels.cute import kernel as kernel_module
from ramp_moe_kernels.cute import layout
from ramp_moe_kernels.cute.config import ELEMENT, UP_ROWS, Config
from ramp_moe_kernels.cute.kernel import CuteMoE, _config
from ramp_moe_kernels.cute.space import (
    POLYMORPHIC,
    configurations,
    geometry,
    invalid,
    one_of,
    polymorphic,
    space,
)

KERNEL = CuteMoE()
load = importlib.import_module("ramp_moe_kernels.cute.aot.load")  # the package names the function so
MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
SHAPE = MoEShape(8, 2, 1024, 768, "fp8")
VALID = Config(16, 32, 8, 3)


@pytest.mark.parametrize("dtype", ELEMENT)
@pytest.mark.parametrize("model", MODELS)
def test_the_space(model: str, dtype: str, registry: Registry, h200: Hardware) -> None:
    shape = registry.shape(model, dtype)
    found = configurations(shape)
    assert len(found) >= {"fp8": 134, "bf16": 70}[dtype]
    assert len(set(found)) == len(found)
    assert all(c.dtype == dtype and invalid(c, shape) is None for c in found)
    assert tuple(_config(k) for k in KERNEL.configs(shape, h200)) == found


def test_registers() -> None:
    """More than a CTA was launched with would be waited for forever."""
    assert [Config(8, 32, 8, 3).register_pool, Config(8, 64, 4, 2, ctas=2).register_pool] == [64512, 32768]
    for c in (*space(), *POLYMORPHIC):
        producer, consumer = c.registers
        assert 128 * producer + 32 * c.warps * consumer <= c.register_pool, c.name
        assert producer % 8 == consumer % 8 == 0


def test_names() -> None:
    every = [replace(c, dtype=dtype) for c in (*space(), *POLYMORPHIC) for dtype in ELEMENT]
    assert len({c.name for c in every}) == len(set(every)) == len(every)
    assert all(re.fullmatch(r"[a-z0-9.-]{1,80}", c.name) for c in every)
    assert Config(8, 32, 8, 4, split_k=4, combine="f32", dtype="bf16").name == "bm8-t32-w8-st4-sk4-f32-bf16"
    assert POLYMORPHIC[0].name == "bm8.16.32.64-t32-w8-st3"


@pytest.mark.parametrize("c", [VALID, Config(64, 64, 4, 2, 2, 2, 1, True, 1, "rows", "bf16"), POLYMORPHIC[1]])
def test_a_configuration_survives(c: Config) -> None:
    assert pickle.loads(pickle.dumps(c)) == c
    assert eval(repr(c), {"Config": Config}) == c


@pytest.mark.parametrize(
    ("c", "shape", "reason"),
    [
        (replace(VALID, dtype="bf16"), SHAPE, "compiled for bf16, the weights are fp8"),
        (replace(VALID, block_m=12), SHAPE, "8 to 128 by 8"),
        (replace(VALID, block_m=0), SHAPE, "8 to 128 by 8"),
        (replace(VALID, block_m=136), SHAPE, "8 to 128 by 8"),
        (replace(VALID, warps=4), SHAPE, "8 warps' 32 or 4 warps' 64"),
        (replace(VALID, wide=4), SHAPE, "intermediate_size 768 is no multiple of 4 x 128"),
        (replace(VALID, wide=2), replace(SHAPE, intermediate_size=384), "384 is no multiple of 2 x 128"),
        (replace(VALID, block_m=24, split_k=2), SHAPE, "split for up to 16 tokens"),
        (replace(VALID, wide=2, split_k=2), SHAPE, "one wide"),
        (replace(VALID, pair=True, split_k=2), SHAPE, "without a pair"),
        (replace(VALID, split_k=8), replace(SHAPE, hidden_size=768), "fewer steps of 128 than 8 splits"),
        (replace(VALID, pair=True, group_m=8), SHAPE, "paired M-tiles share weights already"),
        (replace(VALID, stages=7), SHAPE, r"\d+ bytes exceed the 232448 of shared memory"),
        (replace(VALID, stages=4, ctas=2), SHAPE, r"\d+ bytes exceed the 115712 of shared memory"),
        (Config(96, 64, 4, 2, ctas=2), SHAPE, r"240 registers of sums leave less than \d+ of 216"),
        (
            Config(80, 64, 4, 2, ctas=2, dtype="bf16"),
            replace(SHAPE, dtype="bf16"),
            r"160 registers of sums leave less than \d+ of 200",
        ),
        (
            replace(VALID, dtype="bf16"),
            replace(SHAPE, dtype="bf16", top_k=8, intermediate_size=896),
            "56 parts added up in bf16 are more than the 48",
        ),
    ],
)
def test_what_is_invalid(c: Config, shape: MoEShape, reason: str) -> None:
    assert invalid(VALID, SHAPE) is None
    assert re.search(reason, invalid(c, shape) or "")


def test_launches_of_several_blocks(registry: Registry) -> None:
    for shape in (registry.shape(model, "fp8") for model in MODELS):
        for c in polymorphic(shape):
            alone = [c.of(block) for block in c.blocks]
            assert [a.block_m for a in alone] == sorted({a.block_m for a in alone})
            assert all(invalid(a, shape) is None and a.smaller == () for a in alone)
            assert one_of(alone[::-1]) == one_of(alone[1:3]) == c
            keys = {KERNEL.inline_key(KERNEL.describe(a, shape), shape) for a in alone}
            assert keys == {c.name}
        assert len({c.name for c in polymorphic(shape)}) >= 2
        assert KERNEL.inline_key(KERNEL.describe(Config(8, 32, 8, 4, split_k=2), shape), shape) is None


@pytest.mark.parametrize("c", [c for c in configurations(SHAPE) if c.block_m in (8, 64)], ids=lambda c: c.name)
def test_the_grid_is_as_described(c: Config) -> None:
    """CTAs of the launch, one by one; those of a pair come in twos, of which the last may have one without work."""
    described, tiles_n = geometry(c, SHAPE), SHAPE.gate_up_rows // (UP_ROWS * c.wide)
    for tokens in (1, 3, 50, 333):
        ids = tokens * SHAPE.top_k
        histogram = expert_histogram(generate("zipf1.2", tokens, SHAPE.num_experts, SHAPE.top_k), SHAPE.num_experts)
        used, most = sum(-(-h // c.block_m) for h in histogram.tolist()), described.max_m_tiles(ids, SHAPE.num_experts)
        busy_m, grid_m = (m + m % 2 if c.pair else m for m in (used, most))
        ctas = [
            layout.tile_of(bx, by, tiles_n=tiles_n, grid_m=grid_m, split_k=c.split_k, group_m=c.group_m)
            for by in range(grid_m)
            for bx in range(tiles_n * c.split_k)
        ]
        assert described.logical(histogram) == sum(m_i < busy_m for _, m_i, _ in ctas)
        assert described.launched(ids, SHAPE.num_experts) == len(ctas)
    assert (described.block_k, described.ctas_per_sm, described.tiles_n) == (128, c.ctas, tiles_n)


def test_the_worst_routing_fills_the_grid() -> None:
    """An expert an id, then whole tiles: what `tiles` of a launch must cover, and no more."""
    c = Config(8, 32, 8, 3)
    for ids in (1, 7, 8, 9, 15, 16, 100):
        worst = np.array([int(e < min(ids, 8)) for e in range(8)])
        worst[0] += max(0, ids - 8) // c.block_m * c.block_m
        found = geometry(c, SHAPE)
        assert found.m_tiles(worst) == found.max_m_tiles(ids, 8)


def test_what_it_cannot_compute(registry: Registry, h200: Hardware) -> None:
    def reason(device: str = "h200", **changes: object) -> str:
        return KERNEL.unsupported(replace(SHAPE, **changes), registry.device(device)) or ""

    assert reason() == reason("h100-sxm") == reason(dtype="bf16") == ""
    assert reason("a100-sxm") == "written for Hopper (sm_90), a100-sxm is sm_80"
    assert reason("b200") == "written for Hopper (sm_90), b200 is sm_100"
    assert reason(dtype="fp16") == "computes fp8 and bf16, not fp16"
    assert reason(hidden_size=896).startswith("hidden_size 896 is not a multiple of 256")
    assert reason(intermediate_size=192) == "intermediate_size 192 is not a multiple of 128"


@pytest.mark.parametrize("missing", ["torch", "triton", "tvm_ffi"])
def test_where_it_cannot_run(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "is_installed", lambda name: name != missing)
    assert KERNEL.unavailable() == f"the package {missing} is missing: pip install 'ramp-moe[triton,cute]'"


def test_without_objects_or_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_module, "is_installed", lambda name: True)
    for folder, dsl, reason in (
        (tmp_path / "absent", None, f"nothing is compiled in {tmp_path / 'absent'}, and nvidia-cutlass-dsl is not"),
        (tmp_path / "absent", tmp_path, None),
        (tmp_path, None, None),
    ):
        cache = SimpleNamespace(folder=folder)
        monkeypatch.setattr(load, "Cache", SimpleNamespace(current=lambda cache=cache: cache))
        monkeypatch.setattr(load, "dsl_folder", lambda dsl=dsl: dsl)
        found = KERNEL.unavailable()
        assert found is None if reason is None else str(found).startswith(reason)


def test_layouts_that_it_reads() -> None:
    assert set(KERNEL.readable_layouts(SHAPE)) == set(LAYOUTS)
    assert KERNEL.readable_layouts(SHAPE)[0] == KERNEL.weight_layout(SHAPE).key


@settings(max_examples=150)
@given(
    experts=st.sampled_from([1, 8, 60, 64, 256]),
    top_k=st.sampled_from([1, 2, 8]),
    hidden=st.integers(1, 32),
    inter=st.integers(1, 40),
    dtype=st.sampled_from(sorted(ELEMENT)),
    tokens=st.integers(1, 65_536),
)
def test_defaults_are_configurations(
    experts: int, top_k: int, hidden: int, inter: int, dtype: str, tokens: int, h200: Hardware
) -> None:
    shape = MoEShape(experts, min(top_k, experts), 256 * hidden, 128 * inter, dtype)
    assert KERNEL.default_config(shape, h200, tokens) in KERNEL.configs(shape, h200)


@pytest.mark.parametrize("model", MODELS)
def test_defaults_grow(model: str, registry: Registry, h200: Hardware) -> None:
    blocks = [
        _config(KERNEL.default_config(registry.shape(model, "fp8"), h200, tokens)).block_m
        for tokens in (1, 16, 128, 1024, 8192, 65_536)
    ]
    assert blocks == sorted(blocks)
    assert blocks[0] == 8
    assert blocks[-1] >= 64


def test_a_reduction_is_split_for_few_tokens_alone(h200: Hardware) -> None:
    """Few weight tiles are few CTAs only as long as there are few tokens."""
    shape = MoEShape(8, 2, 2048, 512, "fp8")
    few, many = (_config(KERNEL.default_config(shape, h200, tokens)) for tokens in (4, 16_384))
    assert (few.block_m, few.split_k) == (8, 4)
    assert (many.block_m >= 64, many.split_k) == (True, 1)
