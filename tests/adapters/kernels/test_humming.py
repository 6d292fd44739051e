"""Humming's path: its tiles by arithmetic, its packing code by code, and its launches over an emulation of its GEMM."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_cases import H200, LIMITS, ROUTINGS, batch, error
from ramp_moe import Hardware, KernelConfig, KernelError, MoEShape, expert_histogram, generate
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime import formats
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.reference import reference
from ramp_moe.runtime.relayout import relayout
from ramp_moe.runtime.update import leaves
from ramp_moe.spec.formats import FORMATS
from ramp_moe.spec.kernel import LAYOUTS, usable_configs
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.humming import build, config, launch, package
from ramp_moe_adapters.kernels.humming import weights as repacking
from ramp_moe_adapters.kernels.humming.config import WarpTile, invalid, params, smem, tiles, tiles_of
from ramp_moe_adapters.kernels.humming.formats import KINDS, sizes
from ramp_moe_adapters.kernels.humming.kernel import Humming
from ramp_moe_adapters.kernels.humming.launch import PreparedHumming
from ramp_moe_adapters.kernels.humming.weights import Side
from tiers import slow_except

KERNEL = Humming()
MODELS = ((256, 8, 7168, 256), (128, 4, 2880, 2880), (384, 8, 7168, 256), (64, 8, 2048, 1024), (8, 2, 256, 128))
SHAPES = [MoEShape(*of, name) for of in MODELS for name in KINDS]
SUPPORTED = [shape for shape in SHAPES if KERNEL.unsupported(shape, H200) is None]


# --- the description --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SUPPORTED, ids=lambda s: s.slug)
def test_few_tiles_are_worth_compiling_and_all_can_run(shape: MoEShape) -> None:
    for which in ("up", "down"):
        found, of = tiles(shape, which), sizes(shape, which)
        assert 20 <= len(found) <= 80
        assert len({tile.name for tile in found}) == len(set(found)) == len(found)
        assert {8, 16, 32, 64} <= {tile.block_m for tile in found}
        for tile in found:
            assert invalid(tile, KINDS[shape.dtype], of) is None
            assert tile.ctas * (smem(tile, KINDS[shape.dtype]) + 1024) <= H200.smem_per_sm_bytes


@pytest.mark.parametrize("shape", SUPPORTED[::5], ids=lambda s: s.slug)
def test_grids_are_those_of_the_scheduler(shape: MoEShape) -> None:
    """As `include/humming/scheduler.cuh` counts them: M-tiles by N / block_n, on num_sms * num_ctas_per_sm CTAs."""
    histogram = expert_histogram(generate("zipf1.2", 100, shape.num_experts, shape.top_k), shape.num_experts)
    found = usable_configs(KERNEL, shape, H200)
    for c in found[::37]:
        for tile, grid, which in zip(tiles_of(c.params), c.gemms, ("up", "down"), strict=True):
            of = sizes(shape, which)
            assert of.padded_n % tile.block_n == of.padded_k % tile.block_k == 0
            assert 0 <= of.padded_n - of.n < 256
            m_tiles = sum(math.ceil(h / tile.block_m) for h in histogram.tolist())
            assert int(grid.logical(histogram)) == m_tiles * of.padded_n // tile.block_n
            assert grid.launched(800, shape.num_experts) == H200.num_sms * tile.ctas
            assert grid.cta_slots(H200.num_sms) == H200.num_sms * tile.ctas
            assert grid.stream_k == tile.stream_k
            assert not grid.stream_k or grid.tail_utilisation(histogram, H200.num_sms) == 1
    for tokens in (1, 64, 8192):
        assert KERNEL.default_config(shape, H200, tokens) in found


def test_one_alignment_serves_both_gemms() -> None:
    shape = MoEShape(64, 8, 2048, 1024, "int4-g32")
    for c in KERNEL.configs(shape, H200):
        up, down = tiles_of(c.params)
        assert up.block_m == down.block_m
        assert [s.kind for s in c.stages] == ["schedule", "gemm", "activation", "gemm", "combine"]
    mixed = KERNEL.describe(tiles(shape, "up")[0], replace(tiles(shape, "down")[0], block_m=16), shape, H200)
    assert mixed.stages[0].key == "humming/schedule/bm8+bm16"
    assert {s.key for s in c.stages if s.kind == "gemm"} & {f"humming/up/{up.name}", f"humming/down/{down.name}"}


def test_stages_say_what_is_rounded() -> None:
    def kinds(dtype: str) -> list[str]:
        return [s.key for s in KERNEL.configs(MoEShape(64, 8, 2048, 1024, dtype), H200)[0].stages if s.kind != "gemm"]

    assert kinds("mxfp4")[1] == "humming/activate/bf16"
    assert kinds("mxfp4-a8")[:2] == ["humming/schedule/bm8-quantise", "humming/activate/group"]
    assert kinds("int4-g32-a8")[:3] == ["humming/quantise", "humming/schedule/bm8", "humming/activate/token"]


def test_tiles_survive_their_parameters_and_hummings_own_words() -> None:
    shape = MoEShape(256, 8, 7168, 256, "mxfp4-a8")
    every = {t for s in SUPPORTED for which in ("up", "down") for t in tiles(s, which)}
    for tile in every:
        assert tiles_of(params(tile, tile)) == (tile, tile)
        assert WarpTile.of(tile.tuning()) == tile
    assert len({tile.name for tile in every}) == len(every)
    tile = tiles(shape, "up")[0]
    assert WarpTile.of(tile.tuning() | {"use_f16_accum": False, "producer_stage_unroll": tile.stages}) == replace(
        tile, unroll=0
    )
    assert WarpTile.of(tile.tuning() | {"multi_cast_size_a": 2}) is None, "what a WarpTile lacks must not be dropped"
    assert WarpTile.of(tile.tuning() | {"warp_shape": (tile.block_m // 2, 32, 128)}) is None


REFUSED = [
    ({"arch": "sm_80", "name": "a100"}, "mxfp4", {}, "described for Hopper (sm_90), a100 is sm_80"),
    ({}, "fp8", {"intermediate_size": 320}, "intermediate_size 320 is not a multiple of the fp8 scale block 128"),
    ({}, "mxfp4-a8", {"hidden_size": 2880}, "hidden_size 2880 is not a multiple of 128"),
    ({}, "mxfp4", {"intermediate_size": 48}, "intermediate_size 48 is not a multiple of the 32 weights that share a"),
    ({}, "int4-g128", {"hidden_size": 2880}, "hidden_size 2880 is not a multiple of the 128 weights that share a"),
    ({}, "fp8-channel", {"hidden_size": 2056}, "hidden_size 2056 is not a multiple of 16"),
    ({}, "int4-g32", {"num_experts": 2000}, "2000 experts are more than the schedule's 1024"),
]


@pytest.mark.parametrize(("hardware", "dtype", "changed", "reason"), REFUSED, ids=[r for *_, r in REFUSED])
def test_what_it_cannot_do(h200: Hardware, hardware: dict[str, Any], dtype: str, changed: dict, reason: str) -> None:
    shape = replace(MoEShape(64, 8, 2048, 1024, dtype), **changed)
    assert (KERNEL.unsupported(shape, replace(h200, **hardware)) or "").startswith(reason)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A machine that has all that is needed: tests take something away."""
    monkeypatch.setattr(package, "is_installed", lambda name: True)
    monkeypatch.setattr(package, "version_of", lambda name: package.TESTED[-1])
    root = tmp_path / "cuda"
    (root / "lib").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "lib" / "libnvrtc.so.13").touch()
    for name in package.HEADERS:
        (root / "include" / name).touch()
    monkeypatch.setattr(package, "_toolkits", lambda: [root])
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(tmp_path / "cache"))
    return root


