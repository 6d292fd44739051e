"""`ramp_moe.MoELayer`: finds everything by itself, and is a module like any other, or refuses."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import ramp_moe
import torch
from layer_cases import SHAPE, E, FakeKernel, H, I, K, by_hand, inputs, model_of, weights
from ramp_moe import DispatchOptions, Hardware, HardwareError, KernelError, MoELayer, RoutingError, ShapeError
from ramp_moe.runtime import layer_factory as building
from ramp_moe.runtime.options import MODES
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.launchable import MoEWeights
from wrap_cases import InPlace

MIXED = "gate-up-interleaved-8"
PRICES = {8: 0.05, 32: 0.1, 128: 0.3}
X, IDS, SCORES = inputs(5)
TOLERANCE = 2e-2


def made(*kernels: FakeKernel, of: MoEWeights | None = None, **options: Any) -> MoELayer:
    given = {"kernels": kernels or [InPlace("in_place")], **options}
    return MoELayer(of or weights(), K, device="h200", options=DispatchOptions(**given))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def expected_of(of: MoEWeights) -> torch.Tensor:
    return MoELayer(of, K, device="h200", options=DispatchOptions(kernels=[FakeKernel()]))(X, IDS, SCORES)


def drawn(seed: int, dtype: torch.dtype = torch.bfloat16) -> MoEWeights:
    generator = torch.Generator().manual_seed(seed)
    gate_up, down = (torch.randn(shape, generator=generator) * 0.2 for shape in ((E, 2 * I, H), (E, H, I)))
    return MoEWeights(gate_up.to(dtype), down.to(dtype))


# --- What it finds ----------------------------------------------------------------------------------------------------


def test_it_finds_kernels_by_itself() -> None:
    """The interpreted Triton kernel, of all that are registered; its weights are fp16 for the interpreter's sake."""
    layer = MoELayer(drawn(1, torch.float16), K, device="h200")
    assert isinstance(layer, torch.nn.Module)
    assert list(layer.runtime.configs()) == ["triton"]
    assert any("nothing was measured" in note for note in layer.notes)
    x = X.half()
    wanted = MoELayer(drawn(1, torch.float16), K, device="h200", options=DispatchOptions(kernels=[FakeKernel()]))
    assert error(layer(x, IDS, SCORES), wanted(x, IDS, SCORES).float()) < TOLERANCE


def test_weights_on_the_processor_are_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HardwareError, match="on the CPU; move the model to a GPU"):
        MoELayer(weights(), K)
    monkeypatch.delenv(building.INTERPRET, raising=False)
    with pytest.raises(HardwareError, match="on the CPU"):
        made()


def test_its_output_is_the_layer_s(h200: Hardware) -> None:
    layer = made()
    assert error(layer(X, IDS, SCORES), by_hand(X, IDS, SCORES)) < TOLERANCE
    out = torch.full_like(X, math.nan)
    assert layer(X, IDS, SCORES, out, 3) is out
    assert not out[3:].any()


def test_kernels_by_name_and_by_preference() -> None:
    layer = made("triton", InPlace("spare"), of=drawn(1, torch.float16))  # type: ignore[arg-type]
    assert list(layer.runtime.configs()) == ["triton", "spare"]
    with pytest.raises(ramp_moe.UnknownNameError, match="nobody"):
        made("nobody")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="no kernel that can be launched"):
        made(object())  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="none was named"):
        MoELayer(weights(), K, device="h200", options=DispatchOptions(kernels=[]))


def test_a_given_cost_model_decides(h200: Hardware) -> None:
    kernel = InPlace("in_place")
    model = model_of(h200, kernel, {8: 9.0, 32: 0.1})
    layer = made(kernel, FakeKernel("unknown"), cost_model=model)
    layer(X, IDS, SCORES)
    assert kernel.launched == [("bm32", 5)]
    assert list(layer.runtime.configs()) == ["in_place"]
    with pytest.raises(KernelError, match="the cost model predicts in_place, none of which"):
        made(FakeKernel("unknown"), cost_model=model)
    with pytest.raises(ShapeError, match="the cost model is for"):
        made(kernel, cost_model=model_of(h200, kernel, PRICES, replace(SHAPE, num_experts=8)))


def test_a_named_profile_that_is_not_used_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ramp_moe.ProfileError):
        made(profiles=[tmp_path / "missing.json"])
    with pytest.raises(ramp_moe.ProfileError):
        made(profiles=[tmp_path])


# --- A router ---------------------------------------------------------------------------------------------------------


