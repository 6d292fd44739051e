"""Weights that are not those of wrap time when a wrapped module is called: computed with as they are, or refused; and
what is refused when a model is wrapped."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ramp_moe
import torch
from ramp_moe import Experts, KernelError, RampMoEError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.placeholder import Placeholder
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from wrap_cases import CASES, IDS, SCORES, TENSORS, Bank, Case, Turned, X, register_kernel

IN_PLACE = Case(False, ("gate-first",))
ALL = {"in place": IN_PLACE, **CASES}


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


class Foreign(Tensor):
    """As quantisation libraries make them: values are known to its own operators alone."""

    @staticmethod
    def __new__(cls, t: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)  # type: ignore[attr-defined]

    def __init__(self, t: Tensor) -> None:
        self.kept = t

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Foreign(args[0].kept)
        raise RuntimeError(f"{func} is not implemented")


def values(seed: int, turned: bool) -> dict[str, Tensor]:
    bank = Bank(seed, turned)
    return {name: getattr(bank, name).detach() for name in TENSORS}


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> Case:
    return ALL[request.param]


def ran(bank: Bank) -> Tensor:
    with torch.no_grad():
        return bank(X, IDS, SCORES)


def fresh(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """What a module with these weights computes."""
    bank = Bank(0, case.turned)
    for name, tensor in tensors.items():
        getattr(bank, name).data = tensor
    return case.builder().layer(case.adapter().weights(bank), 2)(X, IDS, SCORES)


CHANGES: dict[str, Callable[[Bank, str, Tensor], Any]] = {
    "data =": lambda bank, name, new: setattr(getattr(bank, name), "data", new),
    "another parameter": lambda bank, name, new: setattr(bank, name, nn.Parameter(new)),
    "in _parameters": lambda bank, name, new: bank._parameters.__setitem__(name, nn.Parameter(new)),
    "del and register": lambda bank, name, new: (delattr(bank, name), bank.register_parameter(name, nn.Parameter(new))),
    "a buffer": lambda bank, name, new: (delattr(bank, name), bank.register_buffer(name, new)),
    "a plain tensor": lambda bank, name, new: (delattr(bank, name), setattr(bank, name, new)),
    "swapped": lambda bank, name, new: torch.utils.swap_tensors(getattr(bank, name), nn.Parameter(new)),
    "freed, then there again": lambda bank, name, new: (
        setattr(getattr(bank, name), "data", new.new_empty(0)), setattr(getattr(bank, name), "data", new)),
    "elsewhere in one buffer": lambda bank, name, new: setattr(
        getattr(bank, name), "data", torch.cat([new.flatten(), new.flatten()])[new.numel():].view(new.shape)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_of_any_kind_are_computed_with(case: Case, change: str) -> None:
    bank, expected = case.wrapped(), values(0, case.turned)
    ran(bank)
    for name, new in values(1, case.turned).items():
        CHANGES[change](bank, name, new.clone())
        expected[name] = new
        assert torch.equal(ran(bank), fresh(case, expected)), name
    number = bank._ramp_moe.layer._number
    with torch.no_grad():
        bank.w2.mul_(2)
    assert torch.equal(ran(bank), fresh(case, expected | {"w2": expected["w2"] * 2}))
    assert bank._ramp_moe.layer._number == number
    bank._ramp_moe.remove(bank)
    assert not any(isinstance(getattr(bank, name), Placeholder) for name in TENSORS)
    assert torch.equal(bank.w2, expected["w2"] * 2)


def test_threads_that_meet_a_change_make_one_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them compute with the new weights, which are taken once."""
    bank, tensors = case.wrapped(), values(1, case.turned)
    experts, threads, built = bank._ramp_moe, 4, []
    ran(bank)
    make, start, inside = experts._build, threading.Barrier(threads), threading.Event()

    def slow(module: Any) -> None:
        built.append(threading.get_ident())
        inside.wait(timeout=0.05)  # nobody sets it: time for whoever does not wait to come in between
        make(module)

    monkeypatch.setattr(experts, "_build", slow)
    for name, new in tensors.items():
        setattr(bank, name, nn.Parameter(new.clone()))

    def run(_: int) -> Tensor:
        start.wait(timeout=60)
        return ran(bank)

    with ThreadPoolExecutor(threads) as pool:
        outs = list(pool.map(run, range(threads)))
    assert len(built) == 1
    assert all(torch.equal(out, fresh(case, tensors)) for out in outs)


def test_what_was_compiled_follows_too(case: Case) -> None:
    bank = case.wrapped()
    compiled = torch.compile(bank, backend="eager", fullgraph=True)
    new = values(1, case.turned)
    with torch.no_grad():
        assert torch.equal(compiled(X, IDS, SCORES), ran(bank))
        bank.w13.data = new["w13"].clone()
        found = compiled(X, IDS, SCORES)
    assert torch.equal(found, fresh(case, values(0, case.turned) | {"w13": new["w13"]}))