def test_obstacles_name_what_is_missing(installed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert KERNEL.unavailable() is None
    monkeypatch.setattr(package, "version_of", lambda name: "0.1.99")
    assert KERNEL.unavailable() == (
        "humming-kernels 0.1.99 is not tested (0.1.19 or 0.1.20 is); pip install 'ramp-moe[humming]'"
    )
    monkeypatch.setattr(package, "version_of", lambda name: "0.1.20")
    (installed / "include" / "nvrtc.h").unlink()
    assert "finds no libnvrtc with its headers" in (KERNEL.unavailable() or "")
    (installed / "include" / "nvrtc.h").touch()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "humming cannot write its cache" in (KERNEL.unavailable() or "")
    monkeypatch.setattr(package, "is_installed", lambda name: name != "humming")
    assert KERNEL.unavailable() == "humming missing; pip install 'ramp-moe[humming]'"
    with pytest.raises(KernelError, match="humming missing"):
        KERNEL.build(MoEShape(8, 2, 256, 128, "mxfp4"), H200, lambda *_: None)


def test_warm_sizes_are_where_other_programs_begin() -> None:
    """Of the schedule, of its rounding of 4,096 groups of 128 activations, and of the weighted sum."""
    plain, rounded = (KERNEL.warm_sizes(MoEShape(64, 8, 2048, 1024, name), 512) for name in ("mxfp4", "mxfp4-a8"))
    assert set(plain) >= {1, 65, 129, 257}
    assert set(rounded) - set(plain) == {4096 * 128 // 2048 + 1} - set(plain)
    assert 4096 * 128 // 2048 + 1 in rounded


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_codes_go_to_humming_as_they_are_stored(name: str) -> None:
    """Every byte, eight codes a word; scales of rows and INT4 groups in bf16, e8m0 byte by byte."""
    w = random_weights(MoEShape(2, 1, 256, 128, name), "cpu", seed=0)
    kind, stored = KINDS[name], formats.per_row(w)
    if w.stored.packed:
        every = torch.arange(w.gate_up.numel()).to(torch.uint8).view_as(w.gate_up)
        stored = replace(stored, gate_up=every)
    for e, tensors in enumerate(repacking._experts(kind, stored.gate_up, stored.gate_up_scale)):
        assert tensors["weight"].shape == (1, 256, 256 * kind.bits // 32)
        raw, given_raw = tensors["weight"].view(torch.uint8), stored.gate_up[e : e + 1].view(torch.uint8)
        assert torch.equal(raw, given_raw)
        scale = tensors["weight_scale"]
        assert scale.dtype == getattr(torch, "float8_e8m0fnu" if kind.scale_bits == 8 else kind.scale_dtype)
        given_scale = stored.gate_up_scale[e : e + 1]
        assert (
            torch.equal(scale.view(torch.uint8), given_scale)
            if kind.scale_bits == 8
            else torch.equal(scale, given_scale.to(scale.dtype))
        )
    if w.stored.packed and kind.element == "uint4":
        assert formats.INT4[0] == -8, "the code 0 is Humming's integer 0, less 8"


def test_exponents_that_fp8_cannot_hold() -> None:
    packed = torch.full((2, 4, 32), 0x22, dtype=torch.uint8)
    scale = torch.full((2, 4, 2), 127, dtype=torch.uint8)
    assert not repacking.needs_row_exponents(packed, scale)
    scale[1, 2] = 127 - 11
    assert not repacking.needs_row_exponents(packed, scale)
    scale[1, 2] = 127 - 12
    assert repacking.needs_row_exponents(packed, scale), "each row has one exponent, the expert has two"
    scale[1, 2, 0] = 127
    with pytest.raises(KernelError, match=r"row of expert 1 differ by more than 2\^11.*activations='bf16'"):
        repacking.needs_row_exponents(packed, scale)
    packed[1, 2, 16:] = 0x08
    assert not repacking.needs_row_exponents(packed, scale), "a group of zeros, minus zero among them, has any scale"
    scale[0, 0, 0] = 255
    with pytest.raises(KernelError, match=r"one is 2\^128 \(2\^128 is NaN\)"):
        repacking.check_exponents(scale)


def test_weights_that_it_does_not_take() -> None:
    w = random_weights(MoEShape(2, 1, 128, 128, "bf16"), "cpu", seed=0)
    with pytest.raises(KernelError, match=r"takes weights in fp8 or .*, not in bf16"):
        KERNEL.prepare(w)
    with pytest.raises(KernelError, match="runs on Hopper"):
        KERNEL.prepare(random_weights(MoEShape(2, 1, 128, 128, "mxfp4"), "cpu", seed=0))


# --- launches, over an emulation --------------------------------------------------------------------------------------


class Emulation:
    """What Humming's launch computes of dense weights, and what it trusts its caller in."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def out(self, kernel: Any, a: Any, w: Any, s: Any, s2: Any, a_scale: Any, *rest: Any) -> None:
        none1, none2, none3, out, sorted_ids, expert_ids, used, none4, locks, top_k, n, check = rest
        assert none1 is none2 is none3 is none4 is s2 is None
        assert check
        block, group = kernel.tolist()
        self.blocks.append(block)
        assert n == len(out) == len(a) * top_k
        assert int(locks.count_nonzero()) == 0
        assert locks.dtype == torch.int32
        x = a.float()
        if group is not None and a_scale is not None:
            assert a.dtype == torch.float8_e4m3fn
            assert a_scale.shape == (len(a), a.shape[1] // group if group else 1)
            x = x * a_scale.repeat_interleave(group or a.shape[1], 1)
        else:
            assert a.dtype == torch.bfloat16
        assert int(used) % block == 0
        for tile in range(int(used) // block):
            ids = sorted_ids[tile * block : (tile + 1) * block]
            ids = ids[ids < n].long()
            out[ids] = (x[ids // top_k] @ w[int(expert_ids[tile])].T).bfloat16()


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    made = Emulation()
    operators = SimpleNamespace(launch_kernel=SimpleNamespace(out=made.out))
    monkeypatch.setattr(package, "package", lambda: SimpleNamespace(operators=operators))
    monkeypatch.setattr(
        package, "loaded", lambda layer, tile, device: torch.tensor([tile.block_m, json.loads(layer)["group"]])
    )
    return made


def prepared(w: MoEWeights) -> PreparedHumming:
    """As `launch.prepare`, with dense weights in place of Humming's layout."""
    w = relayout(w, "gate-first")
    shape, stored = w.shape(1), formats.format_of(w)
    kind = KINDS[shape.dtype]

    def side(weight: Any, scale: Any, matrices: int) -> Side:
        dense = torch.stack([formats.plain(a, b, stored, matrices) for a, b in zip(weight, scale, strict=True)])
        return Side(json.dumps({"group": kind.a_group}), dense, scale, None)

    return PreparedHumming(
        shape, kind, side(w.gate_up, w.gate_up_scale, 2), side(w.down, w.down_scale, 1), w.gate_up_bias, w.down_bias,
        w.activation, w.limit,
    )  # fmt: skip


def layer(name: str, bias: bool = False, **options: Any) -> MoEWeights:
    w = replace(random_weights(MoEShape(4, 1, 128, 128, name), "cpu", seed=1), **options)
    if not bias:
        return w
    generator = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(4, n, generator=generator) for n in (256, 128))
    return replace(w, gate_up_bias=gate_up, down_bias=down)


def run(c: KernelConfig, w: MoEWeights, b: Batch) -> torch.Tensor:
    out = torch.full_like(b.hidden_states, float("nan"))
    keys = list(KERNEL.steps(c, prepared(w), b, out, Workspace()))
    assert keys == [s.key for s in c.stages]
    return out


TOLERANCE = {16: 0.01, 8: 0.06}
CASES = [(name, routing) for name in ("fp8", "int4-g32-a8", "mxfp4") for routing in ROUTINGS]
CASES += [(name, "padded") for name in KINDS if name not in ("fp8", "int4-g32-a8", "mxfp4")]


@pytest.mark.parametrize("case", slow_except([c for c in CASES if c[1] == "padded"], CASES))
def test_emulated(case: tuple[str, str], emulation: Emulation) -> None:
    name, routing = case
    w, b = layer(name), batch(7, 2, 4, 128, routing, "cpu", torch.bfloat16)
    c = KERNEL.default_config(w.shape(2), H200, 7)
    assert error(run(c, w, b), reference(w, b)) < TOLERANCE[KINDS[name].a_bits]
    assert emulation.blocks == [tile.block_m for tile in tiles_of(c.params)]


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu_oai", "swiglu_clamped"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-a8", "fp8-channel"])
def test_biases_and_activations(name: str, activation: str, emulation: Emulation) -> None:
    w = layer(name, bias=True, activation=activation, limit=LIMITS.get(activation))
    b = batch(5, 2, 4, 128, "padded", "cpu", torch.bfloat16)
    out = run(KERNEL.default_config(w.shape(2), H200, 5), w, b)
    assert error(out, reference(w, b)) < TOLERANCE[KINDS[name].a_bits]


