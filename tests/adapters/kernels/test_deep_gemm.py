"""DeepGEMM's path: wired over an emulation of its two functions everywhere, and the real ones on a Hopper GPU; its
choice of tiles against what it prints."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_cases import H200, batch, error, expected, weights
from ramp_moe import Hardware, KernelConfig, KernelError, Registry, expert_histogram, generate
from ramp_moe.runtime.layer import MoELayer
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.deep_gemm import kernel as deep_gemm
from ramp_moe_adapters.kernels.deep_gemm.config import Tile, choose, pinned
from ramp_moe_adapters.kernels.deep_gemm.kernel import DeepGEMM
from ramp_moe_adapters.kernels.deep_gemm.launch import PreparedDeepGEMM, gemm, library

KERNEL = DeepGEMM()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTINGS = ("uniform", "skewed", "few-experts", "one-expert", "padded", "duplicates", "garbage")
EXPERTS, TOP_K, HIDDEN, INTER = 6, 3, 256, 256
LIMITS = {"fp8": 0.06, "bf16": 0.01}
# Against the layer that quantises its intermediates, too; here they are bf16 before, which rounds some the other way.
QUANTISED = {"fp8": 0.035, "bf16": 0.01}
MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
real = pytest.mark.skipif(KERNEL.unavailable() is not None, reason=str(KERNEL.unavailable()))


class Emulation:
    """What DeepGEMM's functions compute, and what they trust their caller in; `seen` are the settings of each call."""

    def __init__(self) -> None:
        self.alignment, self.num_sms, self.multiple = 128, 132, (1, 1)
        self.seen: list[tuple[int, int, tuple[int, int], int]] = []
        self.fails = self.pdl = False

    def get_pdl(self) -> bool:
        return self.pdl

    def set_pdl(self, value: bool) -> None:
        self.pdl = value

    def get_num_sms(self) -> int:
        return self.num_sms

    def set_num_sms(self, value: int) -> None:
        assert value % 2 == 0
        self.num_sms = value

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return self.alignment

    def set_mk_alignment_for_contiguous_layout(self, value: int) -> None:
        self.alignment = value

    def set_block_size_multiple_of(self, value: tuple[int, int]) -> None:
        self.multiple = value

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Any, b: Any, out: Any, ends: Any, **psum: Any) -> None:
        (x, xs), (w, ws) = a, b
        assert x.dtype == w.dtype == torch.float8_e4m3fn
        assert xs.dtype == ws.dtype == torch.float32
        assert xs.shape == (len(x), x.shape[1] // 128)
        assert xs.stride() == (1, -(-len(x) // 4) * 4), "would be transposed by another launch"
        assert ws.shape == (len(w), -(-w.shape[1] // 128), w.shape[2] // 128)
        wide = ws.repeat_interleave(128, 1)[:, : w.shape[1]].repeat_interleave(128, 2)
        self._multiply(x.float() * xs.repeat_interleave(128, 1), w.float() * wide, out, ends, **psum)

    def m_grouped_bf16_gemm_nt_contiguous(self, a: Any, b: Any, out: Any, ends: Any, **psum: Any) -> None:
        assert a.dtype == b.dtype == torch.bfloat16
        self._multiply(a.float(), b.float(), out, ends, **psum)

    def _multiply(
        self, a: Any, b: Any, out: Any, ends: Any, use_psum_layout: bool, expected_m_for_psum_layout: int
    ) -> None:
        assert use_psum_layout
        assert self.pdl
        self.seen.append((self.alignment, self.num_sms, self.multiple, expected_m_for_psum_layout))
        if self.fails:
            raise RuntimeError("Assertion error (csrc/apis/gemm.hpp:190)")
        assert out.dtype == torch.bfloat16
        assert ends.dtype == torch.int32
        assert all(t.is_contiguous() for t in (out, ends))
        first = 0
        for expert, end in enumerate(ends.tolist()):
            tiles = -(-(end - first) // self.alignment)
            assert tiles >= 0, "an unsigned difference would be huge"
            rows = slice(first, first + tiles * self.alignment)
            out[rows] = (a[rows] @ b[expert].T).bfloat16()
            first += tiles * self.alignment


def layer(dtype: str, **options: Any) -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, dtype, DEVICE, **options)


def given(tokens: int, routing: str = "uniform", seed: int = 0) -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, DEVICE, torch.bfloat16, seed)


def configs(w: MoEWeights) -> list[KernelConfig]:
    return list(usable_configs(KERNEL, w.shape(TOP_K), H200))


def run(
    config: KernelConfig, prepared: PreparedDeepGEMM, batch: Batch, workspace: Workspace | None = None
) -> torch.Tensor:
    out = torch.full_like(batch.hidden_states, float("nan"))
    KERNEL.launch(config, prepared, batch, out, workspace or Workspace())
    return out


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_emulated(dtype: str, routing: str) -> None:
    w, emulation = layer(dtype), Emulation()
    for config, tokens in zip((configs(w)[0], configs(w)[-1]), (1, 21), strict=True):
        given_batch = given(tokens, routing)
        out = run(config, PreparedDeepGEMM(w, emulation), given_batch)
        assert error(out, expected(w, given_batch, quantise=dtype == "fp8")) < QUANTISED[dtype]
        p = dict(config.params)
        for which, seen in zip(("up", "down"), emulation.seen[-2:], strict=True):
            assert seen == (p["block_m"], p["num_sms"], (1, 1), p[f"{which}_expected_m"])
    assert (emulation.alignment, emulation.num_sms, emulation.multiple) == (128, 132, (1, 1))


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh", "swiglu_oai", "swiglu_clamped"])
def test_biases_and_activations(activation: str) -> None:
    w = layer("bf16", activation=activation, bias=True)
    given_batch = given(9, "padded")
    out = run(configs(w)[0], PreparedDeepGEMM(w, Emulation()), given_batch)
    assert error(out, expected(w, given_batch, quantise=False)) < 0.01


@pytest.mark.parametrize(
    ("dtype", "layout"), [("bf16", "up-first"), ("bf16", "gate-up-interleaved-8"), ("fp8", "up-first")]
)
def test_layouts_that_it_reads(dtype: str, layout: str) -> None:
    w = layer(dtype, bias=True)
    assert layout in KERNEL.readable_layouts(w.shape(TOP_K))
    config, given_batch = configs(w)[0], given(9, "padded")
    plain, other = (run(config, PreparedDeepGEMM(v, Emulation()), given_batch) for v in (w, relayout(w, layout)))
    assert torch.equal(plain, other)


def test_fp8_cannot_be_read_interleaved() -> None:
    assert KERNEL.readable_layouts(layer("fp8").shape(TOP_K)) == ("gate-first", "up-first")


def test_steps_are_the_stages() -> None:
    w, given_batch = layer("fp8"), given(5)
    config = configs(w)[0]
    out = torch.empty_like(given_batch.hidden_states)
    keys = list(KERNEL.steps(config, PreparedDeepGEMM(w, Emulation()), given_batch, out, Workspace()))
    assert keys == [s.key for s in config.stages]


def test_settings_are_restored_when_a_gemm_fails() -> None:
    w, emulation = layer("fp8"), Emulation()
    emulation.fails = True
    with pytest.raises(RuntimeError, match="Assertion error"):
        run(configs(w)[-1], PreparedDeepGEMM(w, emulation), given(5))
    assert emulation.seen[0][0] == dict(configs(w)[-1].params)["block_m"]
    assert (emulation.alignment, emulation.num_sms, emulation.pdl) == (128, 132, False)


def test_two_threads_do_not_see_each_others_settings() -> None:
    """The GEMMs alone: Triton's interpreter is not for threads."""
    emulation = Emulation()
    prepared = PreparedDeepGEMM(layer("bf16"), emulation)
    chosen = [
        {"block_m": m, "num_sms": sms, "up_expected_m": m, "up_multiple": 16} for m, sms in ((64, 132), (128, 104))
    ]
    a, ends = torch.zeros(EXPERTS * 128, HIDDEN, dtype=torch.bfloat16), torch.arange(1, EXPERTS + 1).int() * 128

    def work(params: dict[str, Any]) -> None:
        for _ in range(50):
            out = a.new_empty(len(a), 2 * INTER)
            gemm(prepared, params, "up", a, None, prepared.weights.gate_up.cpu(), None, out, ends)

    threads = [threading.Thread(target=work, args=(c,)) for c in chosen]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(emulation.seen) == 100
    assert set(emulation.seen) == {(p["block_m"], p["num_sms"], (1, 16), p["up_expected_m"]) for p in chosen}
    assert (emulation.alignment, emulation.num_sms, emulation.multiple) == (128, 132, (1, 1))


def test_fp16_is_refused() -> None:
    w = layer("bf16")
    half = batch(3, TOP_K, EXPERTS, HIDDEN, "uniform", DEVICE, torch.float16)
    with pytest.raises(KernelError, match=r"writes bf16 only: hidden_states are torch.float16"):
        run(configs(w)[0], PreparedDeepGEMM(w, Emulation()), half)


# The description.


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_grids_count_tiles(registry: Registry, h200: Hardware, model: str, dtype: str) -> None:
    shape = registry.shape(model, dtype)
    found = usable_configs(KERNEL, shape, h200)
    assert len(found) >= 6
    assert {dict(c.params)["block_m"] for c in found} == {64, 128}
    histogram = expert_histogram(generate("zipf1.2", 100, shape.num_experts, shape.top_k), shape.num_experts)
    for config in found:
        p = dict(config.params)
        for grid, rows, which in zip(
            config.gemms, (shape.gate_up_rows, shape.hidden_size), ("up", "down"), strict=True
        ):
            tiles = sum(math.ceil(h / p["block_m"]) for h in histogram.tolist())
            assert int(grid.logical(histogram)) == tiles * math.ceil(rows / grid.block_n)
            assert grid.launched(800, shape.num_experts) == p["num_sms"] <= h200.num_sms
            assert f"{which}(bn{grid.block_n}-" in config.name
    assert KERNEL.default_config(shape, h200, 64) in found
    assert KERNEL.default_config(shape, h200, 8192) in found


REFUSED = [
    ({"arch": "sm_100", "name": "b200"}, "fp8", {}, "described for Hopper (sm_90), b200 is sm_100"),
    ({}, "fp16", {}, "takes fp8 block-scaled or bf16 weights, not fp16"),
    ({}, "bf16", {"intermediate_size": 96}, "intermediate_size 96 is not a multiple of 64"),
    ({}, "fp8", {"hidden_size": 192}, "hidden_size 192 is not a multiple of the fp8 scale block 128"),
]


@pytest.mark.parametrize(("hardware", "dtype", "changed", "reason"), REFUSED, ids=[r for *_, r in REFUSED])
def test_what_it_cannot_do(
    registry: Registry, h200: Hardware, hardware: dict[str, Any], dtype: str, changed: dict[str, int], reason: str
) -> None:
    shape = replace(registry.shape("olmoe-1b-7b", dtype), **changed)
    assert KERNEL.unsupported(shape, replace(h200, **hardware)) == reason


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deep_gemm, "is_installed", lambda name: name in ("torch", "triton"))
    assert str(KERNEL.unavailable()).startswith("deep_gemm and tvm_ffi missing; pip install 'ramp-moe[deep-gemm]'")
    monkeypatch.setattr(deep_gemm, "is_installed", lambda name: True)
    monkeypatch.setattr(deep_gemm, "version_of", lambda package: "2.1.0")
    assert "deep_gemm 2.1.0 is not tested (sgl-deep-gemm 0.1.4.post1)" in str(KERNEL.unavailable())
    monkeypatch.setattr(deep_gemm, "version_of", lambda package: "0.1.4.post1")
    assert re.fullmatch(r"0\.1\.4\.post1\+[0-9a-f]{8}", KERNEL.version())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "install a CUDA toolkit and set CUDA_HOME" in str(KERNEL.unavailable())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache" / "deep"))
    assert KERNEL.unavailable() is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "file"))
    assert f"cannot write its cache {tmp_path / 'file'}; set DG_JIT_CACHE_DIR" in str(KERNEL.unavailable())


def test_another_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(set_num_sms=None))
    with pytest.raises(KernelError, match=r"has no m_grouped_fp8_gemm_nt_contiguous, .*; install a tested version"):
        library()
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    with pytest.raises(KernelError, match="deep_gemm cannot be loaded"):
        library()