def test_functional_call(case: Case) -> None:
    bank, new = case.wrapped(), values(1, case.turned)
    before = ran(bank)
    with torch.no_grad():
        found = torch.func.functional_call(bank, new, (X, IDS, SCORES))
    assert {type(t) for t in new.values()} == {Tensor}, "they stay the caller's"
    assert torch.equal(found, fresh(case, new))
    assert torch.equal(ran(bank), before)
    with torch.no_grad():
        found = torch.func.functional_call(bank, {"w2": new["w2"]}, (X, IDS, SCORES))
    assert torch.equal(found, fresh(case, values(0, case.turned) | {"w2": new["w2"]}))
    assert torch.equal(ran(bank), before)
    case.check(bank, values(0, case.turned))


UNFIT: dict[str, tuple[Callable[[Bank], Any], str]] = {
    "float": (lambda bank: bank.float(), "gate_up is torch.float32; weights must be"),
    "one in half": (lambda bank: setattr(bank.w2, "data", bank.w2.half()), "down must be torch.bfloat16, not"),
    "meta": (lambda bank: bank.to("meta"), r"w13 is not loaded \(it is on the device meta\)"),
    "freed": (lambda bank: setattr(bank.w2, "data", torch.empty(0, dtype=torch.bfloat16)), "down must be"),
    "foreign": (lambda bank: setattr(bank, "w2", nn.Parameter(Foreign(bank.w2.detach().clone()))), "w2 is a Foreign"),
    "sparse": (lambda bank: setattr(bank, "w2", nn.Parameter(bank.w2.detach().clone().to_sparse())), "w2 is torch.spa"),
    "gone": (lambda bank: delattr(bank, "w2"), "has no (w2|attribute)"),
}  # fmt: skip


@pytest.mark.parametrize("change", UNFIT)
def test_what_no_layer_can_be_made_of_is_refused_until_unwrapped(case: Case, change: str) -> None:
    bank, (spoil, message) = case.wrapped(), UNFIT[change]
    ran(bank)
    spoil(bank)
    for _ in range(2):
        with pytest.raises(KernelError, match=rf"of Bank has been replaced.*{message}.*unwrap"):
            ran(bank)
    bank._ramp_moe.remove(bank)
    assert not any(isinstance(getattr(bank, name, None), Placeholder) for name in TENSORS)


def test_to_and_back(case: Case) -> None:
    bank = case.wrapped()
    expected = ran(bank)
    assert torch.equal(ran(bank.float().bfloat16()), expected)
    assert torch.equal(ran(bank.to("cpu").bfloat16().requires_grad_(False).train().eval()), expected)


def test_parametrised_afterwards(case: Case) -> None:
    bank, refused = case.wrapped(), 0
    for name in ("w13", "w2"):
        try:
            parametrize.register_parametrization(bank, name, Halved())
        except KernelError as e:
            assert f"needs the memory of {name}" in str(e)  # noqa: PT017
            continue
        refused += 1
        with pytest.raises(KernelError, match=rf"{name} is parametrised \(Halved\): merge or remove"):
            ran(bank)
        parametrize.remove_parametrizations(bank, name, leave_parametrized=False)
        assert torch.equal(ran(bank), fresh(case, values(0, case.turned)))
    assert refused == 2 or case is not IN_PLACE


def test_weights_that_a_hook_computes_afterwards() -> None:
    bank = IN_PLACE.wrapped()
    expected = ran(bank)
    nn.utils.weight_norm(bank, "w2")  # the deprecated one, which is a hook
    with pytest.raises(KernelError, match="w2 is no parameter, and may be computed before each call"):
        ran(bank)
    bank._ramp_moe.remove(bank)
    nn.utils.remove_weight_norm(bank, "w2")
    assert bank.w2.shape == expected.shape[:0] + bank.w2.shape


# --- When a model is wrapped ------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """As PEFT's of `target_parameters`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.parameter_name = base_layer, "w13"


class Offload:
    """As accelerate's hooks."""

    def __init__(self, offload: bool) -> None:
        self.offload = offload


def hooked(*hooks: Any) -> Callable[[nn.Sequential], Any]:
    def put(model: nn.Sequential) -> None:
        model[1]._hf_hook = hooks[0] if len(hooks) == 1 else type("SequentialHook", (), {"hooks": hooks})()

    return put


REFUSED: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "parametrised": (lambda m: parametrize.register_parametrization(m[1], "w2", Halved()), r"w2 is parametrised \("),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m[1], "b13"), r"b13 is parametrised \(_Wei"),
    "old weight norm": (lambda m: nn.utils.weight_norm(m[1], "w13"), "w13 is no parameter, and may be computed"),
    "pruned": (lambda m: prune.l1_unstructured(m[1], "w2", 0.5), "w2 is no parameter, and may be"),
    "adapted": (lambda m: m.append(Adapted(m[1])), "w13 is adapted by Adapted; merge that into the weights first"),
    "offloaded": (hooked(Offload(True)), "accelerate's Offload moves its weights at each call"),
    "offloaded by a later hook": (hooked(Offload(False), Offload(True)), "accelerate's Offload moves its weights"),
    "an unknown hook": (hooked(object()), "accelerate's object moves its weights"),
    "foreign": (lambda m: setattr(m[1], "w13", nn.Parameter(Foreign(m[1].w13.detach()))), "w13 is a Foreign"),
    "foreign bias": (lambda m: setattr(m[1], "b2", nn.Parameter(Foreign(m[1].b2.detach()))), "b2 is a Foreign"),
    "lazy": (lambda m: setattr(m[1], "w13", nn.UninitializedParameter()), "w13 is a UninitializedParameter"),
    "sparse": (lambda m: setattr(m[1], "w2", nn.Parameter(m[1].w2.detach().to_sparse())), "w2 is torch.sparse_coo"),
    "tied to another layer": (lambda m: setattr(m[1], "w13", m[0].w13), "w13 is also a weight of another"),
    "in one buffer": (lambda m: one_buffer(m[0].w13, m[1].w13), r"w13 shares its memory with 1\.w13"),
    "tied to a plain module": (lambda m: m.append(nn.Linear(2, 2)) and share(m), r"w13 shares its memory with 3\."),
}  # fmt: skip


