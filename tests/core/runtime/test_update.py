"""New weights for a layer that exists: in every order, in place, whatever kernels derived from the old."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from layer_cases import E, FakeKernel, H, I, K, inputs
from moe_cases import weights as random_weights
from ramp_moe import Candidate, Hardware, KernelError, ShapeError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.relayout import relayout
from ramp_moe.runtime.update import FIELDS, leaves
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import Batch, MoEWeights

X, IDS, SCORES = inputs(6)
ADDED = {"gate_up_bias": torch.zeros(E, 2 * I), "down_bias": torch.zeros(E, H)}


@dataclass(frozen=True)
class Prepared:
    """What kernels are seen to keep: derived tensors at some depth, constants, functions, plain values."""

    weights: MoEWeights
    derived: dict[str, list[torch.Tensor]]
    expanded: torch.Tensor
    function: Any
    count: int


class Deriving(FakeKernel):
    """Launches with float copies of the weights, times what it read of one of them."""

    def prepare(self, weights: MoEWeights) -> Any:
        super().prepare(weights)
        plain = relayout(weights, "gate-first")
        one = torch.ones(1, 1).expand(3, 4)
        return Prepared(weights, {"both": [plain.gate_up.float(), plain.down.float()]}, one, lambda: weights, 2)

    def launch(self, config: Any, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Any) -> None:
        super().launch(config, tuple(prepared.derived["both"]), batch, out, workspace)


class InPlace(FakeKernel):
    """Launches with the memory of the weights held."""

    def prepare(self, weights: MoEWeights) -> Any:
        super().prepare(weights)
        return weights, torch.zeros(2, 1).expand(2, 7), torch.full((1,), 3.0).float()

    def launch(self, config: Any, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Any) -> None:
        plain = relayout(prepared[0], "gate-first")
        super().launch(config, (plain.gate_up.float(), plain.down.float()), batch, out, workspace)


def drawn(seed: int, bias: bool = False) -> MoEWeights:
    found = random_weights(E, H, I, "bf16", "cpu", "swiglu", bias)
    generator = torch.Generator().manual_seed(seed)
    changed = {
        n: torch.randn(t.shape, generator=generator).to(t.dtype) for n in FIELDS if (t := getattr(found, n)) is not None
    }
    return replace(found, **changed)


def outputs(layer: LayerRuntime) -> list[torch.Tensor]:
    """Of every kernel."""
    found = []
    for name in layer.configs():
        kernel, _ = layer.kernel(name)
        out = torch.full_like(X, float("nan"))
        layer.launch(Candidate(name, kernel.config(8)), Batch(X, IDS, SCORES), out)  # type: ignore[attr-defined]
        found.append(out)
    return found


def addresses(layer: LayerRuntime) -> list[int]:
    prepared = [layer.kernel(name)[1] for name in layer.configs()]
    return [t.data_ptr() for _, t in leaves((layer.held, prepared)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("held", "given"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_order_into_every_order(h200: Hardware, held: str, given: str) -> None:
    kernels = [Deriving("deriving", layouts=(held,)), InPlace("in_place", layouts=(held,))]
    layer = LayerRuntime(relayout(drawn(1, bias=True), held), K, h200, kernels)
    assert layer.derived == {"deriving"}
    new, places = drawn(2, bias=True), addresses(layer)
    expected = outputs(LayerRuntime(relayout(new, held), K, h200, kernels))
    layer.update(relayout(new, given))
    assert addresses(layer) == places, "graphs hold them"
    found = relayout(layer.held[0], "gate-first")
    assert all(torch.equal(getattr(found, n), getattr(new, n)) for n in ("gate_up", "down", *ADDED))
    assert all(torch.equal(a, b) for a, b in zip(outputs(layer), expected, strict=True))


def test_every_copy_is_kept_in_step(h200: Hardware) -> None:
    kernels = [InPlace("plain"), InPlace("mixed", layouts=("gate-up-interleaved-8",))]
    layer = LayerRuntime(drawn(1), K, h200, kernels, copies=2)
    assert len(layer.held) == 2
    new = drawn(2)
    layer.update(new)
    assert all(torch.equal(relayout(held, "gate-first").gate_up, new.gate_up) for held in layer.held)
    first, second = outputs(layer)
    assert torch.equal(first, second)


@pytest.mark.parametrize("held", LAYOUTS)
def test_new_weights_written_where_the_old_ones_are_held(h200: Hardware, held: str) -> None:
    """As an engine loads them, gate-first, whatever the order there was."""
    layer = LayerRuntime(relayout(drawn(1), held), K, h200, [InPlace(layouts=(held,))])
    new, place = drawn(2), layer.held[0]
    place.gate_up.copy_(new.gate_up)
    place.down.copy_(new.down)
    layer.update(MoEWeights(place.gate_up, place.down))
    assert torch.equal(relayout(place, "gate-first").gate_up, new.gate_up)
    assert torch.equal(place.down, new.down)


def test_fp8_and_its_scales(h200: Hardware) -> None:
    from ramp_moe_kernels.triton.kernel import TritonMoE

    def fp8(seed: int) -> MoEWeights:
        torch.manual_seed(seed)
        return random_weights(E, 128, 256, "fp8", "cpu", "swiglu", False)

    new = fp8(2)
    new = replace(new, down_scale=new.down_scale * 2)  # type: ignore[operator]
    for held, given in itertools.product(LAYOUTS, LAYOUTS):
        layer = LayerRuntime(relayout(fp8(1), held), K, h200, [TritonMoE()])
        assert not layer.derived
        layer.update(relayout(new, given))
        found = relayout(layer.held[0], "gate-first")
        for name in FIELDS[:4]:
            assert torch.equal(getattr(found, name).float(), getattr(new, name).float())


@pytest.mark.parametrize("field", ["gate_up", "down", "gate_up_bias", "down_bias"])
def test_what_does_not_fit_is_refused_before_anything_is_written(h200: Hardware, field: str) -> None:
    layer = LayerRuntime(drawn(1, bias=True), K, h200, [InPlace()])
    before, new = outputs(layer), drawn(2, bias=True)
    wider = torch.cat([getattr(new, field)] * 2)
    others = {n: torch.cat([getattr(new, n)] * 2) for n in ("gate_up", "down", "gate_up_bias", "down_bias")}
    cases = [(replace(new, **others), "has the shape")]
    if "bias" in field:
        cases += [(replace(new, **{field: None}), f"has a {field}, the new weights differ")]
        cases += [(replace(new, **{field: wider[:E].half()}), f"layer's {field} has the dtype")]
    else:
        cases += [(replace(new, gate_up=new.gate_up.half(), down=new.down.half()), "has the dtype")]
    cases += [(replace(new, activation="gelu_tanh"), "the activation swiglu, the new weights gelu_tanh")]
    for given, message in cases:
        with pytest.raises(ShapeError, match=message):
            layer.update(given)
    assert all(torch.equal(a, b) for a, b in zip(outputs(layer), before, strict=True))


def test_a_kernel_that_no_longer_takes_the_weights(h200: Hardware) -> None:
    """The layer computes nothing with half of an update."""
    kernel = Deriving()
    layer = LayerRuntime(drawn(1), K, h200, [kernel])
    kernel.refuses = "not these"
    with pytest.raises(KernelError, match="not these"):
        layer.update(drawn(2))
    with pytest.raises(KernelError, match="an update of the layer's weights failed; update it again"):
        layer(X, IDS, SCORES)
    kernel.refuses = None
    layer.update(drawn(2))
    assert torch.equal(layer(X, IDS, SCORES), LayerRuntime(drawn(2), K, h200, [Deriving()])(X, IDS, SCORES))


def test_a_kernel_that_prepares_something_else(h200: Hardware) -> None:
    class Moody(FakeKernel):
        def prepare(self, weights: MoEWeights) -> Any:
            return (*super().prepare(weights), float(weights.down.float().sum()))

    layer = LayerRuntime(drawn(1), K, h200, [Moody("moody")])
    with pytest.raises(KernelError, match=r"moody prepares another value\[2\] of the new weights"):
        layer.update(drawn(2))


def test_what_a_kernel_reads_of_the_weights_counts_as_derived(h200: Hardware) -> None:
    class Scaling(InPlace):
        def prepare(self, weights: MoEWeights) -> Any:
            return super().prepare(weights)[0], torch.full((1,), weights.down.max().item())

    assert LayerRuntime(drawn(1), K, h200, [InPlace()]).derived == set()
    assert LayerRuntime(drawn(1), K, h200, [Scaling("scaling")]).derived == {"scaling"}
