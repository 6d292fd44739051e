"""Checkpoints in other formats than bf16 and vLLM's own fp8, in the real vLLM 0.33, against the float32 reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, error
from ramp_moe import MoEShape
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_adapters.frameworks.vllm.experts import RampExperts
from ramp_moe_adapters.frameworks.vllm.methods import METHODS
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm_cases import DEVICE, experts_of, run, said_by_plugin, scheme, serve

EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 128, 128
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""Triton's interpreter truncates where a GPU rounds to bf16."""
TOLERANCE = 2e-2
FP8 = {"num_bits": 8, "type": "float"}
CHANNEL = scheme({**FP8, "strategy": "channel"}, {**FP8, "strategy": "token"}, "float-quantized")
BLOCK = scheme(
    {**FP8, "strategy": "block", "block_structure": [128, 128]},
    {**FP8, "strategy": "group", "group_size": 128},
    "float-quantized",
)
SCHEMES = {"fp8-channel": CHANNEL, "fp8": BLOCK}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    return serve(monkeypatch)


@pytest.fixture
def said() -> Iterator[list[str]]:
    with said_by_plugin(logging.WARNING) as found:
        yield found


def layer(name: str, inter: int = INTER) -> MoEWeights:
    return random_weights(MoEShape(EXPERTS, 1, HIDDEN, inter, name), DEVICE, 0)


def given(tokens: int, routing: str) -> Batch:
    found = batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, DEVICE, HALF)
    return Batch(found.hidden_states, found.topk_ids.masked_fill(found.topk_ids == EXPERTS, -1), found.topk_weights)


def experts(routed: Any) -> Any:
    return routed.quant_method.moe_kernel.fused_experts


@pytest.mark.parametrize("name", SCHEMES)
def test_computed(name: str) -> None:
    of = layer(name)
    routed = experts_of(of, TOP_K, dtype=HALF, compressed=SCHEMES[name])
    assert type(experts(routed)) is RampExperts
    assert experts(routed).layer.shape.dtype == name
    for tokens, routing in ((1, "uniform"), (17, "padded")):
        b = given(tokens, routing)
        assert error(run(routed, b), reference(of, b, "fp8")) < TOLERANCE


@pytest.mark.parametrize("how", ["tp", "ep"])
@pytest.mark.parametrize("name", SCHEMES)
def test_ranks_add_up(name: str, how: str) -> None:
    """Each with its part of the weights, by vLLM's loader."""
    of, b = layer(name, 2 * INTER if how == "tp" else INTER), given(17, "padded")
    parts = []
    for rank in range(2):
        routed = experts_of(of, TOP_K, dtype=HALF, compressed=SCHEMES[name], **{how: (2, rank)})
        assert type(experts(routed)) is RampExperts
        parts.append(run(routed, b).float())
    assert all(part.any() for part in parts)
    # A shard rounds its intermediates by scales of its own.
    assert error(sum(parts), reference(of, b, "fp8")) < (3 if how == "tp" else 1) * TOLERANCE


def test_scales_stay_where_vllm_loaded_them() -> None:
    routed = experts_of(layer("fp8-channel"), TOP_K, dtype=HALF, compressed=CHANNEL)
    (held,) = experts(routed).layer.held
    assert routed.w2_weight_scale.data_ptr() == held.down_scale.data_ptr()
    assert routed.w2_weight.data_ptr() == held.down.data_ptr()


MATRIX = {**FP8, "strategy": "tensor"}
ODD = {**FP8, "strategy": "block", "block_structure": [64, 128]}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("fp8 weights have a scale for each matrix", scheme(MATRIX, MATRIX, "float-quantized")),
    "static": ("activations have scales", scheme(MATRIX, {**MATRIX, "dynamic": False}, "float-quantized")),
    "blocks": (
        "fp8 scales are of blocks [64, 128]",
        scheme(ODD, {**FP8, "strategy": "group", "group_size": 128}, "float-quantized"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_computes_is_vllms(case: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ramp_moe_adapters.frameworks.vllm.layer import DispatchedRoutedExperts

    reason, compressed = REFUSED[case]
    made: list[Any] = []
    monkeypatch.setattr(DispatchedRoutedExperts, "_get_quant_method", _noting(made))
    with pytest.raises(_Enough):
        experts_of(layer("fp8"), TOP_K, dtype=HALF, compressed=compressed)
    assert type(made[0]).__module__.startswith("vllm.")
    (line,) = said
    assert line.startswith(f"ramp_moe leaves experts to vLLM: {reason}")


class _Enough(Exception):
    """The method is known; the weights of the case are of another format."""


def _noting(made: list[Any]) -> Any:
    from ramp_moe_adapters.frameworks.vllm.layer import DispatchedRoutedExperts

    get = DispatchedRoutedExperts._get_quant_method

    def noting(self: Any, *args: Any) -> Any:
        made.append(get(self, *args))
        raise _Enough

    return noting


@pytest.mark.skipif(DEVICE == "cuda", reason="there is vLLM's own path there")
def test_a_batch_that_fails_goes_to_vllm_with_the_scales_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    configurations = []

    def fused_experts(
        hidden_states: Any, topk_weights: Any, topk_ids: Any, w1: Any, w2: Any, activation: Any, quant_config: Any
    ) -> torch.Tensor:
        configurations.append(quant_config)
        return torch.ones_like(hidden_states)

    monkeypatch.setattr("vllm.model_executor.layers.fused_moe.fused_experts", fused_experts)
    routed = experts_of(layer("fp8-channel"), TOP_K, dtype=HALF, compressed=CHANNEL)
    monkeypatch.setattr(experts(routed).layer, "forward", lambda *_, **__: 1 / 0)
    run(routed, given(5, "skewed"))
    (found,) = configurations
    assert (found.per_act_token_quant, found.per_out_ch_quant, found.block_shape) == (True, True, None)
    assert found.w1_scale.shape == (EXPERTS, 2 * INTER, 1)


def test_without_a_layer_vllms_path_is_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.builder, "layer", lambda *_: 1 / 0)
    of = layer("fp8-channel")
    routed = experts_of(of, TOP_K, dtype=HALF, compressed=CHANNEL)
    assert isinstance(experts(routed), TritonExperts)
    assert torch.equal(routed.w13_weight.float(), of.gate_up.float())
    assert torch.equal(routed.w13_weight_scale, of.gate_up_scale)


@pytest.mark.parametrize("ours", METHODS.values(), ids=lambda ours: ours.__name__)
def test_no_attribute_of_ours_hides_one_of_a_module(ours: type) -> None:
    """Some methods of vLLM are modules, whose own attributes are found before methods of the class."""
    named = {name for cls in ours.__mro__ if cls.__module__.startswith("ramp_moe") for name in vars(cls)}
    assert "_held" in named
    assert not named & set(vars(torch.nn.Module()))