def test_every_layout_gives_the_same_bits(emulation: Emulation) -> None:
    w, b = layer("int4-g32", bias=True), batch(5, 2, 4, 128, "uniform", "cpu", torch.bfloat16)
    c = KERNEL.default_config(w.shape(2), H200, 5)
    outs = [run(c, relayout(w, key), b) for key in LAYOUTS]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_unlike_token_blocks_are_sorted_twice(emulation: Emulation) -> None:
    """Humming's own pairs are."""
    w, b = layer("mxfp4-a8"), batch(9, 2, 4, 128, "skewed", "cpu", torch.bfloat16)
    shape = w.shape(2)
    up = next(t for t in tiles(shape, "up") if t.block_m == 16)
    c = KERNEL.describe(up, tiles(shape, "down")[0], shape, H200)
    assert error(run(c, w, b), reference(w, b)) < 0.06
    assert emulation.blocks == [16, 8]


@pytest.mark.parametrize("name", ["mxfp4", "int4-g32-a8"])
def test_a_layer_computes_with_new_weights(name: str, emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "prepare", prepared)
    monkeypatch.setattr(package, "problem", lambda: None)
    old, new = (random_weights(MoEShape(4, 1, 128, 128, name), "cpu", seed) for seed in (1, 2))
    moe, b = LayerRuntime(old, 2, H200, [KERNEL]), batch(5, 2, 4, 128, "padded", "cpu", torch.bfloat16)
    assert moe.layouts == (f"humming/{name}",)
    for w in (old, new):
        moe.update(w)
        out = moe(b.hidden_states, b.topk_ids, b.topk_weights)
        assert error(out, reference(w, b)) < TOLERANCE[KINDS[name].a_bits]