def one_buffer(a: nn.Parameter, b: nn.Parameter) -> None:
    whole = torch.stack([a.detach(), b.detach()])
    a.data, b.data = whole[0], whole[1]


def share(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(model[0].w13.detach()[0])


@pytest.mark.parametrize("why", REFUSED)
def test_refused_at_wrap_time(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer was moved by then; it is given back."""
    spoil, message = REFUSED[why]
    register_kernel(monkeypatch, "gate-up-interleaved-8")
    model = nn.Sequential(Bank(0), Bank(1), Bank(2))
    spoil(model)
    parameters = {name: (p, type(p)) for name, p in model.named_parameters()}
    with pytest.raises(KernelError, match=rf"^[01]: {message}"):
        ramp_moe.wrap(model, Experts(Bank, "w13", "w2", 2, gate_up_bias="b13", down_bias="b2"), device="h200")
    assert {name: (p, type(p)) for name, p in model.named_parameters()} == parameters
    assert torch.equal(model[2].w13, Bank(2).w13)
    with pytest.raises(KernelError, match="is not wrapped"):
        ramp_moe.unwrap(model)


def test_shared_weights_that_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    register_kernel(monkeypatch, "gate-first")
    model = nn.Sequential(Bank(0), Bank(1))
    model[1].w13 = model[0].w13
    model[0]._hf_hook = Offload(False)  # moves inputs alone
    ramp_moe.wrap(model, Experts(Bank, "w13", "w2", 2), device="h200")
    with torch.no_grad():
        model[0].w13.zero_()
    assert not ran(model[0]).any()
    assert not ran(model[1]).any()
    ramp_moe.unwrap(model)
    assert model[1].w13 is model[0].w13


def test_a_parameter_that_others_have_too_is_theirs_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimiser's, or that of another module: the object stays, and is read and written by all."""
    register_kernel(monkeypatch, "gate-up-interleaved-8")
    model = nn.Sequential(Bank(0), nn.ParameterList())
    model[1].append(model[0].w13)
    known = dict(model.named_parameters())
    ramp_moe.wrap(model, Experts(Bank, "w13", "w2", 2), device="h200")
    assert isinstance(known["0.w13"], Placeholder)
    assert all(known[name] is p for name, p in model.named_parameters())
    with torch.no_grad():
        model[1][0].zero_()
    assert not ran(model[0]).any()


class Careless(Turned):
    """An adapter that says how weights are taken, but not how they are put back."""

    given, own = Experts.given, Experts.own

    def weights(self, module: nn.Module) -> Any:
        return Turned.weights(Turned(Bank, "w13", "w2", 2), module)


class HalfCareless(Turned):
    own = Experts.own


@pytest.mark.parametrize("kind", [Careless, HalfCareless])
def test_an_adapter_that_does_not_know_its_own_order(kind: type[Turned], monkeypatch: pytest.MonkeyPatch) -> None:
    register_kernel(monkeypatch, "gate-first")
    model = nn.Sequential(Bank(0, turned=True))
    with pytest.raises(KernelError, match=rf"0: {kind.__name__}.given and .own disagree about how w13 becomes"):
        ramp_moe.wrap(model, kind(Bank, "w13", "w2", 2), device="h200")
    assert type(model[0].w13) is nn.Parameter


def test_weights_that_something_refers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    register_kernel(monkeypatch, "gate-up-interleaved-8")
    model = nn.Sequential(Bank(0))
    reference = weakref.ref(model[0].w13)
    with pytest.raises(KernelError, match="0: its weights cannot be moved while something else refers to them"):
        ramp_moe.wrap(model, Experts(Bank, "w13", "w2", 2), device="h200")
    assert reference() is model[0].w13
    assert type(model[0].w13) is nn.Parameter


def test_a_layer_without_a_module_is_left_alone() -> None:
    bank = IN_PLACE.wrapped()
    layer, copied = bank._ramp_moe.layer, copy.deepcopy(bank)._ramp_moe.layer
    assert isinstance(layer, LayerRuntime)
    del bank
    assert layer.owner is not None
    assert torch.equal(layer(X, IDS, SCORES), copied(X, IDS, SCORES))
    assert issubclass(KernelError, RampMoEError)
