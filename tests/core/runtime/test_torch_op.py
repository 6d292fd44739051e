"""The layer as an operator: models that hold layers compile whole, for any number of tokens."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from layer_cases import PRICES, E, FakeKernel, inputs, layer, model_of
from ramp_moe import Hardware, KernelError
from ramp_moe.runtime import torch_op as op
from ramp_moe.runtime.layer import LayerRuntime


class Model(torch.nn.Module):
    """Routed MoE layers with other operators around them."""

    def __init__(self, *layers: LayerRuntime) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for moe in self.layers:
            x = x + moe(torch.tanh(x), ids, scores)
        return x


class Block(torch.nn.Module):
    def __init__(self, moe: LayerRuntime) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return 2 * self.moe(x, ids, scores)


def compiled(model: Any, backend: str = "eager", **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiles_whole(backend: str, h200: Hardware) -> None:
    kernels = FakeKernel("first"), FakeKernel("second")
    model = Model(*(layer(h200, kernel) for kernel in kernels))
    given = inputs(7)
    expected = model(*given)
    found = compiled(model, backend)(*given)
    assert torch.equal(found, expected)
    assert [len(k.launched) for k in kernels] == [2, 2], "each layer is its own"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_any_number_of_tokens(backend: str, h200: Hardware) -> None:
    model = Model(layer(h200))
    once = compiled(model, backend, dynamic=True)
    for tokens in (5, 2, 33, 64):
        given = inputs(tokens)
        with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
            assert torch.equal(once(*given), model(*given))


def test_the_choice_is_made_when_it_runs(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES))
    run = compiled(moe)
    even = torch.arange(128).view(64, 2).int() % E
    x, skewed, scores = inputs(64, "one-hot")
    for ids, chosen in ((even, "bm8"), (skewed, "bm128"), (even, "bm8")):
        run(x, ids, scores)
        assert kernel.launched[-1] == (chosen, 64)


def test_one_block_is_compiled_for_all_layers(h200: Hardware) -> None:
    """Twice: the second layer tells that the number is none of the program's own."""
    blocks = [Block(layer(h200, FakeKernel(f"of layer {i}"))) for i in range(12)]
    torch.compiler.reset()
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    given = inputs(3)
    for i, block in enumerate(blocks):
        stance = torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile")
        with stance, torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            assert torch.equal(block(*given), 2 * block.moe.forward(*given))


def test_options_are_kept(h200: Hardware) -> None:
    moe = layer(h200)
    x, ids, scores = inputs(6)
    valid = torch.tensor([4], dtype=torch.int32)
    out = torch.full_like(x, float("nan"))
    expected = moe(x, ids, scores, num_valid=valid)
    assert not expected[4:].any()
    assert torch.equal(compiled(moe)(x, ids, scores, out, valid), expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("wide", [False, True])
def test_the_operator_keeps_torchs_rules(tokens: int, wide: bool, h200: Hardware) -> None:
    moe = layer(h200)
    x, ids, scores = inputs(tokens)
    valid = torch.tensor([tokens // 2], dtype=torch.int32)
    for num_valid in (None, valid):
        arguments = (x, ids.long() if wide else ids, scores, moe._number, num_valid)
        torch.library.opcheck(op.moe, arguments)


def test_a_layer_that_is_gone(h200: Hardware) -> None:
    moe = layer(h200)
    number, alive = moe._number, weakref.ref(moe)
    op.moe(*inputs(3), number, None)
    del moe
    gc.collect()
    assert alive() is None, "its number keeps no layer alive"
    with pytest.raises(KernelError, match=f"MoE layer {number} is gone; keep it alive"):
        op.moe(*inputs(3), number, None)
    assert layer(h200)._number != number


def test_a_copy_is_another_layer(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel)
    other = copy.deepcopy(moe)
    assert other._number != moe._number
    compiled(Model(other))(*inputs(3))
    assert kernel.launched == []
    compiled(Model(moe))(*inputs(3))
    assert kernel.launched == [("bm8", 3)]


@pytest.mark.gpu
def test_gpu_graphs_of_torch_compile_choose_at_every_replay() -> None:
    from graph_cases import SHAPE, priced, triton_of
    from moe_cases import H200
    from moe_cases import weights as random_weights
    from ramp_moe_kernels.triton.kernel import TritonMoE

    experts, hidden, top_k, tokens = SHAPE.num_experts, SHAPE.hidden_size, SHAPE.top_k, 256
    given = random_weights(experts, hidden, SHAPE.intermediate_size, "bf16", "cuda")
    layers = [LayerRuntime(given, top_k, H200, [TritonMoE()], cost_model=priced(H200, triton_of())) for _ in range(2)]
    plans = [moe.warm_up(tokens, torch.bfloat16) for moe in layers]
    run, model = compiled(Model(*layers), "inductor", mode="reduce-overhead"), Model(*layers)
    x, scores = torch.randn(tokens, hidden, device="cuda").bfloat16(), torch.rand(tokens, top_k, device="cuda")
    even = torch.arange(tokens * top_k, device="cuda", dtype=torch.int32).view(tokens, top_k) % experts
    chosen = []
    with torch.no_grad():
        for ids in (even, even % 4, even, even % 4, even % 8, even):
            torch.compiler.cudagraph_mark_step_begin()
            found = run(x, ids, scores).clone()
            torch.testing.assert_close(found, model(x, ids, scores), rtol=2e-2, atol=2e-2)
            chosen.append([int(plan.selector.choice) for plan in plans])
    # The first two runs warm up and record; every later one is a replay.
    assert all(moe.graphs._captures > 0 or plan.mode != "nodes" for moe, plan in zip(layers, plans, strict=True))
    assert chosen[2] != chosen[3]
    assert chosen[2] == chosen[5]


def test_num_valid_of_every_form_in_a_compiled_model(h200: Hardware) -> None:
    moe = layer(h200)
    x, ids, scores = inputs(6)
    run = compiled(lambda n: moe(x, ids, scores, num_valid=n))
    forms: list[Any] = [3, 4, 5, torch.tensor([3], dtype=torch.int32), torch.tensor(4)]
    with torch.no_grad():
        for num_valid in forms:
            assert torch.equal(run(num_valid), moe(x, ids, scores, num_valid=num_valid))
