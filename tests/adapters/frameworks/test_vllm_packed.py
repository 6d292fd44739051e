"""INT4 checkpoints in the real vLLM 0.33: one copy of the weights, against the float32 reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, error
from ramp_moe import KernelError, MoEShape, ShapeError
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.layer_factory import Builder, LayerPlan
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_adapters.frameworks.vllm.experts import RampExperts
from ramp_moe_kernels.triton.kernel import TritonMoE
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm_cases import DEVICE, experts_of, load, run, said_by_plugin, scheme, serve

EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 128, 128
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""Triton's interpreter truncates where a GPU rounds to bf16."""
TOLERANCE = 2e-2
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
PACKED = ("w13_weight_packed", "w2_weight_packed", "w13_weight_scale", "w2_weight_scale")


def pack_quantized(**changed: Any) -> dict[str, Any]:
    return scheme({**INT4, "group_size": 32, **changed}, None, "pack-quantized")


class Repacking(TritonMoE):
    """Holds the weights in a format of its own, here their copies. Named as a kernel like vLLM's own."""

    name = "marlin"

    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("repacking's",)

    def weight_layout(self, shape: Any) -> Any:
        return replace(super().weight_layout(shape), key="repacking's")

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        copies = {name: getattr(weights, name).clone() for name in ("gate_up", "down", "gate_up_scale", "down_scale")}
        return replace(weights, **copies)


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that the layers of a test are planned with, in order."""
    found: list[Any] = [Repacking()]
    builder = Builder("auto" if DEVICE == "cuda" else "h200")
    monkeypatch.setattr(builder, "_plan", lambda shape, hardware: LayerPlan(hardware, found, None))
    serve(monkeypatch, builder)
    return found


@pytest.fixture
def said() -> Iterator[list[str]]:
    with said_by_plugin(logging.WARNING) as found:
        yield found


def layer(group: int = 32, inter: int = INTER, seed: int = 0) -> MoEWeights:
    found = random_weights(MoEShape(EXPERTS, 1, HIDDEN, inter, f"int4-g{group}"), DEVICE, seed)
    scales = {name: getattr(found, name).to(HALF) for name in ("gate_up_scale", "down_scale")}
    return replace(found, **scales)


def given(tokens: int = 9, routing: str = "padded") -> Batch:
    found = batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, DEVICE, HALF)
    return Batch(found.hidden_states, found.topk_ids.masked_fill(found.topk_ids == EXPERTS, -1), found.topk_weights)


def experts(routed: Any) -> Any:
    return routed.quant_method.moe_kernel.fused_experts


def made(of: MoEWeights, **options: Any) -> Any:
    return experts_of(of, TOP_K, dtype=HALF, **{"compressed": pack_quantized(), **options})


@pytest.mark.parametrize("group", [32, 128])
def test_one_copy_in_the_kernels_format(group: int) -> None:
    of = layer(group)
    routed = made(of, compressed=pack_quantized(group_size=group))
    assert type(experts(routed)) is RampExperts
    assert experts(routed).layer.shape.dtype == f"int4-g{group}"
    for name in PACKED:
        assert getattr(routed, name).numel() == 0, "the loaded tensors are given up"
    assert all(t.gate_up.is_meta for t in experts(routed).layer.held)
    for tokens, routing in ((1, "uniform"), (17, "padded")):
        assert error(run(routed, given(tokens, routing)), reference(of, given(tokens, routing))) < TOLERANCE


@pytest.mark.parametrize("how", ["tp", "ep"])
def test_ranks_add_up(how: str) -> None:
    of, b, parts = layer(inter=2 * INTER if how == "tp" else INTER), given(17), []
    for rank in range(2):
        routed = made(of, **{how: (2, rank)})
        assert type(experts(routed)) is RampExperts
        parts.append(run(routed, b).float())
    assert all(part.any() for part in parts)
    assert error(sum(parts), reference(of, b)) < TOLERANCE


def test_weights_that_the_fastest_kernel_reads_as_they_were_loaded_stay(kernels: list[Any]) -> None:
    """Beside a kernel that repacks, which was slower."""
    kernels[:] = [TritonMoE(), Repacking()]
    of = layer()
    routed = made(of)
    (held,) = experts(routed).layer.held
    assert routed.w13_weight_packed.data_ptr() == held.gate_up.data_ptr()
    assert error(run(routed, given()), reference(of, given())) < TOLERANCE
    new = layer(seed=1)
    load(routed, new)  # into the live parameters, which the kernel reads
    assert error(run(routed, given()), reference(new, given())) < TOLERANCE


def test_without_a_kernel_that_repacks_vllms_experts_take_the_layer(kernels: list[Any], said: list[str]) -> None:
    """They may be faster than one that does not."""
    kernels[:] = [TritonMoE()]
    with pytest.MonkeyPatch.context() as patch:
        kept: list[Any] = []
        patch.setattr(
            CompressedTensorsWNA16MoEMethod, "process_weights_after_loading", lambda self, layer: kept.append(layer)
        )
        routed = made(layer())
    assert kept == [routed]
    assert routed.quant_method.experts_cls is not RampExperts
    assert routed.w13_weight_packed.numel() > 0
    assert "no kernel like them was compared (humming: " in said[-1]


def test_a_layer_whose_output_is_wrong_is_vllms(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """As of a nibble order that a kernel misreads."""

    def swapped(self: Any, weights: MoEWeights) -> MoEWeights:
        other = {name: (t := getattr(weights, name)) >> 4 | t << 4 for name in ("gate_up", "down")}
        return replace(weights, **other, gate_up_scale=weights.gate_up_scale.clone(),
                       down_scale=weights.down_scale.clone())  # fmt: skip

    monkeypatch.setattr(Repacking, "prepare", swapped)
    kept: list[Any] = []
    monkeypatch.setattr(
        CompressedTensorsWNA16MoEMethod, "process_weights_after_loading", lambda self, layer: kept.append(layer)
    )
    routed = made(layer())
    assert kept == [routed]
    assert routed.w13_weight_packed.numel() > 0, "vLLM still has the weights"
    assert said[-1].startswith("ramp_moe leaves experts to vLLM: marlin/")


@pytest.mark.parametrize("again", [False, True])
def test_reloaded_weights_take_their_place(again: bool) -> None:
    of, new = layer(), layer(seed=1)
    routed = made(of)
    before = experts(routed).layer.kernel("marlin")[1].gate_up.data_ptr()
    for _ in range(1 + again):
        with torch.device(DEVICE):
            initialize_layerwise_reload(routed)
            load(routed, new)
            finalize_layerwise_reload(routed, SimpleNamespace(dtype=HALF))
        assert error(run(routed, given()), reference(new, given())) < TOLERANCE
        assert routed.w13_weight_packed.numel() == 0
    after = experts(routed).layer.kernel("marlin")[1].gate_up.data_ptr()
    assert before == after, "captured graphs read there"


def test_half_a_reload_is_refused() -> None:
    routed = made(layer())
    routed.w13_weight_packed.data = layer(seed=1).gate_up.view(torch.int32)
    with pytest.raises(ShapeError, match="gate_up were loaded without the others"):
        run(routed, given())


def test_a_batch_that_no_kernel_computes_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own path has no weights that it could read."""
    routed = made(layer())

    def fail(*_: Any, **__: Any) -> None:
        raise KernelError("out of order")

    monkeypatch.setattr(experts(routed).layer, "forward", fail)
    with pytest.raises(KernelError, match="out of order"):
        run(routed, given())


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "zero points": ("INT4 weights have zero points", pack_quantized(symmetric=False)),
    "groups": ("INT4 scales are of groups of 64", pack_quantized(group_size=64)),
    "bits": ("packed weights have 8 bits", pack_quantized(num_bits=8)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_computes_is_vllms(case: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ramp_moe_adapters.frameworks.vllm.layer import DispatchedRoutedExperts

    reason, compressed = REFUSED[case]
    get, found = DispatchedRoutedExperts._get_quant_method, list[Any]()

    def noting(self: Any, *args: Any) -> Any:
        found.append(get(self, *args))
        raise KernelError("enough")

    monkeypatch.setattr(DispatchedRoutedExperts, "_get_quant_method", noting)
    with pytest.raises(KernelError, match="enough"):
        made(layer(), compressed=compressed)
    assert type(found[0]) is CompressedTensorsWNA16MoEMethod
    (line,) = said
    assert line.startswith(f"ramp_moe leaves experts to vLLM: {reason}")


def test_an_order_by_which_columns_were_only_quantised_is_none() -> None:
    assert type(experts(made(layer(), compressed=pack_quantized(actorder="weight")))) is RampExperts
