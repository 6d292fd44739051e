"""The activation of a module of Transformers is found by running it: the right one with its limit, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

import ramp_moe
import torch
from moe_cases import error
from ramp_moe import KernelError
from ramp_moe.runtime.reference import activate
from ramp_moe_adapters.frameworks.transformers.activation import Activation, activation_of
from torch.nn.functional import gelu, silu
from transformers_cases import DEVICE, GPU, HALF, computed, fp8_experts

ROWS = 64


def oai(gate: torch.Tensor, up: torch.Tensor, limit: float, slope: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(slope * gate) * (up + 1)


ELEMENTWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relu": lambda gate, up: gate.relu() * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "swish": lambda gate, up: silu(gate) * (up + 1),
    "no gate": lambda gate, up: silu(up),
    "no up": lambda gate, up: silu(gate),
    "gate first clamped": lambda gate, up: silu(gate.clamp(max=7)) * up,
    "up alone clamped": lambda gate, up: silu(gate) * up.clamp(-7, 7),
    "up clamped from above": lambda gate, up: silu(gate.clamp(max=7)) * up.clamp(max=7),
    "gate clamped at both ends": lambda gate, up: silu(gate.clamp(-3, 3)) * up.clamp(-3, 3),
    "clamped after SiLU": lambda gate, up: silu(gate).clamp(max=7) * up.clamp(-7, 7),  # Step-3.7
    "two limits": lambda gate, up: silu(gate.clamp(max=10)) * up.clamp(-7, 7),
    "gpt-oss' with another slope": lambda gate, up: oai(gate, up, 7, 1.5),
    "gpt-oss' with another limit": lambda gate, up: oai(gate, up, 9, 1.702),
    "clamped gelu": lambda gate, up: gelu(gate.clamp(max=7), approximate="tanh") * up.clamp(-7, 7),
    "soft caps": lambda gate, up: (gate / 30).tanh() * 30 * gate.sigmoid() * (up / 30).tanh() * 30,  # Inkling 2
    "zero": lambda gate, up: 0 * up,
    "NaN": lambda gate, up: torch.nan * up,
}


class Module:
    """Of an activation: what the adapter runs."""

    def __init__(
        self, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], alternating: bool = False
    ) -> None:
        self.compute, self.alternating = compute, alternating

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = (both[:, ::2], both[:, 1::2]) if self.alternating else both.chunk(2, 1)
        return self.compute(gate, up)


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "gelu_tanh", "swiglu_oai"])
def test_those_without_a_limit(name: str, alternating: bool) -> None:
    module = Module(lambda gate, up: activate(gate, up, name), alternating)
    assert activation_of(module, ROWS, "cpu") == Activation(name, None, alternating)


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("limit", [0.3, 1.0, 7.0, 10.0, 12.5, 448.0, 30000.0])
def test_any_limit_is_found(limit: float, alternating: bool) -> None:
    module = Module(lambda gate, up: activate(gate, up, "swiglu_clamped", limit), alternating)
    assert activation_of(module, ROWS, "cpu") == Activation("swiglu_clamped", limit, alternating)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_others_are_refused(name: str) -> None:
    with pytest.raises(KernelError, match=r"its activation is none of swiglu, .* \(Module\._apply_gate\)"):
        activation_of(Module(ELEMENTWISE[name]), ROWS, "cpu")


@pytest.mark.parametrize("limit", [7.0, 10.0])
def test_fp8_experts_of_a_clamped_model(limit: float) -> None:
    """Transformers' fp8 experts clamp where the configuration names a limit, whatever the model."""
    module: Any = fp8_experts()
    module.limit = module.swiglu_limit = limit
    assert activation_of(module, 256, DEVICE) == Activation("swiglu_clamped", limit, False)
    module.swiglu_alpha = 1.702
    if limit == 7.0:
        assert activation_of(module, 256, DEVICE) == Activation("swiglu_oai", None, False)
        return
    with pytest.raises(KernelError, match=r"none of swiglu, .* \(SiLUActivation\)"):
        activation_of(module, 256, DEVICE)


def test_wrapped_fp8_experts_clamp() -> None:
    module: Any = fp8_experts()
    module.limit = 0.5
    (layer,) = ramp_moe.wrap(module, device="auto" if GPU else "h200").layers.values()
    assert (layer.held[0].activation, layer.held[0].limit) == ("swiglu_clamped", 0.5)
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2], [1, 3]], device=DEVICE)
    scores = torch.ones(6, 2, device=DEVICE)
    with torch.no_grad():
        found = module(x, ids, scores)
    assert error(found, computed(layer.held[0], x, ids, scores)) < 2e-2
    unclamped = dataclasses.replace(layer.held[0], activation="swiglu", limit=None)
    assert error(found, computed(unclamped, x, ids, scores)) > 0.2
