"""The plugin in the real vLLM 0.33: found by its loader, run by its modular kernel, against the float32 reference."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import H200, batch, error, expected, weights
from ramp_moe import KernelError
from ramp_moe.runtime.formats import dequantise
from ramp_moe.runtime.layer_factory import Builder, LayerPlan
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_kernels.triton.kernel import TritonMoE
from vllm import plugins
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm_cases import DEVICE, experts_of, run, said_by_plugin, serve

EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 128, 128
ROUTINGS = ("skewed", "few-experts", "one-expert", "padded", "duplicates")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""Triton's interpreter truncates where a GPU rounds to bf16."""
TOLERANCE = 2e-2


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    """By vLLM's own loader where ramp-moe is installed, twice, as in a process that loads plugins more than once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        if any(e.name == "ramp_moe" for e in metadata.entry_points(group=plugins.DEFAULT_PLUGINS_GROUP)):
            patch.setattr(plugins, "plugins_loaded", False)
            plugins.load_general_plugins()
        else:
            plugin.register()
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture(autouse=True)
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    return serve(monkeypatch).builder


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Our warnings, through vLLM's logger."""
    with said_by_plugin(logging.WARNING) as found:
        yield found


def layer(dtype: str = "half", inter: int = INTER, **options: Any) -> MoEWeights:
    dtype = {"half": "bf16" if torch.bfloat16 == HALF else "fp16"}.get(dtype, dtype)
    return weights(EXPERTS, HIDDEN, inter, dtype, DEVICE, **options)


def given(tokens: int, routing: str, top_k: int = TOP_K, dtype: torch.dtype = HALF) -> Batch:
    """With ids of -1 alone among those to skip: all that vLLM has."""
    found = batch(tokens, top_k, EXPERTS, HIDDEN, routing, DEVICE, dtype)
    return Batch(found.hidden_states, found.topk_ids.masked_fill(found.topk_ids == EXPERTS, -1), found.topk_weights)


def wanted(of: MoEWeights, b: Batch) -> torch.Tensor:
    return expected(of, b, quantise=of.gate_up_scale is not None)


def experts(routed: Any) -> Any:
    return routed.quant_method.moe_kernel.fused_experts


def test_vllm_makes_ours() -> None:
    from ramp_moe_adapters.frameworks.vllm.experts import RampExperts
    from ramp_moe_adapters.frameworks.vllm.layer import DispatchedRoutedExperts

    assert op_registry_oot == {"RoutedExperts": DispatchedRoutedExperts}
    routed = experts_of(layer(), TOP_K, dtype=HALF)
    assert isinstance(routed, RoutedExperts)
    assert type(routed) is DispatchedRoutedExperts
    assert type(experts(routed)) is RampExperts
    assert experts(routed).layer.shape == layer().shape(TOP_K)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_computed(dtype: str, routing: str) -> None:
    of = layer(dtype)
    routed = experts_of(of, TOP_K, dtype=HALF)
    assert experts(routed).layer is not None, "not vLLM's own experts"
    for tokens in (1, 17):
        b = given(tokens, routing)
        before = b.hidden_states.clone()
        out = run(routed, b)
        assert out.dtype == HALF
        assert error(out, wanted(of, b)) < TOLERANCE
        assert torch.equal(b.hidden_states, before)


def test_bf16() -> None:
    of, b = layer("bf16"), given(9, "skewed", dtype=torch.bfloat16)
    assert error(run(experts_of(of, TOP_K), b), wanted(of, b)) < TOLERANCE


def test_ids_of_64_bits() -> None:
    of, b = layer(), given(9, "padded")
    wide = SimpleNamespace(**{**vars(b), "topk_ids": b.topk_ids.long()})
    assert error(run(experts_of(of, TOP_K, dtype=HALF), wide), wanted(of, b)) < TOLERANCE