def test_the_router_is_asked() -> None:
    asked: list[torch.Tensor] = []

    def router(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(hidden)
        return IDS, SCORES

    options = DispatchOptions(kernels=[FakeKernel()])
    layer = MoELayer(weights(), K, router=router, device="h200", options=options)
    assert torch.equal(layer(X), layer(X, IDS, SCORES))
    assert len(asked) == 1
    assert asked[0] is X
    with pytest.raises(RoutingError, match="without a router takes topk_ids and topk_weights"):
        made()(X)
    with pytest.raises(RoutingError, match="give both"):
        layer(X, IDS)
    for answer in (None, IDS, (IDS, SCORES, 1), (IDS, None)):
        with pytest.raises(RoutingError, match=r"the router must return two tensors, \(topk_ids, topk_weights\), not"):
            MoELayer(weights(), K, router=lambda x, a=answer: a, device="h200", options=options)(X)
    narrow = MoELayer(weights(), K, router=lambda x: (IDS[:, :1].contiguous(), SCORES[:, :1].contiguous()),
                      device="h200", options=options)  # fmt: skip
    with pytest.raises(ShapeError, match="2 ids a token"):
        narrow(X)


# --- As a module ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["as given", "moved", "two copies", "derived"])
def layer(request: pytest.FixtureRequest) -> MoELayer:
    """In every way in which kernels can hold the weights."""
    return {
        "as given": lambda: made(InPlace("plain")),
        "moved": lambda: made(InPlace("mixed", layouts=(MIXED,))),
        "two copies": lambda: made(InPlace("plain"), InPlace("mixed", layouts=(MIXED,)), copies=2),
        "derived": lambda: made(FakeKernel("derived")),
    }[request.param]()


def test_its_state_is_the_weights_in_the_order_given(layer: MoELayer) -> None:
    given = weights()
    state = layer.state_dict()
    assert {*state} == {"gate_up", "down"} == {name for name, _ in layer.named_parameters()}
    for name, tensor in state.items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, getattr(given, name))
    assert not any(p.requires_grad for p in layer.parameters())
    assert sum(p.numel() for p in layer.parameters()) == given.gate_up.numel() + given.down.numel()


def test_a_loaded_state_reaches_the_kernels(layer: MoELayer) -> None:
    new = drawn(2)
    runtime = layer.runtime
    layer.load_state_dict({"gate_up": new.gate_up, "down": new.down})
    assert torch.equal(layer(X, IDS, SCORES), expected_of(new))
    assert layer.runtime is runtime, "in place"
    other = drawn(3)
    layer.load_state_dict({"gate_up": other.gate_up, "down": other.down}, assign=True)
    assert torch.equal(layer(X, IDS, SCORES), expected_of(other))


def test_an_update_reaches_the_state(layer: MoELayer) -> None:
    new = drawn(2)
    layer.update(relayout(new, "up-first"))
    assert torch.equal(layer(X, IDS, SCORES), expected_of(new))
    assert all(torch.equal(tensor, getattr(new, name)) for name, tensor in layer.state_dict().items())


def test_what_is_written_to_a_parameter_is_computed_with(layer: MoELayer) -> None:
    new = drawn(2)
    with torch.no_grad():
        layer.down.mul_(0.5)
    half = replace(weights(), down=weights().down * 0.5)
    assert torch.equal(layer.down.clone(), half.down)
    layer.gate_up = torch.nn.Parameter(new.gate_up.clone(), requires_grad=False)
    assert torch.equal(layer(X, IDS, SCORES), expected_of(replace(half, gate_up=new.gate_up)))


def test_casts_are_right_or_refused(layer: MoELayer) -> None:
    found = layer.half()(X.half(), IDS, SCORES)
    half = MoEWeights(weights().gate_up.half(), weights().down.half())
    options = DispatchOptions(kernels=[FakeKernel()])
    assert torch.equal(found, MoELayer(half, K, device="h200", options=options)(X.half(), IDS, SCORES))
    with pytest.raises(ShapeError, match="as the weights are"):
        layer(X, IDS, SCORES)
    layer.double()
    with pytest.raises(KernelError, match="weights must be bf16, fp16"):
        layer(X, IDS, SCORES)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(X, IDS, SCORES), expected_of(MoEWeights(half.gate_up.bfloat16(), half.down.bfloat16())))


def test_elsewhere_is_right_or_refused(layer: MoELayer) -> None:
    wanted = layer(X, IDS, SCORES)
    assert torch.equal(layer.to("cpu")(X, IDS, SCORES), wanted)
    layer.to("meta")
    with pytest.raises(KernelError, match="not loaded"):
        layer(X, IDS, SCORES)


