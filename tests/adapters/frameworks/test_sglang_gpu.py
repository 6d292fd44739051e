"""SGLang's FusedMoE with ramp_moe's core on a GPU: eager, and in CUDA graphs whose routing changes between replays."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang.srt.layers.moe.moe_runner")

import torch
from graph_cases import SHAPE, priced, triton_of
from moe_cases import batch, error, expected, weights
from ramp_moe.measurements.calibration_file import records
from ramp_moe.registry.detect import detect
from ramp_moe.runtime.calibration import ENGINE, Calibration
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks.sglang import model as whole
from ramp_moe_adapters.frameworks.sglang import runner as plugin
from ramp_moe_kernels.triton.kernel import TritonMoE
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang_cases import Experts, selected

pytestmark = pytest.mark.gpu

E, K, H, I = 64, 8, 2048, 1024  # noqa: E741
ROUTINGS = ("uniform", "skewed", "one-expert", "few-experts", "padded")
BF16 = torch.bfloat16
TOLERANCE = 3e-2
SGLANGS = 0.07
"""Of SGLang's runner, which in fp8 rounds the intermediate to bf16 first, unlike the reference."""


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(plugin, "_builder", Builder())
    with selected(), torch.no_grad():
        yield


def wrong(out: torch.Tensor, given: MoEWeights, x: Batch) -> float:
    return error(out, expected(given, x, given.gate_up_scale is not None))


def copied(x: Batch) -> Batch:
    """SGLang's runner may write its output over the hidden states."""
    return Batch(x.hidden_states.clone(), x.topk_ids.clone(), x.topk_weights.clone())


def copy_into(static: Batch, x: Batch) -> None:
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        getattr(static, name).copy_(getattr(x, name))


