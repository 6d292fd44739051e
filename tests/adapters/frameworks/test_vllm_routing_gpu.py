"""Graphs in which the kernel chooses the experts, behind vLLM's own router, as vLLM's runner calls both."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import error, expected, weights
from ramp_moe.spec.launchable import Batch
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_adapters.frameworks.vllm import routing
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.router import fused_topk_router
from vllm_cases import experts_of, serve

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, HIDDEN, INTER = 64, 8, 2048, 1024
TOLERANCE = 2e-2


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        patch.setenv("RAMP_MOE_CALIBRATE_S", "0")
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


class Layer:
    """vLLM's router before its routed experts. `padding` is what vLLM says of the batch."""

    def __init__(self, dtype: str, renormalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        serve(monkeypatch)
        self.of = weights(EXPERTS, HIDDEN, INTER, dtype, "cuda")
        self.routed: Any = experts_of(self.of, TOP_K)
        self.router = fused_topk_router.FusedTopKRouter(TOP_K, EXPERTS, renormalize=renormalise)
        self.padding: torch.Tensor | None = None
        runner = SimpleNamespace(router=self.router, routed_experts=self.routed)
        context = SimpleNamespace(no_compile_layers={self.routed.layer_name: runner})
        monkeypatch.setattr(routing, "is_forward_context_available", lambda: True)
        monkeypatch.setattr(routing, "get_forward_context", lambda: context)
        for module in (routing, fused_topk_router):
            monkeypatch.setattr(module, "_get_padding_mask", lambda tokens: self.padding)

    @property
    def kernel_routing(self) -> Any:
        return self.routed.quant_method.moe_kernel.fused_experts.routing

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        topk_weights, topk_ids = self.router.select_experts(x, logits)
        found: torch.Tensor = self.routed.forward_modular(x=x, topk_weights=topk_weights, topk_ids=topk_ids)
        return found

    def wanted(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = logits.float().softmax(-1).topk(TOP_K)
        if self.router.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.padding is not None:
            ids = ids.masked_fill(self.padding[:, None], -1)
        return expected(self.of, Batch(x, ids.int(), weights), quantise=self.of.gate_up_scale is not None)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_a_graph_follows_its_logits(tokens: int, padded: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(dtype, padded, monkeypatch)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(tokens, EXPERTS, dtype=torch.bfloat16, device="cuda")
    if padded:
        layer.padding = torch.ones(tokens, dtype=torch.bool, device="cuda")  # as while vLLM captures
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x, logits)
        layer(x, logits)
        torch.cuda.synchronize()
        assert tokens in layer.kernel_routing._sizes, "the kernel chooses as vLLM does"
        with torch.cuda.graph(graph, stream=stream):
            out = layer(x, logits)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        logits.normal_()
        logits[:, seed :: seed + 2] += 4  # skewed
        if layer.padding is not None:
            layer.padding.copy_(torch.arange(tokens, device="cuda") >= tokens - seed)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        found = out.clone()
        assert error(found, layer.wanted(x, logits)) < TOLERANCE
        assert error(layer(x, logits), found) < TOLERANCE


def test_a_kernel_that_fails_leaves_its_routing_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("bf16", True, monkeypatch)
    x = torch.randn(4, HIDDEN, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(4, EXPERTS, dtype=torch.bfloat16, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such launch")

    with torch.cuda.stream(stream):
        layer(x, logits)
        layer(x, logits)
        torch.cuda.synchronize()
        assert 4 in layer.kernel_routing._sizes
        from ramp_moe_adapters.frameworks.vllm import experts

        monkeypatch.setattr(experts, "forward_routed", fail)
        with torch.cuda.graph(graph, stream=stream):
            out = layer(x, logits)
    logits.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, layer.wanted(x, logits)) < TOLERANCE