def test_fp8_weights_are_no_others() -> None:
    """A cast of fp8 values without their scales is no layer's weights."""
    of = MoEWeights(
        torch.zeros(2, 256, 128).to(torch.float8_e4m3fn), torch.zeros(2, 128, 128).to(torch.float8_e4m3fn),
        torch.ones(2, 2, 1), torch.ones(2, 1, 1),
    )  # fmt: skip
    layer = MoELayer(of, 1, device="h200", options=DispatchOptions(kernels=[Takes()]))
    assert {*layer.state_dict()} == {"gate_up", "down", "gate_up_scale", "down_scale"}
    layer.half()
    with pytest.raises(KernelError, match="of MoELayer has been replaced"):
        layer(torch.zeros(1, 128).half(), torch.zeros(1, 1).int(), torch.ones(1, 1))


class Takes(FakeKernel):
    def prepare(self, weights: MoEWeights) -> Any:
        return weights


def test_a_copy_is_its_own(layer: MoELayer) -> None:
    twin = copy.deepcopy(layer)
    new = drawn(2)
    twin.load_state_dict({"gate_up": new.gate_up, "down": new.down})
    assert torch.equal(twin(X, IDS, SCORES), expected_of(new))
    assert torch.equal(layer(X, IDS, SCORES), expected_of(weights()))


@pytest.mark.parametrize("how", ["data", "replaced", "assigned", "cast"])
def test_a_copy_made_after_weights_changed_has_the_new_ones(layer: MoELayer, how: str) -> None:
    """Also if the layer did not run in between; and neither is the other's."""
    new = drawn(2)
    if how == "data":
        layer.gate_up.data, layer.down.data = new.gate_up.clone(), new.down.clone()
    elif how == "replaced":
        layer.gate_up = torch.nn.Parameter(new.gate_up.clone(), requires_grad=False)
        new = replace(new, down=weights().down)
    elif how == "assigned":
        layer.load_state_dict({"gate_up": new.gate_up, "down": new.down}, assign=True)
    else:
        new = weights()
        layer.half()
        layer(X.half(), IDS, SCORES)
        layer.bfloat16()
    twin = copy.deepcopy(layer)
    wanted = expected_of(new)
    assert torch.equal(twin(X, IDS, SCORES), wanted)
    with torch.no_grad():
        twin.down.zero_()
    assert not twin(X, IDS, SCORES).any()
    assert torch.equal(layer(X, IDS, SCORES), wanted)


def test_copies_that_would_compute_with_its_weights(layer: MoELayer) -> None:
    """DataParallel's replicas have parameters of their own. A shallow copy needs what it is a copy of."""
    with pytest.raises(KernelError, match="DataParallel cannot replicate"):
        layer._replicate_for_data_parallel()  # which torch calls of each module
    shallow = copy.copy(made())
    gc.collect()
    with pytest.raises(KernelError, match="is gone"):
        shallow(X, IDS, SCORES)


def test_it_is_not_pickled(layer: MoELayer) -> None:
    with pytest.raises(KernelError, match=r"cannot be pickled; save its state_dict"):
        pickle.dumps(layer)


def test_it_is_one_operator_to_torch_compile(layer: MoELayer) -> None:
    wanted = layer(X, IDS, SCORES)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X, IDS, SCORES), wanted)
        new = drawn(2)
        layer.update(new)
        assert torch.equal(compiled(X, IDS, SCORES), expected_of(new))


def test_no_gradient_is_silently_zero(layer: MoELayer) -> None:
    layer.requires_grad_(True)
    with pytest.raises(KernelError, match="no gradients"):
        layer(X, IDS, SCORES).sum().backward()


def test_in_a_model_it_is_not_unwrapped() -> None:
    """Its weights stay the layer's, whatever is wrapped and unwrapped around it."""
    layer = made(InPlace("mixed", layouts=(MIXED,)))
    model = torch.nn.Sequential(layer)
    with pytest.raises(KernelError, match="is not wrapped"):
        ramp_moe.unwrap(model)
    assert isinstance(layer.gate_up, Placeholder)
    with pytest.raises(KernelError, match="has no MoE layer"):
        ramp_moe.wrap(model, device="h200")
    assert torch.equal(layer(X, IDS, SCORES), expected_of(weights()))


def test_functional_call_computes_with_what_is_lent(layer: MoELayer) -> None:
    new = drawn(2)
    lent = {"gate_up": new.gate_up, "down": new.down}
    assert torch.equal(torch.func.functional_call(layer, lent, (X, IDS, SCORES)), expected_of(new))
    assert torch.equal(layer(X, IDS, SCORES), expected_of(weights()))