def captured(experts: Experts, static: Batch) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """As SGLang's decode runner captures: two runs on the stream of the capture, then the capture."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with model_capture_mode(), torch.cuda.stream(stream):
        for _ in range(2):
            torch.cuda.synchronize()
            experts(static)
        with torch.cuda.graph(graph, stream=stream):
            out = experts(static)
    return graph, out


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 7, 128, 2048])
def test_eager(dtype: str, tokens: int) -> None:
    given = weights(E, H, I, dtype, "cuda")
    experts = Experts(given, K)
    for routing in ROUTINGS:
        x = batch(tokens, K, E, H, routing, "cuda", BF16)
        if (x.topk_ids >= 0).any() and (x.topk_ids < E).any():
            assert 0 < wrong(experts(x), given, x) < TOLERANCE, routing
    assert experts.runner.runner_core._parameters is not None, "SGLang's runner computed it"


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 32, 256])
def test_graph(dtype: str, tokens: int) -> None:
    given = weights(E, H, I, dtype, "cuda")
    experts = Experts(given, K)
    static = batch(tokens, K, E, H, "uniform", "cuda", BF16)
    graph, out = captured(experts, static)
    plan = experts.runner.runner_core._parameters.layer.graphs.plans[tokens]
    print(f"{dtype}, {tokens} tokens: {plan.mode}, {len(plan.bodies)} bodies ({plan.why})")
    for seed, routing in enumerate(r for r in ROUTINGS if tokens > 1 or r != "padded"):
        copy_into(static, batch(tokens, K, E, H, routing, "cuda", BF16, seed + 1))
        graph.replay()
        torch.cuda.synchronize()
        assert 0 < wrong(out, given, static) < TOLERANCE, routing


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_graph_computes_with_new_weights(dtype: str) -> None:
    given = weights(E, H, I, dtype, "cuda")
    experts = Experts(given, K)
    static = batch(64, K, E, H, "uniform", "cuda", BF16)
    graph, out = captured(experts, static)
    new = replace(given, **{f.name: t.flip(0).contiguous() for f in fields(given)
                            if isinstance(t := getattr(given, f.name), torch.Tensor)})  # fmt: skip
    experts.layer.w13_weight.data.copy_(new.gate_up)
    experts.layer.w2_weight.data.copy_(new.down)
    if new.gate_up_scale is not None:
        experts.layer.w13_weight_scale_inv.data.copy_(new.gate_up_scale)
        experts.layer.w2_weight_scale_inv.data.copy_(new.down_scale)
    graph.replay()
    torch.cuda.synchronize()
    assert 0 < wrong(out, new, static) < TOLERANCE
    assert 0 < wrong(experts(static), new, static) < TOLERANCE


def test_a_batch_of_more_than_a_million_ids() -> None:
    given, x = weights(16, 256, 128, "bf16", "cuda"), batch(131_073, 8, 16, 256, "skewed", "cuda", BF16)
    assert 0 < wrong(Experts(given, 8)(x), given, x) < TOLERANCE


class Priced(Builder):
    """Prices for which the routing decides which of four configurations is best."""

    def layer(self, weights: MoEWeights, top_k: int, *rest: object) -> LayerRuntime:
        hardware = detect()
        return LayerRuntime(weights, top_k, hardware, [TritonMoE()], priced(hardware, triton_of()))


def test_the_device_chooses_at_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_builder", Priced())
    experts, hidden, top_k, tokens = SHAPE.num_experts, SHAPE.hidden_size, SHAPE.top_k, 256
    given = weights(experts, hidden, SHAPE.intermediate_size, "bf16", "cuda")
    module = Experts(given, top_k)
    static = batch(tokens, top_k, experts, hidden, "uniform", "cuda", BF16)
    module(static)
    layer = module.runner.runner_core._parameters.layer
    recorder = layer.graphs.record(16)
    graph, out = captured(module, static)
    plan = layer.graphs.plans[tokens]
    assert len(plan.bodies) > 1
    assert plan.mode != "single"
    best = set()
    for seed, routing in enumerate((*ROUTINGS, "uniform")):
        copy_into(static, batch(tokens, top_k, experts, hidden, routing, "cuda", BF16, seed + 1))
        graph.replay()
        torch.cuda.synchronize()
        assert 0 < wrong(out, given, static) < TOLERANCE, routing
        best.add(layer.choose(static).name)
    assert len(best) > 1, "the routings want different candidates"
    assert len(set(recorder.read().choices.tolist())) > 1


def test_weights_are_held_once() -> None:
    given = weights(E, H, I, "bf16", "cuda")
    experts = Experts(given, K)
    x = batch(8, K, E, H, "uniform", "cuda", BF16)
    del given
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    experts(x)
    torch.cuda.synchronize()
    added = torch.cuda.memory_allocated() - before - experts.runner.runner_core._parameters.layer.workspace.bytes
    held = E * 3 * I * H * 2
    assert added < held / 20


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_layer_that_was_made_when_the_model_was_loaded(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its buffers have their size before the first batch, outside of graphs and in them. It was measured against
    SGLang's runner."""
    caplog.set_level(logging.INFO, "ramp_moe")
    given = weights(E, H, I, dtype, "cuda")
    with selected(chunked_prefill_size=512):
        experts = Experts(given, K)
        text = SimpleNamespace(hf_text_config=SimpleNamespace(num_experts_per_tok=K), dtype=BF16)
        runner = SimpleNamespace(
            model=torch.nn.ModuleList([experts.layer]), model_config=text, decode_num_tokens_per_req=lambda: 1
        )
        whole.loaded(None, runner)
        core = experts.runner.runner_core
        assert core.made
        had = core.layer.workspace.bytes
        for tokens in (1, 100, 512):
            x = batch(tokens, K, E, H, "uniform", "cuda", BF16)
            assert 0 < wrong(experts(copied(x)), given, x) < SGLANGS
        assert core.layer.workspace.bytes == had
        x = batch(64, K, E, H, "uniform", "cuda", BF16)
        static = copied(x)
        graph, out = captured(experts, static)
        copy_into(static, x)
        graph.replay()
        torch.cuda.synchronize()
        assert 0 < wrong(out, given, x) < SGLANGS
        whole.captured(None, runner)
    print("\n".join(caplog.messages))
    assert any("what computes batches of how many tokens" in line for line in caplog.messages)
    (record,) = records()
    assert not {name for name in record.dropped if name == ENGINE}, "SGLang's runner was timed"
    assert {t.tokens for t in record.timings if t.candidate == ENGINE}
    assert all(1 < t.us < 20_000 for t in record.timings)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_sizes_that_sglang_keeps_are_computed_by_its_runner(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Eager and in a graph."""
    monkeypatch.setattr(Calibration, "engine_keeps", lambda self, n, ours: True)
    given, x = weights(E, H, I, dtype, "cuda"), batch(48, K, E, H, "uniform", "cuda", BF16)
    with selected(chunked_prefill_size=64):
        experts = Experts(given, K)
        text = SimpleNamespace(hf_text_config=SimpleNamespace(num_experts_per_tok=K), dtype=BF16)
        module = torch.nn.ModuleList([experts.layer])
        whole.loaded(None, SimpleNamespace(model=module, model_config=text, decode_num_tokens_per_req=lambda: 1))
        core = experts.runner.runner_core
        assert core.made
        monkeypatch.setattr(core.layer, "forward", lambda *_, **__: 1 / 0)
        static = copied(x)
        eager = experts(static).float().clone()
        graph, out = captured(experts, static)
        out.fill_(float("nan"))
        copy_into(static, x)
        graph.replay()
        torch.cuda.synchronize()
    assert not core._failed
    assert error(out, eager) < 1e-2
    assert error(eager, expected(given, x, quantise=False)) < SGLANGS
