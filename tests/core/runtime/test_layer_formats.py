"""Layers of quantised weights: modules, options, new weights, and tensors of engines that pack eight in an int32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ramp_moe
import torch
from moe_cases import batch, error
from ramp_moe import DispatchOptions, KernelError, MoELayer, MoEShape, ShapeError
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.kernel import WeightLayout
from ramp_moe.spec.launchable import MoEWeights
from ramp_moe_kernels.triton.kernel import TritonMoE

E, K, H, I = 4, 2, 128, 64  # noqa: E741
FIELDS = ("gate_up", "down", "gate_up_scale", "down_scale")
GIVEN = batch(3, K, E, H, "uniform", "cpu", torch.float16)
CALL = GIVEN.hidden_states, GIVEN.topk_ids, GIVEN.topk_weights


def drawn(name: str, seed: int = 0) -> MoEWeights:
    return random_weights(MoEShape(E, K, H, I, name), "cpu", seed)


class Interleaved(TritonMoE):
    """Reads one layout only, so that a layer of gate-first weights holds a copy."""

    name = "interleaved"

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-up-interleaved-8", shape.num_experts * shape.expert_bytes)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        return ("gate-up-interleaved-8",)


class Packed(torch.nn.Module):
    """Experts as an engine loads them: eight weights in an int32, scales in bytes or floats."""

    def __init__(self, of: MoEWeights) -> None:
        super().__init__()
        for name in FIELDS:
            t = getattr(of, name)
            t = t.view(torch.int32) if name in ("gate_up", "down") else t.clone()
            self.register_parameter(name, torch.nn.Parameter(t.clone(), requires_grad=False))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("name", ["int4-g32", "mxfp4", "fp8-tensor"])
def test_a_module_of_quantised_weights(name: str) -> None:
    weights, new = drawn(name), drawn(name, 1)
    layer = MoELayer(weights, K, device="h200", options=DispatchOptions(kernels=["triton"]))
    assert layer.runtime.shape == MoEShape(E, K, H, I, name)
    tolerance = 0.07 if weights.stored.rounds else 2e-3
    assert error(layer(*CALL), reference(weights, GIVEN)) < tolerance
    before = {field: t.clone() for field, t in layer.state_dict().items()}
    assert all(torch.equal(before[f].view(torch.uint8), getattr(weights, f).view(torch.uint8)) for f in FIELDS)
    wanted = reference(new, GIVEN)
    layer.update(new)
    assert error(layer(*CALL), wanted) < tolerance
    with pytest.raises(ShapeError, match="bf16 or fp16"):
        layer(CALL[0].float(), *CALL[1:])


def test_the_word_on_activations_reaches_kernels_that_need_it() -> None:
    """A kernel that rounds activations is not among those of a layer that forbids it."""

    class Rounding(TritonMoE):
        name = "rounding"
        formats = ("int4-g32-a8", "fp8-channel")

    for word, found in ((None, ["triton"]), ("bf16", ["triton"]), ("fp8", ["rounding", "triton"])):
        options = DispatchOptions(kernels=[Rounding(), TritonMoE()], activations=word)
        layer = MoELayer(drawn("int4-g32"), K, device="h200", options=options)
        assert list(layer.runtime.configs()) == found
    with pytest.raises(KernelError, match="fp8-channel-a16"):
        MoELayer(drawn("fp8-channel"), K, device="h200", options=replace(options, activations="bf16"))
    half = MoEWeights(torch.zeros(E, 2 * I, H).half(), torch.zeros(E, H, I).half())
    layer = MoELayer(half, K, device="h200", options=replace(options, activations="fp8"))
    assert layer.runtime.shape.dtype == "fp16", "the word is of quantised weights"


@pytest.mark.parametrize("name", ["int4-g32", "mxfp4"])
@pytest.mark.parametrize("kernel", [TritonMoE(), Interleaved()], ids=["read in place", "held in another order"])
def test_an_engine_s_tensors_stay_as_it_knows_them(
    name: str, kernel: TritonMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ramp_moe.get_registry().kernels, "triton", kernel)
    weights, new = drawn(name), drawn(name, 1)
    module, wanted = Packed(weights), Packed(weights)
    names = {field: field for field in FIELDS}
    experts = ramp_moe.Experts(Packed, **names, top_k=K, format=name)
    wrapped = ramp_moe.wrap(module, experts, device="h200", activations="fp8")
    assert [layer.shape.dtype for layer in wrapped.layers.values()] == [f"{name}-a8"]
    assert isinstance(module.gate_up, Placeholder) == isinstance(kernel, Interleaved)
    assert module.gate_up.dtype == torch.int32
    for field in FIELDS:
        assert torch.equal(getattr(module, field), getattr(wanted, field)), field
    assert error(module(*CALL), reference(weights, GIVEN)) < 2e-3
    for field in FIELDS:
        getattr(module, field).copy_(getattr(Packed(new), field))
    assert error(module(*CALL), reference(new, GIVEN)) < 2e-3
    ramp_moe.unwrap(module)
    assert torch.equal(module.gate_up, Packed(new).gate_up)
    assert type(module.gate_up) is torch.nn.Parameter
