"""How much Python one eager call runs. Counted, not timed, so that neither load nor the machine matters."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import ramp_moe
import torch
from layer_cases import FakeKernel, K, inputs, layer, model_of, weights
from ramp_moe import DispatchOptions, Hardware, MoELayer
from ramp_moe.runtime.layer import MOST_READY, LayerRuntime
from ramp_moe.runtime.relayout import relayout
from wrap_cases import Bank, Case, InPlace

PRICES = {8: 0.05, 32: 0.1, 128: 0.3}
X, IDS, SCORES = inputs(64)


class Nothing(FakeKernel):
    """Its launch does nothing; choosing its default is as dear as real kernels' is."""

    asked = 0

    def launch(self, *given: Any) -> None:
        pass

    def default_config(self, *given: Any) -> Any:
        Nothing.asked += 1
        return super().default_config(*given)


def functions(call: Callable[[], Any]) -> list[str]:
    """Names of the Python functions that a call enters, its own excluded, once it has run a few times."""
    found: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    with torch.inference_mode():
        for _ in range(3):
            call()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(before)
    return found[1:]


def check(call: Callable[[], Any], most: int) -> None:
    found = functions(call)
    assert len(found) <= most, "\n".join(found)


@pytest.mark.parametrize("by", ["default", "size"])
def test_a_layer_s_own_share_of_a_call(by: str, h200: Hardware) -> None:
    """Choosing, checking and launching; the output given or not."""
    kernel = Nothing()
    options: Any = {} if by == "default" else {"cost_model": model_of(h200, kernel, PRICES), "host_sync_us": math.inf}
    moe, out = layer(h200, kernel, **options), torch.empty_like(X)
    check(lambda: moe(X, IDS, SCORES), 13)
    check(lambda: moe(X, IDS, SCORES, out), 13)
    Nothing.asked = 0
    moe(X, IDS, SCORES)
    assert Nothing.asked == 0, "known for the batch size"


def test_nothing_is_asked_of_a_kernel_twice(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Nothing()
    moe = layer(h200, kernel)
    moe(X, IDS, SCORES)
    for name in ("max_tokens", "default_config", "unsupported", "unavailable", "configs", "readable_layouts"):
        monkeypatch.setattr(kernel, name, lambda *given, name=name: pytest.fail(f"{name} was asked again"))
    moe(X, IDS, SCORES)


def test_as_a_module_little_comes_on_top() -> None:
    moe = MoELayer(weights(), K, device="h200", options=DispatchOptions(kernels=[Nothing()]))
    check(lambda: moe(X, IDS, SCORES), 23)


def test_wrapped_little_comes_on_top() -> None:
    """A call of a module's experts, as a framework makes it."""
    bank = Case(turned=False, layouts=("gate-first",)).wrapped()
    for kernel in bank._ramp_moe.layer.kernels.values():  # type: ignore[union-attr]
        kernel.launch = lambda *given: None
    check(lambda: bank(X, IDS, SCORES), 25)


def test_what_is_remembered_of_sizes_is_bounded_and_right(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's eager batches can be of any size."""
    from ramp_moe.runtime import choice
    from ramp_moe.runtime import layer as layers

    monkeypatch.setattr(choice, "MOST_SIZES", 4)
    monkeypatch.setattr(layers, "MOST_READY", 4)
    assert MOST_READY > 100
    kernel = FakeKernel()
    moe = layer(h200, kernel)
    for tokens in (*range(1, 12), 3, 200, 3):
        assert moe(*inputs(tokens)).shape == (tokens, X.shape[1])
        assert len(moe.chooser._known) <= 4
        assert len(moe._ready) <= 4
    assert [n for _, n in kernel.launched] == [*range(1, 12), 3, 200, 3]


def test_what_is_remembered_is_forgotten_when_it_changes(h200: Hardware) -> None:
    kernel, other = FakeKernel(), FakeKernel("other")
    moe = layer(h200, kernel, other, cost_model=model_of(h200, kernel, PRICES), host_sync_us=math.inf)
    moe(X, IDS, SCORES)
    first = kernel.launched[-1]
    (candidate,) = {moe.choose(ramp_moe.plugin.Batch(X, IDS, SCORES)) for _ in range(2)}
    moe.drop(candidate, "planted")
    moe(X, IDS, SCORES)
    assert (kernel.launched + other.launched)[-1] != first
    moe.host_sync_us = 0.0
    kinds = {moe.choose(ramp_moe.plugin.Batch(*inputs(64, kind))).name for kind in ("uniform", "one-hot")}
    assert candidate.name not in kinds


def test_new_weights_are_launched_with(h200: Hardware) -> None:
    """What a launch needs is remembered, and updates are in place."""
    moe = LayerRuntime(relayout(weights(), "gate-first"), K, h200, [InPlace("in_place")])
    moe(X, IDS, SCORES)
    new = Case(turned=False, layouts=("gate-first",))
    given = new.adapter().weights(Bank(3))
    of = ramp_moe.plugin.MoEWeights(given.gate_up, given.down)
    moe.update(of)
    assert torch.equal(moe(X, IDS, SCORES), LayerRuntime(of, K, h200, [InPlace("in_place")])(X, IDS, SCORES))
