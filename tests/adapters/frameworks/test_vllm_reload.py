"""New weights in vLLM's live parameters, by every way that they come: experts compute with them from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, error, expected, weights
from ramp_moe import KernelError, RampMoEError
from ramp_moe.runtime.layer_factory import Builder, LayerPlan
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import engine_calibration
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_adapters.frameworks.vllm.stock import Stock
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch import Tensor
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm_cases import DEVICE, experts_of, load, run, serve

EXPERTS, TOP_K, HIDDEN, INTER = 4, 2, 128, 128
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = 2e-2


class Interleaved(TritonMoE):
    """Reads what vLLM does not have."""

    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("gate-up-interleaved-8",)


class Deriving(TritonMoE):
    """Launches with copies of its own."""

    def prepare(self, given: MoEWeights) -> MoEWeights:
        copies = {f.name: t.clone() for f in fields(given) if isinstance(t := getattr(given, f.name), Tensor)}
        return MoEWeights(**copies, activation=given.activation, layout=given.layout)


KERNELS = {"vllms-order": TritonMoE, "moved": Interleaved, "derived": Deriving, "vllm-keeps": TritonMoE}
"""Of the last, vLLM's own experts keep every size."""


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "on")
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    made = KERNELS[request.param]()
    builder = Builder("auto" if DEVICE == "cuda" else "h200")
    monkeypatch.setattr(builder, "_plan", lambda shape, hardware: LayerPlan(hardware, [made], None))
    serve(monkeypatch, builder)
    if request.param == "vllm-keeps":
        keeps = SimpleNamespace(keeps=lambda n: True, keeps_any=True)
        monkeypatch.setattr(engine_calibration, "TIMERS", {})
        monkeypatch.setattr(engine_calibration.LoadedModel, "calibrated", lambda *_: keeps)
        if DEVICE == "cpu":
            monkeypatch.setattr(Stock, "run", own)
    return str(request.param)


def own(self: Stock, output: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any) -> None:
    """What vLLM's own experts are given, computed by the plain reference."""
    experts, expert_map = self._experts, rest[2]
    scales = {"gate_up_scale": experts.w1_scale, "down_scale": experts.w2_scale}
    biases = {"gate_up_bias": experts.w1_bias, "down_bias": experts.w2_bias}
    ids = topk_ids if expert_map is None else torch.cat((expert_map, expert_map.new_full((1,), -1)))[topk_ids]
    of = MoEWeights(self._weights.gate_up, self._weights.down, **scales, **biases)
    output.copy_(expected(of, Batch(x, ids.int(), topk_weights.float()), quantise=experts.w1_scale is not None))


def drawn(dtype: str, bias: bool = False) -> tuple[MoEWeights, MoEWeights]:
    """Those of a first load, and others."""
    half = "bf16" if torch.bfloat16 == HALF else "fp16"
    old = weights(EXPERTS, HIDDEN, INTER, half if dtype == "half" else dtype, DEVICE, bias=bias)
    if old.gate_up_bias is not None and old.down_bias is not None:
        old = replace(old, gate_up_bias=old.gate_up_bias.to(HALF), down_bias=old.down_bias.to(HALF))
    turned = {f.name: t.flip(0).contiguous() for f in fields(old) if isinstance(t := getattr(old, f.name), Tensor)}
    return old, MoEWeights(**turned, activation=old.activation)


def given() -> Batch:
    return batch(4, TOP_K, EXPERTS, HIDDEN, "skewed", DEVICE, HALF)


def wrong(routed: Any, of: MoEWeights) -> float:
    b = given()
    return error(run(routed, b), expected(of, b, quantise=of.gate_up_scale is not None))


def layerwise(routed: Any, new: MoEWeights) -> None:
    """As `reload_weights` and weight transfer do."""
    with torch.device(DEVICE):
        initialize_layerwise_reload(routed)
        load(routed, new)
        finalize_layerwise_reload(routed, SimpleNamespace(dtype=HALF))


def live(routed: Any, new: MoEWeights) -> None:
    """As `load_weights` on a live model does, with nothing after it."""
    load(routed, new)


def live_and_processed(routed: Any, new: MoEWeights) -> None:
    load(routed, new)
    routed.quant_method.process_weights_after_loading(routed)


def named(new: MoEWeights) -> dict[str, Tensor]:
    pairs = {
        "w13_weight": new.gate_up,
        "w2_weight": new.down,
        "w13_weight_scale_inv": new.gate_up_scale,
        "w2_weight_scale_inv": new.down_scale,
        "w13_bias": new.gate_up_bias,
        "w2_bias": new.down_bias,
    }
    return {name: t for name, t in pairs.items() if t is not None}


