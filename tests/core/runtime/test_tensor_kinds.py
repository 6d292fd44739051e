"""Whatever is given in place of a tensor is refused with an error that names it, never a traceback of torch's."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
from moe_cases import H200, batch, weights
from ramp_moe import MoELayer, RampMoEError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.spec.checks import check_tensor
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused needs no GPU")
E, K, H, T = 4, 2, 128, 5
HALF = torch.float16


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(T, H), 1.0, 0, torch.qint8)


KINDS: dict[str, Any] = {
    "nothing": None,
    "a list": [[1.0]],
    "a number": 3,
    "a text": "x",
    "a tuple": (torch.zeros(1),),
    "an object": object(),
    "an array": np.zeros((T, H), np.float32),
    "a sparse tensor": torch.zeros(T, H, dtype=HALF).to_sparse(),
    "a nested tensor": nested(),
    "a quantised tensor": quantised(),
    "a tensor on meta": torch.zeros(T, H, dtype=HALF, device="meta"),
    "a tensor of no dimension": torch.tensor(1.0, dtype=torch.float32),
    "a complex tensor": torch.zeros(T, H, dtype=torch.complex64),
    "a bool tensor": torch.zeros(T, K, dtype=torch.bool),
}
GIVEN = ("hidden_states", "topk_ids", "topk_weights")
TENSORS = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")


@pytest.fixture(scope="module")
def layer() -> LayerRuntime:
    return LayerRuntime(weights(E, H, 128, "fp16", "cpu"), K, H200, [TritonMoE()])


def refused(what: str, call: Any) -> str:
    with pytest.raises(RampMoEError) as raised:
        call()
    told = str(raised.value)
    assert len(told) < 400, "whatever was given, it is not printed whole"
    assert "\n" not in told
    return told


def good() -> dict[str, Any]:
    x = batch(T, K, E, H, "uniform", "cpu", HALF)
    return {name: getattr(x, name) for name in GIVEN}


@pytest.mark.parametrize("kind", KINDS)
def test_batches(layer: LayerRuntime, kind: str) -> None:
    for name in GIVEN:
        given = good() | {name: KINDS[kind]}
        assert name in refused(name, lambda given=given: Batch(**given))
        assert name in refused(name, lambda given=given: layer(**given))
    if KINDS[kind] is None:
        return
    assert "out" in refused("out", lambda: layer(**good(), out=KINDS[kind]))
    if not isinstance(KINDS[kind], int):
        assert "num_valid" in refused("num_valid", lambda: layer(**good(), num_valid=KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_weights(layer: LayerRuntime, kind: str) -> None:
    given, of = KINDS[kind], weights(E, H, 128, "fp16", "cpu")
    for name in TENSORS:
        if given is not None or name in ("gate_up", "down"):
            told = refused(name, lambda name=name: replace(of, **{name: given}))
            assert name in told or "scales belong to quantised weights" in told
    for what in ("activation", "layout", "format", "activations"):
        if given is not None or what in ("activation", "layout"):
            refused(what, lambda what=what: replace(of, **{what: given}))
    for call in (
        lambda: LayerRuntime(given, K, H200, [TritonMoE()]),
        lambda: Builder("h200").layer(given, K),
        lambda: MoELayer(given, top_k=K),
        lambda: layer.update(given),
    ):
        assert "must be a MoEWeights" in refused("weights", call)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_tensor(layer: LayerRuntime, kind: str) -> None:
    """A dtype, a number of tokens, and what kernels check."""
    given = KINDS[kind]
    refused("dtype", lambda: layer.warm_up(3, given))
    if not isinstance(given, int):
        refused("tokens", lambda: layer.warm_up(given, HALF))
        refused("top_k", lambda: LayerRuntime(weights(E, H, 128, "fp16", "cpu"), given, H200, [TritonMoE()]))
    cpu = torch.device("cpu")
    assert "the sums" in refused("sums", lambda: check_tensor("the sums", given, (7,), (torch.float32,), cpu))


def test_what_has_the_right_shape_and_another_layout(layer: LayerRuntime) -> None:
    for name in GIVEN:
        given = good()
        given[name] = given[name].to_sparse()
        assert f"{name} is a sparse_coo tensor" in refused(name, lambda given=given: layer(**given))
    assert "out" in refused("out", lambda: layer(**good(), out=good()["hidden_states"].to_sparse()))


def test_a_parameter_is_a_tensor() -> None:
    """And so is what else derives from it."""
    of = weights(E, H, 128, "fp16", "cpu")
    made = MoEWeights(torch.nn.Parameter(of.gate_up), torch.nn.Parameter(of.down))
    assert made.gate_up.shape == of.gate_up.shape
