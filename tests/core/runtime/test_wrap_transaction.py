"""Wrapping succeeds as a whole, or the model is as it was: whatever fails, and at whichever call."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any

import pytest
import ramp_moe
import torch
from layer_cases import FakeKernel, H
from ramp_moe import KernelError, RampMoEError
from ramp_moe.runtime import holding, placeholder, refusals
from ramp_moe.runtime import layer as layers
from ramp_moe.runtime import layer_factory as building
from ramp_moe.runtime import wrapped_experts as routed
from ramp_moe.runtime.placeholder import Placeholder, Source
from ramp_moe.runtime.wrapped_experts import KEY, WrappedExperts
from torch import Tensor, nn
from wrap_cases import IDS, SCORES, Bank, InPlace, K, Turned, X, register_kernel

ADAPTER = Turned(Bank, "w13", "w2", K, gate_up_bias="b13", down_bias="b2")
STEPS: list[tuple[Any, str]] = [
    (Turned, "weights"), (Turned, "names"), (Turned, "order"), (Turned, "given"), (Turned, "own"), (Turned, "install"),
    (Turned, "top_k_of"), (building.Builder, "layer"), (building.Builder, "_plan"), (building.Builder, "_shared"),
    (InPlace, "prepare"), (InPlace, "unsupported"), (layers, "hold"), (holding, "relayout"), (refusals, "check"),
    (WrappedExperts, "__init__"), (WrappedExperts, "take"), (WrappedExperts, "install"), (placeholder, "become"),
    (Placeholder, "__new__"), (Source, "__init__"), (torch.utils, "swap_tensors"), (routed, "_plain_in_state_dict"),
    (nn.Module, "register_state_dict_post_hook"), (torch, "empty_like"), (torch, "empty"),
]  # fmt: skip
"""What is called while a model is wrapped."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """The only one, which reads another order than the model's."""
    return register_kernel(monkeypatch, "gate-up-interleaved-8")


class Failing:
    """Raises at one call, if at is given; counts them."""

    def __init__(self, function: Any, error: BaseException, at: int | None) -> None:
        self.function, self.error, self.at, self.calls = function, error, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **kwargs)


def patch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, at: int | None) -> Failing:
    if isinstance(owner, type):
        owner = next(base for base in owner.__mro__ if name in vars(base))
    found = owner.__dict__[name]
    static = isinstance(found, staticmethod)
    failing = Failing(found.__func__ if static else found, error, at)
    function = lambda *args, **kwargs: failing(*args, **kwargs)  # noqa: E731  a function binds, an object does not
    monkeypatch.setattr(owner, name, staticmethod(function) if static else function)
    return failing


class Snapshot:
    """Everything of a model that `wrap` may touch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.attributes = [dict(vars(m)) for m in model.modules()]
        self.parameters = [
            (name, p, type(p), dict(vars(p)), p.detach().clone()) for name, p in model.named_parameters()
        ]
        self.gradients = {name: p.grad for name, p in model.named_parameters()}
        self.hooks = [len(m._state_dict_hooks) for m in model.modules()]

    def check(self) -> None:
        for module, before in zip(self.model.modules(), self.attributes, strict=True):
            assert vars(module).keys() == before.keys()
            assert all(vars(module)[key] is value for key, value in before.items() if key != "training")
        now = list(self.model.named_parameters())
        for (name, p, kind, noted, value), (name_now, p_now) in zip(self.parameters, now, strict=True):
            assert name == name_now
            assert p_now is p
            assert type(p) is kind
            assert vars(p) == noted
            assert torch.equal(p, value)
            assert p.is_contiguous()
            assert p.grad is self.gradients[name]
        assert [len(m._state_dict_hooks) for m in self.model.modules()] == self.hooks


def model_of(layers: int = 3) -> nn.Module:
    model = nn.Sequential(*(Bank(seed, turned=True) for seed in range(layers)))
    model[0].w13.noted = "by a framework"
    model[0].w13.grad = torch.ones_like(model[0].w13)
    model[1].w2.requires_grad_(False)
    return model


def wrap(model: nn.Module) -> ramp_moe.Wrapped:
    return ramp_moe.wrap(model, ADAPTER, device="h200")


ERRORS = (
    partial(KernelError, "on purpose"),
    partial(torch.OutOfMemoryError, "CUDA out of memory, on purpose"),
    partial(RuntimeError, "on purpose"),
    partial(KeyboardInterrupt, "on purpose"),
)


@pytest.mark.parametrize("step", STEPS, ids=[f"{getattr(o, '__name__', o)}.{n}" for o, n in STEPS])
def test_failing_at_every_call_of_every_step(
    step: tuple[Any, str], kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        calls = patch(patched, *step, KernelError(), None)
        wrapped = model_of()
        wrap(wrapped)
        count = calls.calls
    ramp_moe.unwrap(wrapped)
    for at in range(1, count + 1):
        error = ERRORS[at % len(ERRORS)]()
        model = model_of()
        before = Snapshot(model)
        with monkeypatch.context() as patched:
            patch(patched, *step, error, at)
            expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else KernelError
            with pytest.raises(expected, match="on purpose") as caught:
                wrap(model)
        if expected is KernelError:
            assert str(caught.value).startswith(("0: ", "1: ", "2: ")), "it names the layer"
        before.check()
        with pytest.raises(KernelError, match="Sequential is not wrapped"):
            ramp_moe.unwrap(model)
    assert count, "a step that is not taken"
    wrap(model)
    assert isinstance(model[0].w13, Placeholder)


class FailingAnywhere:
    """A trace function that raises where the library's code is entered for the so manieth time; counts otherwise."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        resumed = code.co_flags & inspect.CO_GENERATOR  # or closed, where errors are passed over
        if event != "call" or resumed or "/core/ramp_moe/" not in code.co_filename:
            return
        self.calls += 1
        if self.calls == self.at:
            raise ERRORS[self.at % len(ERRORS)]()


