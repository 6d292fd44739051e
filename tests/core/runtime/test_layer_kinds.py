"""Layers of one model that share a shape, but not what kernels take: each kind is planned by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from layer_cases import SHAPE, E, FakeKernel, H, I, K, model_of, weights
from ramp_moe import DispatchOptions, Hardware, KernelError
from ramp_moe.cost_model.model import join
from ramp_moe.runtime.layer_factory import Builder, kind_of
from ramp_moe.spec.launchable import MoEWeights

PRICES = {8: 0.1, 32: 0.2, 128: 0.4}
BIAS = {"gate_up_bias": torch.zeros(E, 2 * I), "down_bias": torch.zeros(E, H)}
CLAMPED = replace(weights(), activation="swiglu_clamped", limit=7.0)
KINDS: dict[str, MoEWeights] = {
    "plain": weights(),
    "activation": replace(weights(), activation="gelu_tanh"),
    "limit 7": CLAMPED,
    "limit 9": replace(CLAMPED, limit=9.0),
    "layout": replace(weights(), layout="up-first"),
    "both biases": replace(weights(), **BIAS),
    "one bias": replace(weights(), down_bias=BIAS["down_bias"]),
}


class Choosy(FakeKernel):
    """Takes weights by whatever `wants` says."""

    def __init__(self, name: str, wants: Callable[[MoEWeights], bool]) -> None:
        super().__init__(name, layouts=("gate-first", "up-first"))
        self.wants = wants

    def prepare(self, weights: MoEWeights) -> Any:
        if not self.wants(weights):
            raise KernelError("other weights than these")
        return super().prepare(weights)


@pytest.mark.parametrize("second", [name for name in KINDS if name != "plain"])
def test_a_kernel_that_one_layer_cannot_use_computes_another(second: str, h200: Hardware) -> None:
    """Whichever of them is made first."""
    a, b = KINDS["plain"], KINDS[second]
    kinds = {kind_of(a, K): "a", kind_of(b, K): "b"}
    kernels = [Choosy(mine, lambda w, mine=mine: kinds[kind_of(w, K)] == mine) for mine in "ab"]
    model = join([model_of(h200, kernel, PRICES) for kernel in kernels])
    for order in ((a, b), (b, a)):
        builder = Builder("h200", DispatchOptions(kernels=kernels, cost_model=model))
        for of in (*order, *order):
            assert list(builder.layer(of, K).kernels) == [kinds[kind_of(of, K)]]
        assert len(builder._plans) == 2


def test_kinds_differ_by_every_field_of_the_weights() -> None:
    """A field that is added to MoEWeights must be part of a kind. The format and its activations are in the shape."""
    assert len({kind_of(of, K) for of in KINDS.values()}) == len(KINDS)
    assert kind_of(weights(), K) == kind_of(weights(), K)
    assert kind_of(weights(), K) != kind_of(weights(), K + 1)
    assert kind_of(weights(), K).shape == SHAPE
    tensors = {"gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias"}
    assert {f.name for f in fields(MoEWeights)} - tensors == {"activation", "layout", "limit", "format", "activations"}