# The choice of tiles.


def test_choices_worked_out_by_hand() -> None:
    # 64 experts of 2048 x 2048, one tile of 64 tokens each: 1024 tiles of 128 rows are eight waves on 132 SMs.
    assert choose("fp8", 64, 2048, 2048, 64, 64, 132) == Tile(128, 2, 1)
    assert choose("fp8", 64, 2048, 2048, 64, 64, 132, multiple=192) == Tile(192, 1, 1)
    assert choose("fp8", 64, 2048, 2048, 64, 64, 131) is not None
    # Few rows are one wave, in which nothing can be shared.
    one = choose("fp8", 128, 2048, 2048, 1, 128, 132)
    assert one is not None
    assert one.cluster_m * one.cluster_n == 1
    # 176 over 128: neither divides the other's rest.
    assert choose("fp8", 64, 2048, 2048, 64, 64, 132, multiple=176) is None


def test_a_multiple_pins_the_only_tile() -> None:
    """As deepseek-ai's own version can be told."""
    few, more = (pinned("fp8", 64, 2048, 2048, 64, 132, can) for can in (False, True))
    assert {p.tile for p in few} <= {p.tile for p in more}
    assert {p.tile.block_n for p in more} >= {112, 128, 144, 160, 192}
    for p in more:
        assert choose("fp8", 64, 2048, 2048, 64, p.expected_m, 132, p.multiple) == p.tile


