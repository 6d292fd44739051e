"""New weights for layers and wrapped models whose CUDA graphs were captured before."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from moe_cases import error, weights

pytestmark = pytest.mark.gpu

E, K, H, I = 32, 4, 512, 256  # noqa: E741
TOKENS = 24


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, H, generator=generator).bfloat16().cuda()
    scores, ids = torch.rand(TOKENS, E, generator=generator).cuda().topk(K)
    return x, ids.int(), scores


def drawn(seed: int) -> Any:
    from dataclasses import replace

    found = weights(E, H, I, "bf16", "cuda", "swiglu", False)
    generator = torch.Generator("cuda").manual_seed(seed)
    new = {
        n: torch.randn(getattr(found, n).shape, device="cuda", generator=generator) * 0.1 for n in ("gate_up", "down")
    }
    return replace(found, **{name: t.bfloat16() for name, t in new.items()})


def captured(run: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = run()
    torch.cuda.synchronize()
    return graph, out


@pytest.mark.parametrize("layout", ["gate-first", "up-first", "gate-up-interleaved-8"])
def test_a_graph_computes_with_updated_weights(layout: str) -> None:
    from ramp_moe import get_registry
    from ramp_moe.registry.detect import detect
    from ramp_moe.runtime.layer import LayerRuntime
    from ramp_moe.runtime.relayout import relayout
    from ramp_moe.spec.launchable import LaunchableKernel

    given = inputs()
    kernels = [k for k in get_registry().kernels.values() if isinstance(k, LaunchableKernel)]
    for kernel in kernels:
        try:
            layer = LayerRuntime(relayout(drawn(1), layout), K, detect(), [kernel])
        except Exception as e:  # not here, or not of this shape
            print(f"{kernel.name}: {e}")
            continue
        graph, out = captured(partial(layer, *given))
        layer.update(relayout(drawn(2), "up-first"))
        graph.replay()
        expected = LayerRuntime(drawn(2), K, detect(), [kernel])(*given)
        assert error(out, expected.float()) < 2e-2, kernel.name
        assert layer.derived == set(), f"{kernel.name} reads what is held"


@pytest.fixture
def gpt_oss() -> Any:
    pytest.importorskip("transformers")
    from transformers_cases import model_of

    model = model_of("gpt_oss", torch.bfloat16, num_hidden_layers=2, hidden_size=512, intermediate_size=256)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def test_a_graph_of_a_wrapped_module_computes_with_loaded_weights(gpt_oss: Any) -> None:
    import ramp_moe

    experts = gpt_oss.model.layers[0].mlp.experts
    state = {name: t.clone() for name, t in experts.state_dict().items()}
    x = torch.randn(TOKENS, 512, device="cuda").bfloat16()
    scores, ids = torch.rand(TOKENS, 8, device="cuda").topk(2)
    expected = experts(x, ids, scores.bfloat16())
    new = {name: t * 1.5 for name, t in state.items()}
    experts.load_state_dict(new)
    other = experts(x, ids, scores.bfloat16())
    before = torch.cuda.memory_allocated()
    ramp_moe.wrap(gpt_oss).warm_up(TOKENS, torch.bfloat16)
    graph, out = captured(lambda: experts(x, ids, scores))
    used = torch.cuda.memory_allocated()
    graph.replay()
    assert error(out, other.float()) < 2e-2
    experts.load_state_dict(state)
    graph.replay()
    assert error(out, expected.float()) < 2e-2
    for name, t in new.items():
        for expert in range(8):
            getattr(experts, name).data[expert].copy_(t[expert])
    graph.replay()
    assert error(out, other.float()) < 2e-2
    assert torch.cuda.memory_allocated() <= used
    assert used - before < 64 << 20
    gpt_oss.set_experts_implementation("grouped_mm")
    assert error(experts(x, ids, scores.bfloat16()), other.float()) < 2e-2
    ramp_moe.unwrap(gpt_oss)
    gpt_oss.set_experts_implementation("eager")
    assert torch.equal(experts(x, ids, scores.bfloat16()), other)


@torch.no_grad()
def test_a_copy_of_a_wrapped_model_is_refused(gpt_oss: Any) -> None:
    import ramp_moe

    ramp_moe.wrap(gpt_oss)
    with pytest.raises(ramp_moe.KernelError, match="a layer cannot be copied here"):
        copy.deepcopy(gpt_oss)
    ramp_moe.unwrap(gpt_oss)
    copy.deepcopy(gpt_oss)


@torch.no_grad()
def test_moved_to_the_cpu_and_back(gpt_oss: Any) -> None:
    import ramp_moe
    from transformers_cases import logits

    ramp_moe.wrap(gpt_oss)
    expected = logits(gpt_oss)
    gpt_oss.cpu()
    with pytest.raises(ramp_moe.RampMoEError, match="has been replaced"):
        gpt_oss(torch.tensor([[1, 2]]))
    assert torch.equal(logits(gpt_oss.cuda()), expected)