def copied(routed: Any, new: MoEWeights) -> None:
    """As `reload_weights(is_checkpoint_format=False)` does."""
    with torch.no_grad():
        for name, tensor in named(new).items():
            routed.get_parameter(name).copy_(tensor)


def sliced(routed: Any, new: MoEWeights) -> None:
    for name, tensor in named(new).items():
        for expert in range(EXPERTS):
            routed.get_parameter(name).data[expert].copy_(tensor[expert])


def state(routed: Any, new: MoEWeights) -> None:
    assert not routed.load_state_dict(named(new), strict=False).unexpected_keys


def rebound(routed: Any, new: MoEWeights) -> None:
    for name, tensor in named(new).items():
        getattr(routed, name).data = tensor.clone()


def exchanged(routed: Any, new: MoEWeights) -> None:
    for name, tensor in named(new).items():
        parameter: Any = torch.nn.Parameter(tensor.clone(), requires_grad=False)
        parameter.weight_loader = routed.weight_loader
        for attribute in ("quant_method", "weight_loader_numel"):
            if (value := getattr(routed.get_parameter(name), attribute, None)) is not None:
                setattr(parameter, attribute, value)
        setattr(routed, name, parameter)


WAYS: dict[str, Callable[[Any, MoEWeights], None]] = {
    f.__name__: f for f in (layerwise, live, live_and_processed, copied, sliced, state, rebound, exchanged)
}


@pytest.mark.parametrize(
    ("dtype", "way"), [*(("half", way) for way in WAYS), ("fp8", "layerwise"), ("fp8", "live"), ("fp8", "copied")]
)
def test_new_weights_count(kernel: str, dtype: str, way: str) -> None:
    """Twice, and where the old ones lay, since CUDA graphs have the addresses."""
    old, new = drawn(dtype, bias=dtype == "half")
    routed = experts_of(old, TOP_K, dtype=HALF)
    experts = routed.quant_method.moe_kernel.fused_experts
    (held,) = experts.layer.held
    assert held.layout == ("gate-up-interleaved-8" if kernel == "moved" else "gate-first")
    places = [t.data_ptr() for t in vars(held).values() if isinstance(t, Tensor)]
    assert wrong(routed, old) < TOLERANCE < wrong(routed, new)
    for now in (new, old):
        WAYS[way](routed, now)
        assert wrong(routed, now) < TOLERANCE
        (held,) = experts.layer.held
        assert [t.data_ptr() for t in vars(held).values() if isinstance(t, Tensor)] == places
    live(routed, new)
    assert wrong(routed, new) < TOLERANCE, "parameters are still the layer's"


@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_parameters_read_as_vllms(kernel: str, dtype: str) -> None:
    old, _ = drawn(dtype, bias=dtype == "half")
    routed = experts_of(old, TOP_K, dtype=HALF)
    found = routed.state_dict()
    for name, tensor in named(old).items():
        assert routed.get_parameter(name).weight_loader
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_rank_of_expert_parallelism_after_sleep(kernel: str) -> None:
    """Which loses all memory of the weights but buffers, and reloads."""
    old, new = drawn("half")
    routed = [experts_of(old, TOP_K, dtype=HALF, ep=(2, rank)) for rank in range(2)]
    for each in routed:
        experts = each.quant_method.moe_kernel.fused_experts
        experts.local_ids.fill_(7)
        for t in vars(experts.layer.held[0]).values():
            if isinstance(t, Tensor):
                t.fill_(float("nan"))
        layerwise(each, new)
    b = given()
    assert error(sum(run(r, b).float() for r in routed), expected(new, b, quantise=False)) < TOLERANCE


def test_weights_that_do_not_fit_are_an_error_until_others_come(kernel: str) -> None:
    old, new = drawn("half")
    routed = experts_of(old, TOP_K, dtype=HALF)
    routed.w2_weight = torch.nn.Parameter(new.down[:, :64].contiguous(), requires_grad=False)
    for _ in range(2):
        with pytest.raises(RampMoEError, match="down"):
            run(routed, given())
    exchanged(routed, new)
    assert wrong(routed, new) < TOLERANCE


def test_a_failed_update_is_not_computed_by_vllm_either(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = drawn("half")
    routed = experts_of(old, TOP_K, dtype=HALF)
    experts = routed.quant_method.moe_kernel.fused_experts
    experts.layer.stale = "an update failed"
    with pytest.raises(KernelError, match="an update failed"):
        run(routed, given())
    layerwise(routed, new)
    assert wrong(routed, new) < TOLERANCE