# The real thing.


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def on_gpu(request: pytest.FixtureRequest) -> tuple[str, MoEWeights, PreparedDeepGEMM]:
    w = weights(16, 512, 384, request.param, "cuda")
    return request.param, w, KERNEL.prepare(w)


def spread(w: MoEWeights) -> list[KernelConfig]:
    """Some configurations of each token block: each is compiled."""
    found = usable_configs(KERNEL, w.shape(4), H200)
    return [*found[:2], found[len(found) // 2], *found[-2:]]


@pytest.mark.gpu
@real
def test_gpu_configurations(on_gpu: tuple[str, MoEWeights, PreparedDeepGEMM]) -> None:
    dtype, w, prepared = on_gpu
    workspace = Workspace()
    for config, routing in itertools.product(spread(w), ROUTINGS):
        for tokens in (1, 77):
            given_batch = batch(tokens, 4, 16, 512, routing, "cuda", torch.bfloat16, seed=tokens)
            out = run(config, prepared, given_batch, workspace)
            assert error(out, expected(w, given_batch, quantise=False)) < LIMITS[dtype], (config.name, routing, tokens)


@pytest.mark.gpu
@real
def test_gpu_many_tokens(on_gpu: tuple[str, MoEWeights, PreparedDeepGEMM]) -> None:
    dtype, w, prepared = on_gpu
    for config in spread(w):
        given_batch = batch(3000, 4, 16, 512, "skewed", "cuda", torch.bfloat16)
        assert error(run(config, prepared, given_batch), expected(w, given_batch, quantise=False)) < LIMITS[dtype]


@pytest.mark.gpu
@real
def test_gpu_graph_obeys_new_inputs(on_gpu: tuple[str, MoEWeights, PreparedDeepGEMM]) -> None:
    dtype, w, prepared = on_gpu
    config = KERNEL.default_config(w.shape(4), H200, 64)
    fixed = batch(64, 4, 16, 512, "uniform", "cuda", torch.bfloat16)
    out, workspace, graph = torch.empty_like(fixed.hidden_states), Workspace(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        KERNEL.launch(config, prepared, fixed, out, workspace)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            KERNEL.launch(config, prepared, fixed, out, workspace)
        for routing in ROUTINGS:
            other = batch(64, 4, 16, 512, routing, "cuda", torch.bfloat16, seed=3)
            for to, source in zip(
                (fixed.hidden_states, fixed.topk_ids, fixed.topk_weights),
                (other.hidden_states, other.topk_ids, other.topk_weights),
                strict=True,
            ):
                to.copy_(source)
            out.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            assert error(out, expected(w, other, quantise=False)) < LIMITS[dtype], routing


@pytest.mark.gpu
@real
def test_gpu_launches_and_grids(on_gpu: tuple[str, MoEWeights, PreparedDeepGEMM]) -> None:
    """Three launches beside DeepGEMM's two, whose grids are as described."""
    _, w, prepared = on_gpu
    config = usable_configs(KERNEL, w.shape(4), H200)[-1]
    given_batch, workspace = batch(64, 4, 16, 512, "skewed", "cuda", torch.bfloat16), Workspace()
    run(config, prepared, given_batch, workspace)
    out = torch.empty_like(given_batch.hidden_states)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        KERNEL.launch(config, prepared, given_batch, out, workspace)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.profiler.kineto_results.events() if "cuda" in str(e.device_type()).lower()]
    names = [e.name() for e in kernels if not e.name().startswith(("Memset", "Memcpy"))]
    theirs = [n for n in names if "gemm" in n]
    assert len(theirs) == 2, names
    assert len(names) == 5, names


@pytest.mark.gpu
@real
def test_gpu_layer_and_threads() -> None:
    w = weights(16, 512, 384, "fp8", "cuda")
    layers = [MoELayer(w, 4, H200, [KERNEL]) for _ in range(2)]
    wrong: list[float] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(5):
                b = batch(50 + 600 * which, 4, 16, 512, "skewed", "cuda", torch.bfloat16, seed)
                torch.cuda.synchronize()
                out = layers[which](b.hidden_states, b.topk_ids, b.topk_weights)
                torch.cuda.current_stream().synchronize()
                wrong.append(error(out, expected(w, b, quantise=False)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wrong) == 10
    assert max(wrong) < LIMITS["fp8"]


PRINT = """
    import sys, torch
    sys.path[:0] = {path!r}
    from moe_cases import H200, batch, weights
    from ramp_moe import get_registry
    from ramp_moe.spec.launchable import Workspace
    from ramp_moe.spec.kernel import usable_configs
    from ramp_moe_adapters.kernels.deep_gemm.kernel import DeepGEMM
    kernel = DeepGEMM()
    w = weights({experts}, {hidden}, {inter}, {dtype!r}, "cuda")
    prepared, b = kernel.prepare(w), batch(32, 2, {experts}, {hidden}, "uniform", "cuda", torch.bfloat16)
    out = torch.empty_like(b.hidden_states)
    seen = set()
    for config in usable_configs(kernel, w.shape(2), H200):
        keys = {{s.key for s in config.stages if s.kind == "gemm"}}
        if not keys <= seen and len(seen) < {most}:
            seen |= keys
            kernel.launch(config, prepared, b, out, Workspace())
            torch.cuda.synchronize()
"""
MOST = 16
"""GEMMs to compile: seconds each."""


@pytest.mark.gpu
@real
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize(("experts", "hidden", "inter"), [(8, 1024, 896), (64, 512, 384)])
def test_gpu_choice_is_what_it_prints(dtype: str, experts: int, hidden: int, inter: int) -> None:
    code = textwrap.dedent(PRINT).format(
        path=[str(Path(__file__).parents[2] / "support")],
        experts=experts,
        hidden=hidden,
        inter=inter,
        dtype=dtype,
        most=MOST,
    )
    env = os.environ | {"DG_PRINT_CONFIGS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    w = weights(experts, hidden, inter, dtype, "cpu")
    known = {}
    for config in usable_configs(KERNEL, w.shape(2), H200):
        p = dict(config.params)
        for which, rows, tile in zip(
            ("up", "down"), (2 * inter, hidden), re.findall(r"bn\d+-c\dx\d", config.name), strict=True
        ):
            known[p["block_m"], rows, p["num_sms"], p[f"{which}_expected_m"]] = tile
    printed = re.findall(
        r"GemmDesc\(.*? n=(\d+), .*?num_sms=(\d+), .*?expected_m=(\d+), .*?block_m=(\d+), block_n=(\d+), .*?"
        r"cluster_m=(\d+), cluster_n=(\d+)",
        done.stdout,
    )
    assert len(set(printed)) >= min(MOST, len(known)) - 1, done.stdout[:2000]
    for n, sms, expected_m, block_m, block_n, cm, cn in printed:
        assert known[int(block_m), int(n), int(sms), int(expected_m)] == f"bn{block_n}-c{cm}x{cn}"
