"""Batches with padding: only the valid tokens are computed, the others' output is 0, and little is launched for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from moe_cases import H200, batch, error, expected, weights
from ramp_moe import RoutingError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; test_capture.py has padded graphs")
E, K, H, T = 4, 2, 128, 9
HALF = torch.float16


class Operators(TorchDispatchMode):
    """Counts torch's operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Nothing(TritonMoE):
    """Launches nothing."""

    name = "nothing"

    def run(self, *_: Any) -> None:
        return None


def made(kernel: TritonMoE | None = None) -> LayerRuntime:
    return LayerRuntime(weights(E, H, 128, "fp16", "cpu"), K, H200, [kernel or TritonMoE()])


def given(dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    b = batch(T, K, E, H, "uniform", "cpu", HALF)
    return {"hidden_states": b.hidden_states, "topk_ids": b.topk_ids.to(dtype), "topk_weights": b.topk_weights}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("valid", [-3, 0, 4, T, T + 9])
def test_what_is_computed(valid: int, form: Any, dtype: torch.dtype) -> None:
    layer, b = made(), batch(T, K, E, H, "uniform", "cpu", HALF)
    out = torch.full_like(b.hidden_states, float("nan"))
    layer(**given(dtype), out=out, num_valid=form(valid))
    known = min(max(valid, 0), T)
    wanted = expected(layer.held[0], b, quantise=False)
    assert not known or error(out[:known], wanted[:known]) < 4e-3
    assert (out[known:] == 0).all()


def test_in_place() -> None:
    layer, b = made(), given()
    wanted = layer(**b, num_valid=4)
    assert torch.equal(layer(**b, out=b["hidden_states"], num_valid=4), wanted)


@pytest.mark.parametrize("name", ["topk_ids", "topk_weights"])
def test_the_padding_must_fit_too(name: str) -> None:
    """The first tokens of each tensor would fit."""
    b = given()
    b[name] = torch.cat([b[name], b[name]])
    with pytest.raises(RoutingError, match=name):
        made()(**b, num_valid=4)


def test_an_int_costs_one_operator() -> None:
    layer, b, out = made(Nothing()), given(), torch.empty(T, H, dtype=HALF)
    with Operators() as counted:
        layer(**b, out=out, num_valid=4)
    assert counted.found - Counter(slice=9) == Counter(zero_=1), "slices launch nothing"
    with Operators() as counted:
        layer(**b, out=out, num_valid=T)
    assert not counted.found


def test_a_tensor_costs_two_operators() -> None:
    layer, b, out = made(Nothing()), given(), torch.empty(T, H, dtype=HALF)
    valid = torch.tensor([4], dtype=torch.int32)
    layer(**b, out=out, num_valid=valid)  # numbers of rows are made once
    with Operators() as counted:
        layer(**b, out=out, num_valid=valid)
    views = Counter(slice=9, view=9, reshape=9, _unsafe_view=9, alias=9)
    assert set((counted.found - views).elements()) <= {"lt", "where", "scalar_tensor"}