@pytest.mark.parametrize("how", ["tp", "ep"])
@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_ranks_add_up(dtype: str, how: str) -> None:
    """Each with its part of the weights, by vLLM's loader; with expert parallelism ids of the other are skipped."""
    inter = 2 * INTER if how == "tp" else INTER
    of, b, parts = layer(dtype, inter), given(17, "padded"), []
    for rank in range(2):
        routed = experts_of(of, TOP_K, dtype=HALF, **{how: (2, rank)})
        shape = experts(routed).layer.shape
        assert (shape.num_experts, shape.intermediate_size) == (4 if how == "ep" else EXPERTS, INTER)
        assert experts(routed).layer.ep_size == (2 if how == "ep" else 1)
        parts.append(run(routed, b).float())
    assert all(part.any() for part in parts)
    assert error(sum(parts), wanted(of, b)) < TOLERANCE


def test_expert_parallelism_with_nothing_here() -> None:
    of, b = layer(), given(5, "one-expert")
    mine = Batch(b.hidden_states, torch.full_like(b.topk_ids, 1), b.topk_weights)
    assert not run(experts_of(of, TOP_K, ep=(2, 1), dtype=HALF), mine).any()


def test_biases_and_gelu() -> None:
    of, b = layer(activation="gelu_tanh", bias=True), given(17, "skewed")
    assert error(run(experts_of(of, TOP_K, dtype=HALF), b), wanted(of, b)) < TOLERANCE


def test_router_weights_on_the_input() -> None:
    of, b = layer(), given(17, "skewed", top_k=1)
    routed = experts_of(of, 1, dtype=HALF, apply_router_weight_on_input=True)
    b = Batch(b.hidden_states, b.topk_ids, torch.rand_like(b.topk_weights))
    weighted = (b.hidden_states * b.topk_weights.to(HALF)).contiguous()
    ones = Batch(weighted, b.topk_ids, torch.ones_like(b.topk_weights))
    assert error(run(routed, b), wanted(of, ones)) < TOLERANCE


class Interleaved(TritonMoE):
    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("gate-up-interleaved-8",)