def test_a_launch_leaves_nothing_in_what_was_prepared(emulation: Emulation) -> None:
    """New weights are copied into it part by part: none may appear meanwhile."""
    w, b = layer("mxfp4"), batch(5, 2, 4, 128, "uniform", "cpu", torch.bfloat16)
    p, c = prepared(w), KERNEL.default_config(w.shape(2), H200, 5)
    before = [path for path, _ in leaves(p)]
    KERNEL.launch(c, p, b, torch.empty_like(b.hidden_states), Workspace())
    assert [path for path, _ in leaves(p)] == before


def test_what_a_launch_refuses(emulation: Emulation) -> None:
    w = layer("mxfp4")
    c, p = KERNEL.default_config(w.shape(2), H200, 3), prepared(w)

    def launch_on(b: Batch) -> None:
        KERNEL.launch(c, p, b, torch.empty_like(b.hidden_states), Workspace())

    with pytest.raises(KernelError, match="bf16 only"):
        launch_on(batch(3, 2, 4, 128, "uniform", "cpu", torch.float16))
    with pytest.raises(KernelError, match=r"must be \[T, 128\]"):
        launch_on(batch(3, 2, 4, 256, "uniform", "cpu", torch.bfloat16))
    b = batch(3, 2, 4, 128, "uniform", "cpu", torch.bfloat16)
    odd = torch.empty(3 * 128 + 1, dtype=torch.bfloat16)[1:].view(3, 128).copy_(b.hidden_states)
    with pytest.raises(KernelError, match="hidden_states must be contiguous and start at a multiple of 16"):
        launch_on(replace(b, hidden_states=odd))