@pytest.mark.slow
def test_failing_wherever_the_librarys_code_is_entered(kernel: FakeKernel) -> None:
    """Whatever steps there will be; at every third entry, for time."""
    before_all = sys.gettrace()

    def traced(model: nn.Module, tracer: FailingAnywhere) -> None:
        sys.settrace(tracer)
        try:
            wrap(model)
        finally:
            sys.settrace(before_all)

    wrap(model_of(2))  # what is made once, and kept, is made
    traced(model_of(2), counting := FailingAnywhere())
    assert counting.calls > 100
    for at in range(1, counting.calls + 1, 3):
        model = model_of(2)
        before = Snapshot(model)
        with pytest.raises((KernelError, RuntimeError, KeyboardInterrupt), match="on purpose"):
            traced(model, FailingAnywhere(at))
        before.check()


def test_undone_and_done_again(kernel: FakeKernel) -> None:
    model = model_of()
    before = Snapshot(model)
    wrapped = wrap(model)
    places = {t.data_ptr() for layer in wrapped.layers.values() for h in layer.held for t in (h.gate_up, h.down)}
    assert len(places) == 6
    with pytest.raises(KernelError, match="wrapped already"):
        wrap(model)
    ramp_moe.unwrap(model)
    before.check()


def test_unwrapping_without_memory_goes_on_where_it_failed(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    before = Snapshot(model)
    wrap(model)
    outs = [bank(X, IDS, SCORES).clone() for bank in model]
    with monkeypatch.context() as patched:
        patch(patched, Source, "read", ERRORS[1](), 6)
        with pytest.raises(KernelError, match="1: OutOfMemoryError: CUDA out of memory"):
            ramp_moe.unwrap(model)
    assert torch.equal(model[0](X, IDS, SCORES), outs[0])
    assert torch.equal(model[1](X, IDS, SCORES), outs[1]), "half of it had been given back"
    assert not hasattr(model[2], KEY)
    ramp_moe.unwrap(model)
    before.check()


def test_a_layer_that_no_kernel_takes_after_others_were_moved(kernel: FakeKernel) -> None:
    model = model_of()
    nn.utils.parametrize.register_parametrization(model[2], "w2", Zero())
    before = Snapshot(model)
    with pytest.raises(KernelError, match=r"2: w2 is parametrised \(Zero\): merge or remove the parametrisation"):
        wrap(model)
    before.check()


class Zero(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 0


def test_a_forward_that_was_put_over_ours(kernel: FakeKernel) -> None:
    """As accelerate does; it stays, and calls the module's own in the end."""

    class Plain(Bank):
        def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full((1, H), 7.0)

    model = Plain(turned=True)
    ramp_moe.wrap(model, Turned(Plain, "w13", "w2", K, gate_up_bias="b13", down_bias="b2"), device="h200")
    ours = model.forward
    model.forward = lambda *given: ours(*given) + 1  # type: ignore[method-assign]
    assert model(X, IDS, SCORES).shape == X.shape
    ramp_moe.unwrap(model)
    assert torch.equal(model(X, IDS, SCORES), torch.full((1, H), 8.0))


def test_what_was_wrapped_before_stays_wrapped_if_more_is_refused(kernel: FakeKernel) -> None:
    class Other(Bank):
        pass

    model = nn.ModuleList([Bank(turned=True), Other(turned=True)])
    model[1].w2 = nn.Parameter(model[1].w2.float())
    ramp_moe.wrap(model[0], ADAPTER, device="h200")
    wrapped, expected = model[0]._ramp_moe, model[0](X, IDS, SCORES)
    more = Turned(Other, "w13", "w2", K, gate_up_bias="b13", down_bias="b2")
    with pytest.raises(RampMoEError):
        ramp_moe.wrap(model, more, device="h200")
    assert model[0]._ramp_moe is wrapped
    assert torch.equal(model[0](X, IDS, SCORES), expected)