@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_weights_in_another_order_take_the_place_of_vllms(
    dtype: str, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_plan", lambda shape, hardware: LayerPlan(hardware, [Interleaved()], None))
    of, b = layer(dtype, bias=dtype == "half"), given(17, "skewed")
    routed = experts_of(of, TOP_K, dtype=HALF)
    (held,) = experts(routed).layer.held
    assert held.layout == "gate-up-interleaved-8"
    assert routed.w2_weight.data_ptr() == held.down.data_ptr()
    assert routed.w13_weight.weight_loader
    moved = {"w13_weight": of.gate_up, "w13_weight_scale_inv": of.gate_up_scale, "w13_bias": of.gate_up_bias}
    for name, tensor in moved.items():
        if tensor is not None:
            assert isinstance(getattr(routed, name), Placeholder), "there is one copy"
            assert error(getattr(routed, name).float(), tensor.float()) < 1e-3, "it reads as vLLM's"
    assert error(run(routed, b), wanted(of, b)) < TOLERANCE


def test_weights_in_vllms_order_stay_where_they_are() -> None:
    routed = experts_of(layer(), TOP_K, dtype=HALF)
    (held,) = experts(routed).layer.held
    if held.layout == "gate-first":
        assert routed.w13_weight.data_ptr() == held.gate_up.data_ptr()
    assert routed.w2_weight.data_ptr() == held.down.data_ptr()


MISFITS: dict[str, tuple[str, dict[str, Any]]] = {
    "asked": ("the backend triton was asked for", {"moe_options": {"moe_backend": "triton"}}),
    "limit": ("the activation has a limit", {"moe_options": {"swiglu_limit": 7.0}}),
    "balanced": ("kernel does not support parallel config", {"parallel_options": {"enable_eplb": True}}),
    "converted": ("weights that are loaded as sharded_state may have been", {"load_format": "sharded_state"}),
    "lora": ("kernel does not support LoRA", {"moe_options": {"is_lora_enabled": True}}),
    "float32": (r"activations are torch.float32, not bf16 or fp16", {"dtype": torch.float32}),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_vllms(case: str, said: list[str]) -> None:
    reason, options = MISFITS[case]
    for _ in range(2):
        routed = experts_of(layer(), TOP_K, **{"dtype": HALF, **options})
        assert isinstance(experts(routed), TritonExperts)
    (line,) = said
    assert line.startswith(f"ramp_moe leaves experts to vLLM: {reason}")


@pytest.mark.parametrize("dtype", ["half", "fp8"])
def test_without_a_layer_vllms_path_is_whole(
    dtype: str, builder: Builder, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise KernelError("no kernel can compute it")

    monkeypatch.setattr(builder, "layer", refuse)
    of = layer(dtype)
    for _ in range(2):
        routed = experts_of(of, TOP_K, dtype=HALF)
        assert isinstance(experts(routed), TritonExperts)
        assert torch.equal(routed.w13_weight.float(), of.gate_up.float())
        assert routed.quant_method.experts_cls is TritonExperts
    assert said == ["ramp_moe leaves experts to vLLM: no kernel can compute it"]


def test_fewer_experts_here_than_a_token_visits(said: list[str]) -> None:
    routed = experts_of(layer(), TOP_K, ep=(8, 3), dtype=HALF)
    assert isinstance(experts(routed), TritonExperts)
    assert said == ["ramp_moe leaves experts to vLLM: top_k 2 exceeds num_experts 1"]


def dequantised(of: MoEWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 gate and up `[E, 2, I, H]`, down transposed `[E, 1, I, H]`."""
    apart, block = (2, -1), of.scale_block
    assert block is not None
    assert of.gate_up_scale is not None
    assert of.down_scale is not None
    gate_up = dequantise(of.gate_up.unflatten(1, apart), of.gate_up_scale.unflatten(1, apart), block)
    return gate_up, dequantise(of.down, of.down_scale, block).mT[:, None]


@pytest.mark.parametrize(("inter", "ranks", "block"), [(384, 2, 64), (128, 2, 64), (384, 4, 32)])
def test_fp8_of_shards_that_begin_inside_a_block(inter: int, ranks: int, block: int) -> None:
    """vLLM repeats the scales for blocks that divide the shard; the ranks' outputs add up to the whole layer's."""
    of, b = weights(4, HIDDEN, inter, "fp8", DEVICE), batch(5, TOP_K, 4, HIDDEN, "skewed", DEVICE, HALF)
    total = torch.zeros(b.hidden_states.shape, device=DEVICE)
    for rank in range(ranks):
        routed = experts_of(of, TOP_K, tp=(ranks, rank), dtype=HALF)
        held = relayout(experts(routed).layer.held[0], "gate-first")
        assert held.scale_block == block
        for here, whole in zip(dequantised(held), dequantised(of), strict=True):
            assert torch.equal(here, whole[:, :, inter // ranks * rank :][:, :, : inter // ranks])
        total += run(routed, b).float()
    assert error(total, wanted(of, b)) < 3 * TOLERANCE  # activations are rounded in smaller groups


def test_a_batch_of_a_shard_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own path takes it, with the smaller blocks."""
    of, b = weights(4, HIDDEN, 384, "fp8", DEVICE), batch(5, TOP_K, 4, HIDDEN, "skewed", DEVICE, HALF)
    given = []

    def fused_experts(
        hidden_states: Any, topk_weights: Any, topk_ids: Any, w1: Any, w2: Any, activation: Any, quant_config: Any
    ) -> torch.Tensor:
        given.append(quant_config)
        return torch.ones_like(hidden_states)

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("vllm.model_executor.layers.fused_moe.fused_experts", fused_experts)
    routed = experts_of(of, TOP_K, tp=(2, 1), dtype=HALF)
    monkeypatch.setattr(experts(routed).layer, "forward", failing)
    run(routed, b)
    (scales,) = given
    assert scales.block_shape == [64, 64]
    assert scales.w1_scale.shape == (4, 6, 2)


def test_fp8_that_vllm_itself_refuses() -> None:
    with pytest.raises(ValueError, match="80 is not divisible by weight quantization block_n = 128"):
        experts_of(weights(4, HIDDEN, 160, "fp8", DEVICE), TOP_K, tp=(2, 0), dtype=HALF)


def test_another_plugin_is_left_alone(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op_registry_oot, "RoutedExperts", Interleaved)
    plugin.register()
    assert op_registry_oot["RoutedExperts"] is Interleaved
    (line,) = said
    assert "another plugin has replaced RoutedExperts by test_vllm_plugin.Interleaved" in line


def test_nobody_else_has_weights_in_the_order_of_the_layer() -> None:
    routed = experts_of(layer(), TOP_K, dtype=HALF)
    assert not routed.quant_method.supports_pre_processed_weights


@pytest.mark.skipif(DEVICE == "cuda", reason="of what is there")
def test_batches_that_will_be_captured_are_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until vLLM has captured its graphs, and locks its workspaces."""
    from vllm.v1.worker.workspace import current_workspace_manager

    routed, warm = experts_of(layer(), TOP_K, dtype=HALF), []
    graphs = SimpleNamespace(prepare=lambda *a: warm.append(a), ready=lambda *a: warm.append(a))
    monkeypatch.setattr(experts(routed).layer, "graphs", graphs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for tokens in (8, 513):
        run(routed, given(tokens, "skewed"))
    monkeypatch.setattr(current_workspace_manager(), "_locked", True)
    run(routed, given(4, "skewed"))
    assert warm == [(8, HALF)] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="of what is there")
def test_the_warm_up_follows_the_batch_that_may_drop_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared before the batch would be gone when the size is captured."""
    routed, plans = experts_of(layer(), TOP_K, dtype=HALF), set[int]()
    graphs = SimpleNamespace(prepare=lambda n, _: plans.add(n), ready=lambda *_: None)
    monkeypatch.setattr(experts(routed).layer, "graphs", graphs)
    monkeypatch.setattr(experts(routed).layer, "forward", lambda *_, **__: plans.clear())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    run(routed, given(8, "skewed"))
    assert plans == {8}


def test_the_hardware_is_that_of_the_profiles() -> None:
    assert experts(experts_of(layer(), TOP_K, dtype=HALF)).layer.hardware == H200


# --- What vLLM says of a layer that ramp_moe does not compute --------------------------------------------------------

UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "clamp": ("the argument swiglu_limit is 7.0", {"swiglu_limit": 7.0}),
    "situ": ("FusedMoEConfig.activation_situ_beta is 2.0", {"moe_options": {"activation_situ_beta": 2.0}}),
    "padding": ("FusedMoEConfig.tp_shard_with_padding is True", {"moe_options": {"tp_shard_with_padding": True}}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_values_that_are_not_computed_are_vllms(case: str, said: list[str]) -> None:
    reason, options = UNKNOWN[case]
    routed = experts_of(layer(), TOP_K, dtype=HALF, **options)
    assert isinstance(experts(routed), TritonExperts)
    assert said == [f"ramp_moe leaves experts to vLLM: {reason}"]


def test_a_finalisation_that_is_deferred_after_construction_is_vllms(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """As models ask for it once their layers are made: for the experts that vLLM chose."""
    from ramp_moe_adapters.frameworks.vllm.method import DispatchedUnquantizedMethod

    create = DispatchedUnquantizedMethod.create_weights

    def deferring(self: Any, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        self.moe.defer_moe_finalize()

    monkeypatch.setattr(DispatchedUnquantizedMethod, "create_weights", deferring)
    assert isinstance(experts(experts_of(layer(), TOP_K, dtype=HALF)), TritonExperts)
    assert said == ["ramp_moe leaves experts to vLLM: FusedMoEConfig._defer_moe_finalize is True"]


def test_a_field_that_a_newer_version_adds(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    from ramp_moe_adapters.frameworks.vllm import fields as vllm_fields

    for table, field in ((vllm_fields.LAYER, "max_num_tokens"), (vllm_fields.CONSTRUCTOR, "scoring_func")):
        with monkeypatch.context() as patch:
            patch.delitem(table, field)  # as if it were new
            assert not isinstance(experts(experts_of(layer(), TOP_K, dtype=HALF)), TritonExperts), "its default is fine"
            options: Any = {"moe_options": {field: 9}} if table is vllm_fields.LAYER else {field: "sigmoid"}
            assert isinstance(experts(experts_of(layer(), TOP_K, dtype=HALF, **options)), TritonExperts)
    assert [line for line in said if "leaves experts" in line] == [
        "ramp_moe leaves experts to vLLM: FusedMoEConfig.max_num_tokens is 9, which ramp_moe does not know",
        "ramp_moe leaves experts to vLLM: the argument scoring_func is 'sigmoid', which ramp_moe does not know",
    ]


def test_experts_that_are_called_otherwise_are_not_replaced(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular

    def apply(self: Any, output: Any, *, swizzle: bool) -> None: ...

    monkeypatch.delitem(op_registry_oot, "RoutedExperts")
    monkeypatch.setattr(FusedMoEExpertsModular, "apply", apply)
    plugin.register()
    assert "RoutedExperts" not in op_registry_oot
    (line,) = said
    assert "this version's experts are called with other arguments" in line
    assert "swizzle" in line


def test_a_hook_before_the_sum_is_an_error() -> None:
    found = experts(experts_of(layer(), TOP_K, dtype=HALF))
    assert found.post_gemm2_hook is None
    with pytest.raises(KernelError, match="run no hook before the weighted sum; unset RAMP_MOE_VLLM"):
        found.post_gemm2_hook = lambda *_: None


# --- What fails ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights that vLLM's Triton path is called with, which the plain reference computes here."""
    import fake_vllm
    from ramp_moe_adapters.kernels.vllm_triton import launch as vllm_triton_launch
    from vllm.model_executor.layers import fused_moe

    fake, calls = fake_vllm.FakeVllm(), []

    def fused_experts(
        hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any, quant_config: Any
    ) -> Any:
        calls.append(w1)
        ours = None
        if quant_config is not None:
            biases = {"w1_bias": quant_config.w1_bias, "w2_bias": quant_config.w2_bias}
            scales = {"w1_scale": quant_config.w1_scale, "w2_scale": quant_config.w2_scale}
            ours = fake_vllm.QuantConfig(**biases, **scales, block_shape=quant_config.block_shape)
        named = fake_vllm.MoEActivation[activation.name]
        return fake.fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, named, quant_config=ours)

    assert fused_moe.__name__ == vllm_triton_launch.PACKAGE
    monkeypatch.setattr(fused_moe, "fused_experts", fused_experts)
    return calls


RAISED = (RuntimeError("CUDA error"), torch.OutOfMemoryError("no memory"), KernelError("no kernel is left"))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is vLLM's own path there")
@pytest.mark.parametrize("raised", RAISED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kernel", [TritonMoE, Interleaved])
def test_a_batch_that_fails_is_computed_by_vllm(
    kernel: type[TritonMoE], raised: Exception, builder: Builder, monkeypatch: pytest.MonkeyPatch, vllms: list[Any],
    said: list[str],
) -> None:  # fmt: skip
    """From weights in its order, whatever was raised; with one line in the log. The next batch is ramp_moe's."""
    monkeypatch.setattr(builder, "_plan", lambda shape, hardware: LayerPlan(hardware, [kernel()], None))
    of, b = layer("fp8"), given(9, "padded")
    routed = experts_of(of, TOP_K, dtype=HALF)

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(type(experts(routed).layer), "forward", fail)
        for _ in range(2):
            assert error(run(routed, b), wanted(of, b)) < TOLERANCE
    assert len(vllms) == 2
    assert all(torch.equal(w1.float(), of.gate_up.float()) for w1 in vllms)
    (line,) = said
    assert line.startswith("ramp_moe leaves a batch to vLLM's Triton path: ")
    assert line.endswith(str(raised))
    assert error(run(routed, b), wanted(of, b)) < TOLERANCE
    assert len(vllms) == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="there is vLLM's own path there")
def test_ranks_of_expert_parallelism_that_fail(monkeypatch: pytest.MonkeyPatch, vllms: list[Any]) -> None:
    of, b, parts = layer(bias=True), given(9, "padded"), []
    for rank in range(2):
        routed = experts_of(of, TOP_K, dtype=HALF, ep=(2, rank))
        monkeypatch.setattr(experts(routed).layer, "forward", lambda *_, **__: 1 / 0)
        parts.append(run(routed, b).float())
    assert error(sum(parts), wanted(of, b)) < TOLERANCE
    assert len(vllms) == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="there is vLLM's own path there")
def test_a_skipped_id_visits_no_other_expert_by_vllm(monkeypatch: pytest.MonkeyPatch, vllms: list[Any]) -> None:
    """Expert 0 would overflow for any token. None visits it, although ids out of range are computed at weight 0."""
    of, b = layer(), given(9, "padded")
    of.gate_up[0] = torch.inf
    ids = b.topk_ids.where(b.topk_ids != 0, 1)
    assert ((ids < 0) & (ids.amax(-1, keepdim=True) > 0)).any(), "some token skips one id and has another"
    b = dataclasses.replace(b, topk_ids=ids)
    routed = experts_of(of, TOP_K, dtype=HALF)
    monkeypatch.setattr(experts(routed).layer, "forward", lambda *_, **__: 1 / 0)
    assert error(run(routed, b), wanted(of, b)) < TOLERANCE
    assert vllms


def test_both_reasons_are_told_if_vllm_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import fused_moe

    routed = experts_of(layer(), TOP_K, dtype=HALF)
    monkeypatch.setattr(experts(routed).layer, "forward", lambda *_, **__: 1 / 0)

    def fail(hidden_states: Any, topk_weights: Any, topk_ids: Any, w1: Any, w2: Any, activation: Any,
             quant_config: Any) -> None:  # fmt: skip
        raise RuntimeError("theirs")

    monkeypatch.setattr(fused_moe, "fused_experts", fail)
    with pytest.raises(KernelError, match=r"ZeroDivisionError.*vLLM's Triton path after it \(RuntimeError: theirs"):
        run(routed, given(3, "skewed"))


@pytest.mark.parametrize("raised", RAISED, ids=lambda e: type(e).__name__)
def test_a_layer_that_cannot_be_made_is_vllms(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, said: list[str], raised: Exception
) -> None:
    def refuse(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(builder, "layer", refuse)
    assert isinstance(experts(experts_of(layer(), TOP_K, dtype=HALF)), TritonExperts)
    (line,) = said
    assert line.endswith(str(raised))


@pytest.mark.skipif(DEVICE == "cuda", reason="of what is there")
def test_shared_experts_run_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On vLLM's other stream, from before the routed ones begin until they end, as beside its own experts."""
    from vllm.model_executor.layers.fused_moe.runner import shared_experts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder

    routed = experts_of(layer(), TOP_K, dtype=HALF)
    monkeypatch.setattr(shared_experts, "aux_stream", lambda: object())
    monkeypatch.setattr(torch.cuda, "Event", object)
    overlaps = lambda: routed.quant_method.mk_can_overlap_shared_experts  # noqa: E731 - as vLLM's runner has it
    shared = SharedExperts(torch.nn.Identity(), routed.moe_config, False, overlaps)
    x = given(8, "skewed").hidden_states
    assert shared._determine_shared_experts_order(x) is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
