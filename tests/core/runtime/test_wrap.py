"""Modules of one's own, wrapped by the names of their weights; layouts, copies and what is said of them."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ramp_moe
import torch
from layer_cases import FakeKernel, model_of
from moe_cases import LIMITS, error, weights
from ramp_moe import Experts, Hardware, KernelError, RoutingError, load_trace
from ramp_moe.runtime import layer_factory as building
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.relayout import relayout
from ramp_moe_kernels import reference
from torch import nn

E, K, H, I = 16, 2, 32, 16  # noqa: E741
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float16
TOLERANCE = 2e-2 if GPU else 4e-3


class Block(nn.Module):
    """A MoE block as people write it; by the reference, in float32."""

    def __init__(self, layout: str = "gate-first", activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        given = relayout(weights(E, H, I, "bf16" if GPU else "fp16", DEVICE, activation, bias), layout)
        self.router = nn.Linear(H, E, bias=False, device=DEVICE, dtype=DTYPE)
        self.w13, self.w2 = nn.Parameter(given.gate_up), nn.Parameter(given.down)
        self.b13, self.b2 = given.gate_up_bias, given.down_bias
        self.layout, self.activation, self.k = layout, activation, K
        self.limit = LIMITS.get(activation)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, ids = self.router(x).float().softmax(-1).topk(self.k)
        return ids, scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, H)
        out = reference.experts(
            flat, self.w13.detach(), self.w2.detach(), *self.route(flat), activation=self.activation, limit=self.limit,
            gate_up_bias=self.b13, down_bias=self.b2, layout=self.layout,
        )  # fmt: skip
        return out.view_as(x).to(x.dtype)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


BLOCK = Experts(Block, gate_up="w13", down="w2", top_k="k", route=Block.route)
X = torch.randn(2, 3, H, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)


def wrap(model: nn.Module, *adapters: Experts, **options: Any) -> ramp_moe.Wrapped:
    return ramp_moe.wrap(model, *adapters, device="auto" if GPU else "h200", **options)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def test_a_block_with_its_router() -> None:
    model = Model(Block(), Block())
    expected = run(model)
    wrapped = wrap(model, BLOCK)
    assert list(wrapped.layers) == ["blocks.0", "blocks.1"]
    with wrapped.record() as recording:
        found = run(model)
        with pytest.raises(RoutingError, match="one recording at a time"), wrapped.record():
            pass
    assert len(recording._batches) == 2
    assert 0 < error(found, expected.float()) < TOLERANCE
    first, second = wrapped.layers.values()
    assert first.workspace is second.workspace
    ramp_moe.unwrap(model)
    assert torch.equal(run(model), expected)
    assert "forward" not in model.blocks[0].__dict__


def test_a_module_that_is_given_its_routing() -> None:
    class Bare(Block):
        def forward(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return reference.experts(x, self.w13.detach(), self.w2.detach(), ids, scores)

    module, x = Bare(), X.view(-1, H)
    ids, scores = module.route(x)
    expected = module(x, ids, scores)
    wrap(module, Experts(Bare, "w13", "w2", K))
    with torch.no_grad():
        assert 0 < error(module(x, ids, scores), expected) < TOLERANCE
        beyond = ids.long().clone()
        beyond[0, 0] += 2**32
        skipped = module(x, beyond.masked_fill(beyond > E, -1), scores)
        assert torch.equal(module(x, beyond, scores), skipped)
        for strange in (ids.float(), ids > 0):
            with pytest.raises(RoutingError, match="not integers"):
                module(x, strange, scores)


@pytest.mark.parametrize("layout", ["up-first", "gate-up-interleaved-8"])
def test_weights_in_another_order_are_used_as_they_are(layout: str) -> None:
    block = Block(layout)
    expected, place = run(block), block.w13.data_ptr()
    wrapped = wrap(block, Experts(Block, "w13", "w2", "k", Block.route, layout=layout))
    (layer,) = wrapped.layers.values()
    assert layer.layouts == (layout,)
    assert layer.held[0].gate_up.data_ptr() == place == block.w13.data_ptr()
    assert 0 < error(run(block), expected.float()) < TOLERANCE


@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu_clamped"])
def test_biases_and_activation(activation: str) -> None:
    block = Block(activation=activation, bias=True)
    expected = run(block)
    biases = {"gate_up_bias": "b13", "down_bias": "b2"}
    how = {"activation": activation, "limit": block.limit}
    wrap(block, Experts(Block, "w13", "w2", "k", Block.route, **biases, **how))
    assert 0 < error(run(block), expected.float()) < TOLERANCE


def test_names_that_are_not_there() -> None:
    for named, missing in (
        (Experts(Block, "w13", "w2", "top_k", Block.route), "top_k"),
        (Experts(Block, "w13", "w2", "k", Block.route, down_bias="bias"), "bias"),
    ):
        block = Block()
        with pytest.raises(KernelError, match=f"Block: Block has no {missing}; name its attributes in ramp_moe"):
            wrap(block, named)
        assert "forward" not in block.__dict__


def test_a_copy_calls_its_own_experts() -> None:
    block = Block()
    wrapped = wrap(block, BLOCK)
    if GPU:
        with pytest.raises(KernelError, match="a layer cannot be copied here"):
            copy.deepcopy(block)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapped.layers["Block"], "_device", torch.device("cuda"))
        with pytest.raises(KernelError, match="on a GPU kernels and graphs hold addresses of its weights"):
            copy.deepcopy(block)
    other = copy.deepcopy(block)
    expected = run(block)
    with torch.no_grad():
        block.w2.zero_()
    assert torch.equal(run(other), expected)
    assert not run(block).any()
    ramp_moe.unwrap(other)
    assert "forward" not in other.__dict__
    assert len(wrapped.layers) == 1


def test_a_forward_that_accelerate_has_put_there_comes_back() -> None:
    block = Block()
    block.forward = hooked = lambda x: x  # type: ignore[method-assign]
    block._hf_hook = SimpleNamespace(offload=False)
    wrap(block, BLOCK)
    assert not torch.equal(run(block), X)
    ramp_moe.unwrap(block)
    assert block.forward is hooked


def test_a_forward_that_does_something_else_is_refused() -> None:
    class More(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    class Same(Block):
        pass

    patched, plain = Block(), Block.forward
    patched.forward = lambda x: 2 * plain(patched, x)  # type: ignore[method-assign]
    for block, reason in ((More(), "More has a forward of its own"), (patched, "its forward was replaced")):
        expected = run(block)
        with pytest.raises(KernelError, match=reason):
            wrap(Model(Block(), block), BLOCK)
        assert torch.equal(run(block), expected)
    wrap(Same(), BLOCK)


def test_arguments_that_the_experts_do_not_take_are_refused() -> None:
    block = Block()
    wrap(block, BLOCK)
    expected = run(block)
    with torch.no_grad():
        assert torch.equal(block(x=X), expected)
        for given, named in (((X,), {"scale": 2.0}), ((X, 2.0), {}), ((), {})):
            with pytest.raises(KernelError, match="takes only hidden states"):
                block(*given, **named)


def test_a_route_that_gives_weights_first_is_refused() -> None:
    block = Block()
    wrap(block, Experts(Block, "w13", "w2", "k", lambda b, x: b.route(x)[::-1]))
    with pytest.raises(RoutingError, match=r"topk_ids are torch.float32, not integers"):
        run(block)


def test_it_compiles_whole() -> None:
    model = Model(Block(), Block())
    wrap(model, BLOCK)
    expected = run(model)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(X)
    assert error(found, expected.float()) < 1e-3


# --- Layouts, copies, profiles ----------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, h200: Hardware) -> list[FakeKernel]:
    """One kernel that reads the weights as they are, and a faster one that reads them interleaved, both profiled."""
    kernels = [FakeKernel("plain"), FakeKernel("mixed", layouts=("gate-up-interleaved-8",))]
    registry = copy.copy(ramp_moe.get_registry())
    registry.kernels = {k.name: k for k in kernels}
    shape = ramp_moe.MoEShape(E, K, H, I, "bf16" if GPU else "fp16")
    from ramp_moe.cost_model.model import join

    model = join([model_of(h200, kernels[0], {8: 0.4}, shape), model_of(h200, kernels[1], {8: 0.2}, shape)])
    monkeypatch.setattr(building, "get_registry", lambda: registry)
    monkeypatch.setattr(building, "load_model", lambda *given: (model, ["as recorded"]))
    return kernels


def test_one_copy_in_the_faster_order(fakes: list[FakeKernel]) -> None:
    model = Model(Block(), Block())
    expected, before = run(model), [b.w13.detach().clone() for b in model.blocks]
    wrapped = ramp_moe.wrap(model, BLOCK, device="h200")
    for block, layer in zip(model.blocks, wrapped.layers.values(), strict=True):
        assert layer.layouts == ("gate-up-interleaved-8",)
        assert isinstance(block.w13, Placeholder), "moved, not doubled"
        assert block.w2.values().data_ptr() == layer.held[0].down.data_ptr()
    first, second = wrapped.layers.values()
    assert first.chooser.dispatcher is not None
    assert second.chooser.dispatcher is not None
    assert list(second.configs()) == ["mixed"]
    assert "as recorded" in wrapped.notes
    assert any(n.startswith("plain left out: reads weights in gate-first") for n in wrapped.notes)
    assert error(run(model), expected.float()) < TOLERANCE
    assert len(fakes[1].launched) == 2
    ramp_moe.unwrap(model)
    for block, weight in zip(model.blocks, before, strict=True):
        assert torch.equal(block.w13, weight)
        assert isinstance(block.w13, nn.Parameter)
    assert torch.equal(run(model), expected)


def test_what_a_second_copy_would_gain_is_said_first(
    fakes: list[FakeKernel], h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ramp_moe.cost_model.model import join

    shape = ramp_moe.MoEShape(E, K, H, I, "bf16" if GPU else "fp16")
    # The wide tiles of the one pay for batches on few experts, the narrow ones of the other for all else.
    model = join([model_of(h200, fakes[0], {128: 0.4}, shape), model_of(h200, fakes[1], {8: 0.1}, shape)])
    monkeypatch.setattr(building, "load_model", lambda *given: (model, []))
    one = Model(Block(), Block())
    (note,) = [n for n in ramp_moe.wrap(one, BLOCK, device="h200").notes if "copies=2 would hold" in n]
    assert "MiB more a layer, for a predicted gain of" in note
    two = Model(Block(), Block())
    wrapped = ramp_moe.wrap(two, BLOCK, device="h200", copies=2)
    for block, layer in zip(two.blocks, wrapped.layers.values(), strict=True):
        assert set(layer.layouts) == {"gate-first", "gate-up-interleaved-8"}
        assert block.w13.values().data_ptr() in [held.gate_up.data_ptr() for held in layer.held]
    assert not any("copies=3" in n for n in wrapped.notes)


def test_a_profile_that_is_damaged_is_no_missing_profile(
    fakes: list[FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*given: Any) -> Any:
        raise ramp_moe.ProfileError("not JSON")

    monkeypatch.setattr(building, "load_model", damaged)
    notes = ramp_moe.wrap(Model(Block()), BLOCK, device="h200").notes
    dtype = "bf16" if GPU else "fp16"
    assert notes[0] == (
        f"nothing was measured in {dtype} on h200: the batch size alone decides; measure with "
        f"`ramp-moe profile --model E16-k2-h32-i16-{dtype} --dtype {dtype}`"
    )
    monkeypatch.setattr(ramp_moe.ProfileStore, "find", lambda *given: ("path", "sweep"))
    with pytest.raises(ramp_moe.ProfileError, match="not JSON"):
        ramp_moe.wrap(Model(Block()), BLOCK, device="h200")


def test_the_report() -> None:
    text = str(wrap(Model(Block(), Block()), BLOCK))
    dtype = "bf16" if GPU else "fp16"
    assert text.splitlines()[0].startswith(f"2 MoE layers of E16-k2-h32-i16-{dtype} ({dtype}) on h200")
    assert "kernels: triton; weights in gate-first" in text


# --- Recording --------------------------------------------------------------------------------------------------------


def test_a_trace_of_what_was_routed(tmp_path: Path) -> None:
    model = Model(Block(), Block())
    wrapped = wrap(model, BLOCK)
    run(model)
    with wrapped.record() as recording:
        run(model)
        run(model)
    run(model)
    recording.write(tmp_path / "trace.jsonl", "a test")
    trace = load_trace(tmp_path / "trace.jsonl")
    assert (trace.num_experts, trace.top_k, trace.source) == (E, K, "a test")
    batches = [batch for group in trace.recorded() for batch in group]
    assert [b.tokens for b in batches] == [6] * 4
    ids, _ = model.blocks[0].route(X.view(-1, H))
    assert torch.bincount(ids.flatten().cpu(), minlength=E).tolist() == batches[0].histogram.tolist()


def test_traces_that_cannot_be(tmp_path: Path) -> None:
    model = Model(Block(), Block())
    with wrap(model, BLOCK).record() as recording:
        pass
    with pytest.raises(RoutingError, match="nothing was recorded; run the model, uncompiled, while it records"):
        recording.write(tmp_path / "trace.jsonl")
    other = Block()
    other.k = 3
    mixed = Model(Block(), other)
    with wrap(mixed, BLOCK).record() as recording:
        run(mixed)
    with pytest.raises(RoutingError, match="a trace is of layers that are alike"):
        recording.write(tmp_path / "trace.jsonl")
    assert not (tmp_path / "trace.jsonl").exists()


@pytest.mark.parametrize("model", ["allenai/OLMoE-1B-7B-0924", None, nn.Linear, torch.zeros(1)], ids=str)
def test_what_is_no_model(model: Any) -> None:
    for change in (ramp_moe.wrap, ramp_moe.unwrap):
        with pytest.raises(KernelError, match=r"a model is a torch.nn.Module, not .*; load it first"):
            change(model)


def test_what_is_no_adapter() -> None:
    with pytest.raises(KernelError, match=r"an adapter is a ramp_moe.Experts, or another ExpertsAdapter, not 'h200'"):
        ramp_moe.wrap(nn.Linear(1, 1), "h200")  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_for_the_length_of_a_block(fails: bool) -> None:
    """As a context manager: the model is as it was afterwards, after an error, too."""
    model = Model(Block(), Block())
    expected, weight = model(X).detach(), model.blocks[0].w13
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(), wrap(model, BLOCK) as wrapped:
        assert len(wrapped.layers) == 2
        assert 0 < error(model(X).detach(), expected.float()) < TOLERANCE
        if fails:
            raise ZeroDivisionError
    assert torch.equal(model(X).detach(), expected)
    assert model.blocks[0].w13 is weight
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_block_ends_quietly_if_the_model_was_unwrapped_in_it() -> None:
    model = Model(Block())
    with wrap(model, BLOCK):
        ramp_moe.unwrap(model)
    with wrap(model, BLOCK):
        ramp_moe.unwrap(model)
        wrap(model, BLOCK)
    ramp_moe.unwrap(model)  # what another call wrapped is that call's
