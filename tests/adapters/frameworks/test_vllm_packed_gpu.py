"""INT4 layers in vLLM on a GPU: measured, held once, eager and in CUDA graphs, and loaded anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, error
from ramp_moe import MoEShape
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_adapters.frameworks.vllm import layer as layers
from ramp_moe_adapters.frameworks.vllm import packed
from ramp_moe_adapters.frameworks.vllm.experts import RampExperts
from ramp_moe_adapters.frameworks.vllm.methods import FOUR_BITS, METHODS
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm_cases import experts_of, load, run, said_by_plugin, scheme, serve

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, HIDDEN, INTER = 32, 4, 1024, 512
TOLERANCE = 0.012
INT4 = scheme({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, None, "pack-quantized")
ROUTINGS = ("uniform", "skewed", "one-expert", "padded", "duplicates")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a process that has just started, with an empty cache."""
    monkeypatch.setenv(plugin.SWITCH, "1")
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", "60")
    # Whichever of them is installed, since what vLLM would take does not matter here.
    monkeypatch.setattr(packed, "LIKE", dict.fromkeys(packed.LIKE, frozenset({"humming", "marlin"})))
    monkeypatch.setattr(layers, "METHODS", {**METHODS, **FOUR_BITS})
    plugin.register()
    serve(monkeypatch)
    yield
    op_registry_oot.pop("RoutedExperts")


def layer(seed: int = 0) -> MoEWeights:
    return random_weights(MoEShape(EXPERTS, 1, HIDDEN, INTER, "int4-g32"), "cuda", seed)


def given(tokens: int, routing: str, seed: int = 0) -> Batch:
    found = batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, "cuda", torch.bfloat16, seed)
    return Batch(found.hidden_states, found.topk_ids.masked_fill(found.topk_ids == EXPERTS, -1), found.topk_weights)


def made(of: MoEWeights) -> Any:
    with said_by_plugin() as said:
        routed = experts_of(of, TOP_K, compressed=INT4, moe_options={"max_num_tokens": 512})
    assert routed.quant_method.experts_cls is RampExperts, said
    return routed


def test_a_measured_layer_is_held_once_and_computes() -> None:
    of = layer()
    before = torch.cuda.memory_allocated()
    routed = made(of)
    found = routed.quant_method.moe_kernel.fused_experts.layer
    held = torch.cuda.memory_allocated() - before
    weights = of.gate_up.numel() + of.down.numel()
    assert held < 1.6 * weights, f"{found.layouts}: {held} bytes for {weights}"
    for tokens in (1, 17, 300):
        for routing in ROUTINGS:
            b = given(tokens, routing)
            assert error(run(routed, b), reference(of, b)) < TOLERANCE, (tokens, routing)


def test_a_captured_layer_follows_routings_and_new_weights() -> None:
    of, new = layer(), layer(seed=1)
    routed, b = made(of), given(24, "uniform")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        run(routed, b)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = run(routed, b)

    def check(with_weights: MoEWeights) -> None:
        for seed, routing in enumerate(ROUTINGS):
            drawn = given(24, routing, seed)
            for name in ("hidden_states", "topk_ids", "topk_weights"):
                getattr(b, name).copy_(getattr(drawn, name))
            graph.replay()
            torch.cuda.synchronize()
            assert error(out, reference(with_weights, b)) < TOLERANCE, routing

    check(of)
    with torch.device("cuda"):
        initialize_layerwise_reload(routed)
        load(routed, new)
        finalize_layerwise_reload(routed, SimpleNamespace(dtype=torch.bfloat16))
    check(new)
