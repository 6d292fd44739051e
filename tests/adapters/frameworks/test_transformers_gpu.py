"""Models of OLMoE's and gpt-oss' own sizes, two layers each, wrapped on a GPU: logits, graphs, fp8, memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest

pytest.importorskip("transformers")

import ramp_moe
import torch
from moe_cases import error
from ramp_moe import KernelError
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers_cases import computed, expert_calls, fp8_experts, worst

pytestmark = pytest.mark.gpu

OLMOE = {"num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 2048, "intermediate_size": 1024}
GPT_OSS = {"num_local_experts": 32, "num_experts_per_tok": 4, "hidden_size": 2880, "intermediate_size": 2880}
TOLERANCE = 2e-2


def model_of(family: str, layers: int = 2, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, num_hidden_layers=layers, vocab_size=1024, pad_token_id=0, **sizes)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def olmoe_model() -> Any:
    return model_of("olmoe", **OLMOE)


def prompt(sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sequences * length)
    return torch.randint(2, 1024, (sequences, length), generator=generator).cuda()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(ids, **options).logits.float()


@pytest.mark.parametrize("tokens", [1, 7, 128, 2048])
def test_experts_on_the_same_routing(olmoe_model: Any, tokens: int) -> None:
    olmoe_model.set_experts_implementation("eager")
    calls = expert_calls(olmoe_model, prompt(1, tokens))
    ramp_moe.wrap(olmoe_model)
    found = worst(calls)
    ramp_moe.unwrap(olmoe_model)
    assert 0 < found < TOLERANCE


def test_logits_of_one_layer() -> None:
    """Of more than one, rounding turns near ties of the routers, which random weights are full of."""
    model, ids = model_of("olmoe", 1, **OLMOE), prompt(2, 64)
    model.set_experts_implementation("eager")
    expected = logits(model, ids)
    ramp_moe.wrap(model)
    assert error(logits(model, ids), expected) < TOLERANCE


def test_gpt_oss() -> None:
    model = model_of("gpt_oss", **GPT_OSS)
    model.set_experts_implementation("eager")
    ids = prompt(2, 33)
    calls, expected = expert_calls(model, ids), logits(model, ids)
    before = torch.cuda.memory_allocated()
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "experts" in n)
    ramp_moe.wrap(model)
    assert torch.cuda.memory_allocated() - before < 0.02 * weights, "moved, not doubled"
    assert 0 < worst(calls) < TOLERANCE
    ramp_moe.unwrap(model)
    assert torch.equal(logits(model, ids), expected)


def test_memory() -> None:
    model = model_of("olmoe", 16, **OLMOE)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    wrapped = ramp_moe.wrap(model)
    assert len(wrapped.layers) == 16
    logits(model, prompt(1, 128))
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 0.02 * weights


@torch.no_grad()
def test_a_captured_decode_step_follows_its_inputs() -> None:
    """Several tokens in turn through one graph, against the same steps with torch's grouped GEMM."""
    batch, steps, olmoe_model = 8, 5, model_of("olmoe", 1, **OLMOE)
    olmoe_model.set_experts_implementation("grouped_mm")
    tokens = [prompt(batch, 1) + step for step in range(steps)]

    def cache() -> StaticCache:
        return StaticCache(config=olmoe_model.config, max_cache_len=64)

    stock = cache()
    expected = [logits(olmoe_model, token, past_key_values=stock, use_cache=True) for token in tokens]
    wrapped = ramp_moe.wrap(olmoe_model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapped.warm_up(batch, torch.bfloat16)
        ours, token = cache(), tokens[0].clone()
        for _ in range(2):
            olmoe_model(token, past_key_values=ours, use_cache=True)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = olmoe_model(token, past_key_values=ours, use_cache=True).logits
        ours.reset()
        for given, wanted in zip(tokens, expected, strict=True):
            token.copy_(given)
            graph.replay()
            assert error(out, wanted) < TOLERANCE


def test_generate_with_a_static_cache(olmoe_model: Any) -> None:
    """Which Transformers compiles for decoding, into graphs of its own."""
    ids, options = prompt(4, 16), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ramp_moe.wrap(olmoe_model)
    expected = olmoe_model.generate(ids, **options)
    found = olmoe_model.generate(ids, cache_implementation="static", **options)
    ramp_moe.unwrap(olmoe_model)
    torch.compiler.reset()
    assert found.shape == expected.shape
    assert (found[:, :18] == expected[:, :18]).float().mean() > 0.9, "the first tokens; later ones drift apart"


@pytest.mark.parametrize("tokens", [1, 33, 512])
def test_fp8(tokens: int) -> None:
    module = fp8_experts(64, 8, 2048, 1024)
    (layer,) = ramp_moe.wrap(module).layers.values()
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 2048, generator=generator).bfloat16().cuda()
    scores, ids = torch.rand(tokens, 64, generator=generator).cuda().topk(8)
    with torch.no_grad():
        found = module(x, ids, scores)
    given = ramp_moe.runtime.relayout(layer.held[0], "gate-first")
    assert error(found, computed(given, x, ids, scores)) < TOLERANCE


def test_gradients_are_refused(olmoe_model: Any) -> None:
    ramp_moe.wrap(olmoe_model)
    loss = olmoe_model(prompt(1, 5)).logits.float().sum()
    with pytest.raises(KernelError, match="computes no gradients"):
        loss.backward()
    ramp_moe.unwrap(olmoe_model)