# --- building ---------------------------------------------------------------------------------------------------------


def test_a_build_reports_drops_and_reuses(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = MoEShape(8, 2, 256, 128, "mxfp4")
    bad = tiles(shape, "up")[1]

    def outcomes(shape: Any, hardware: Any, wanted: Any, jobs: Any) -> Iterator[dict[str, Any]]:
        for which, tile in wanted:
            about = {"which": which, "tile": config.asdict(tile)}
            if (which, tile) == ("up", bad):
                yield about | {"error": "ptxas died"}
            else:
                yield about | {"file": f"{which}{tile.name}", "bytes": 10, "new": tile.block_m == 8}

    monkeypatch.setattr(build, "_outcomes", outcomes)
    told: list[tuple[int, int]] = []
    built = KERNEL.build(shape, H200, lambda done, total, name: told.append((done, total)))
    configs = KERNEL.configs(shape, H200)
    assert {*built.compiled, *built.reused, *built.dropped} == {c.name for c in configs}
    assert set(built.dropped.values()) == {"ptxas died"}
    assert {c.name for c in configs if tiles_of(c.params)[0] == bad} == set(built.dropped)
    assert built.compiled
    assert built.reused
    total = sum(len(tiles(shape, which)) for which in ("up", "down"))
    assert told == [(i, total) for i in range(total + 1)]
    assert built.bytes == 10 * (total - 1)


def test_a_build_that_cannot_start_says_why(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false" if os.path.exists("/bin/false") else "/usr/bin/false")
    with pytest.raises(KernelError, match="humming cannot compile ahead"):
        KERNEL.build(MoEShape(8, 2, 256, 128, "mxfp4"), H200, lambda *_: None)


def test_pruning_deletes_what_changed_headers_left(installed: Any, tmp_path: Any) -> None:
    header = tmp_path / "a.cuh"
    header.touch()
    folders = []
    for i, stamp in enumerate((header.stat().st_mtime, 1.0)):
        folder = package.cache() / f"{i}"
        folder.mkdir(parents=True)
        (folder / "kernel.cubin").write_bytes(b"12345")
        (folder / "signature.txt").write_text(f"NVRTC$$nvrtc+13.0$$code$${json.dumps({str(header): stamp})}$$hash")
        folders.append(folder)
    assert KERNEL.prune() > 5
    assert [folder.exists() for folder in folders] == [True, False]
    assert KERNEL.prune() == 0


# --- beside the package -----------------------------------------------------------------------------------------------


def test_every_format_that_it_names_exists() -> None:
    assert set(KINDS) <= set(FORMATS)
    for name, kind in KINDS.items():
        stored = FORMATS[name]
        assert (stored.bits, stored.rounds) == (kind.bits, kind.a_bits == 8)
        assert (stored.activation_group or 0) == kind.a_group or not stored.rounds
        assert launch.KINDS is KINDS