# --- What it says -----------------------------------------------------------------------------------------------------


def test_it_explains_what_it_runs(h200: Hardware) -> None:
    kernel = InPlace("in_place")
    layer = made(kernel, FakeKernel("away", reason="not today"), cost_model=model_of(h200, kernel, PRICES))
    found = layer.explain(tokens=64)
    assert found.candidate.name == f"in_place/{found.candidates[0]['config']}"
    assert "histogram decides" in found.why
    assert [c["predicted_us"] for c in found.candidates] == sorted(c["predicted_us"] for c in found.candidates)
    text = str(found)
    for part in (h200.name, "64 tokens", f"runs {found.candidate.name}", " us", "weights in gate-first"):
        assert part in text
    assert found.tokens == 64
    assert "in_place" in repr(layer)


def test_it_explains_what_the_batch_size_decides(h200: Hardware) -> None:
    kernel = InPlace("in_place")
    model = model_of(h200, kernel, PRICES)
    layer = made(kernel, cost_model=model, host_sync_us=math.inf)
    found = layer.explain(4)
    layer(*inputs(4))
    assert "the batch size decides" in found.why
    assert kernel.launched[-1] == (found.candidate.config.name, 4)


def test_it_explains_that_nothing_was_measured() -> None:
    found = made().explain(4)
    assert "no cost model" in found.why
    assert found.candidates == ()
    assert str(found)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "4"])
def test_no_batch_is_explained_that_cannot_be(tokens: Any) -> None:
    with pytest.raises(ShapeError, match="whole number of tokens"):
        made().explain(tokens)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "4", None])
def test_nothing_is_warmed_up_that_cannot_be(tokens: Any) -> None:
    with pytest.raises(ShapeError, match="one token or more"):
        made().warm_up(tokens, torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weights": (weights().gate_up, weights().down)}, "weights must be a MoEWeights, not tuple"),
        ({"weights": None}, "weights must be a MoEWeights, not NoneType"),
        ({"router": 3}, "the router must be a function or a module, or None, not 3"),
        ({"device": None}, "named by a string, 'auto' or 'h200', not None"),
        ({"device": torch.device("cpu")}, "named by a string"),
        ({"options": {"copies": 2}}, "options must be a DispatchOptions, not {'copies': 2}"),
        ({"options": "fast"}, "options must be a DispatchOptions"),
    ],
)
def test_arguments_of_another_kind_are_refused(wrong: dict[str, Any], said: str) -> None:
    given = {"weights": weights(), "top_k": K, "device": "h200", "options": DispatchOptions(kernels=[FakeKernel()])}
    with pytest.raises(ramp_moe.RampMoEError, match=said):
        MoELayer(**{**given, **wrong})


@pytest.mark.parametrize("new", [None, weights().gate_up])
def test_an_update_takes_weights_alone(new: Any) -> None:
    layer = made()
    with pytest.raises(ShapeError, match="new weights must be a MoEWeights, not"):
        layer.update(new)
    assert torch.equal(layer(X, IDS, SCORES), expected_of(weights()))


# --- Options ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "kernels": ["triton", 3, {"triton"}],
    "cost_model": ["fast", 3],
    "profiles": ["folder", 3, b"folder", [None], [3]],
    "copies": [0, -1, 1.0, True, None],
    "mode": ["fast", 3],
    "host_sync_us": [-1, math.nan, True, "3"],
    "ep_size": [0, 2.0, None],
    "activations": ["int8", "fp16", 8],
    "checked": [1, None, "no"],
}


def test_every_option_refuses_what_cannot_be() -> None:
    assert {*WRONG} == {field.name for field in fields(DispatchOptions)}
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(ramp_moe.RampMoEError, match=name if name != "mode" else "mode"):
                DispatchOptions(**{name: value})


def test_options_are_frozen_and_have_defaults() -> None:
    options = DispatchOptions()
    with pytest.raises(FrozenInstanceError):
        options.copies = 2  # type: ignore[misc]
    for mode in MODES:
        assert DispatchOptions(mode=mode).mode == mode


def test_options_reach_the_layer(h200: Hardware) -> None:
    layer = made(checked=True, ep_size=4, host_sync_us=7.0)
    runtime = layer.runtime
    assert (runtime.checked, runtime.ep_size, runtime.host_sync_us) == (True, 4, 7.0)
    bad = IDS.clone()
    bad[0, 0] = E + 3
    with pytest.raises(RoutingError, match="outside"):
        layer(X, bad, SCORES)


def test_options_import_no_torch() -> None:
    code = "import sys; from ramp_moe import DispatchOptions; DispatchOptions(copies=2); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
