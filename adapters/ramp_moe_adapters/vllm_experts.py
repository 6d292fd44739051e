"""The experts of vLLM 0.33, computed by dispatched layers: its class of routed experts, replaced through its registry
of such layers, and experts for its modular kernel. Needs vLLM.

vLLM loads the weights as for its Triton experts: gate rows first, fp8 with float32 scales of [128, 128] blocks, or of
smaller ones that divide a shard. Where a layer cannot be had of them, vLLM's own choice of experts takes them as if we
were not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from ramp_moe import KernelError, RampMoEError
from ramp_moe.device import MoELayer, MoEWeights
from ramp_moe.device.build import Builder
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat, FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    create_fp8_quant_key,
    kFp8Dynamic128Sym,
)
from vllm.model_executor.offloader import NoopOffloader, get_offloader
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

if TYPE_CHECKING:
    from torch import Tensor

NAME = "RoutedExperts"
"""Of the class that vLLM makes, in its registry of those that are replaced."""
ACTIVATIONS = {MoEActivation.SILU: "swiglu", MoEActivation.GELU_TANH: "gelu_tanh"}
SCALE = "weight_scale_inv"
"""What vLLM's parameters of block scales are called, after w13_ and w2_."""
BLOCK_SCALES = [create_fp8_quant_key(static=True, group_shape=GroupShape(side, side)) for side in (128, 64, 32)]
"""vLLM repeats the scales of 128 for smaller blocks, if those of 128 do not divide a tensor-parallel shard."""
CHECKPOINTS = {
    *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor"),
    *("runai_streamer", "mistral", "pt", "npcache", "dummy"),
}
"""Formats whose weights are as they were published, not converted for the experts that vLLM would take."""

_logger = init_logger("vllm.ramp_moe")
_builder = Builder()
"""Of all layers of the process: they share profiles and workspaces."""


class RampExperts(FusedMoEExpertsModular):  # type: ignore[misc]
    """This rank's experts of one layer, as vLLM's modular kernel runs them: it is given the hidden states unquantised,
    and returns the weighted sum over each token's experts that are here."""

    layer: MoELayer
    """Over the loaded weights; it shall be there before the first `apply`."""
    local_ids: Tensor | None = None
    """int32 `[global experts + 1]`, with expert parallelism: the id here, -1 for experts elsewhere and in the last
    place, where both -1 and the number of experts point."""

    @staticmethod
    def activation_format() -> Any:
        return FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # where the weights lie tells, once they do

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        quantised = weight_key in BLOCK_SCALES and activation_key == kFp8Dynamic128Sym
        return quantised or (weight_key, activation_key) == (None, None)

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        """With data parallelism only tokens that are gathered as they are; no experts that move between ranks."""
        config = moe_parallel_config
        gathered = not config.use_all2all_kernels or config.use_ag_rs_all2all_kernels
        return gathered and not config.use_passthrough_all2all and not config.enable_eplb

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        """None but the output `[M, K]`: layers have a workspace of their own."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write output `[T, H]` of hidden_states `[T, H]` bf16 or fp16, topk_ids int32 or int64 `[T, k]`, which are
        global where there is an expert_map, and topk_weights `[T, k]` of any float; they are in the hidden states
        already where apply_router_weight_on_input. Weights, scales and workspaces are the layer's own. Raises what
        `MoELayer.forward` does, and in a first batch that will be captured what `MoELayer.warm_up` does."""
        if expert_map is not None:
            assert self.local_ids is not None
            topk_ids = self.local_ids[topk_ids]
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        self._warm_up(len(hidden_states), hidden_states.dtype)
        routing = topk_ids.int().contiguous(), topk_weights.float().contiguous()
        self.layer(hidden_states.contiguous(), *routing, out=output)

    def _warm_up(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Before a batch size is captured. vLLM runs each once, on the stream of the capture, and locks its workspaces
        when all are captured."""
        graphs, moe = self.layer.graphs, self.moe_config
        if graphs is None or not 0 < num_tokens <= moe.max_capture_size * moe.dp_size * moe.pcp_size:
            return
        started = is_workspace_manager_initialized() and current_workspace_manager().is_locked()
        if not started and not torch.cuda.is_current_stream_capturing():
            graphs.prepare(num_tokens, dtype)
            self.layer.ready(num_tokens, dtype)


class _Dispatched:
    """Of a method of vLLM's: where a layer can be had of the weights that were loaded, the experts are ours."""

    backend: str
    """Attribute that says for which of vLLM's backends weights are converted."""
    unconverted: Any
    """That for which they are not."""
    experts_cls: Any
    moe_kernel: Any
    moe: Any

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises KernelError where weights are loaded once more: the kernels hold what they made of the first."""
        if self.experts_cls is RampExperts:
            raise KernelError("ramp_moe cannot load weights anew; unset RAMP_MOE_VLLM to do so")
        found = None if self.moe_kernel else _layer_of(layer, self.moe)
        if found is not None:
            self.experts_cls = RampExperts
            setattr(self, self.backend, self.unconverted)
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        if found is not None:
            experts, here = self.moe_kernel.fused_experts, layer.expert_map
            experts.layer = found
            if here is not None:
                experts.local_ids = torch.cat((here, here.new_full((1,), -1))).to(layer.w13_weight.device)


class DispatchedUnquantizedMethod(_Dispatched, UnquantizedFusedMoEMethod):  # type: ignore[misc]
    backend, unconverted = "unquantized_backend", UnquantizedMoeBackend.TRITON


class DispatchedFp8Method(_Dispatched, Fp8MoEMethod):  # type: ignore[misc]
    backend, unconverted = "fp8_backend", Fp8MoeBackend.TRITON


class DispatchedRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's routed experts, by one of the methods above where it fits."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        if reason := self._misfit(method, moe_config):
            _leave(reason)
            return method
        fp8 = isinstance(method, Fp8MoEMethod)
        ours = DispatchedFp8Method(method.quant_config, self) if fp8 else DispatchedUnquantizedMethod(moe_config)
        ours.supports_pre_processed_weights = False  # by nobody else, in the order that the layer holds them in
        return ours

    def _misfit(self, method: Any, moe: Any) -> str | None:
        """Why this is vLLM's own matter; None where it need not be."""
        if type(method) not in (UnquantizedFusedMoEMethod, Fp8MoEMethod):
            return f"{type(method).__name__} is not its unquantised or fp8 method"
        if moe.moe_backend != "auto":
            return f"the backend {moe.moe_backend} was asked for"
        if moe.in_dtype not in (torch.bfloat16, torch.float16):
            return f"activations are {moe.in_dtype}, not bf16 or fp16"
        if (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta) != (None, None, None):
            return "the activation has a limit, a slope or an offset of its own"
        if self.expert_map_manager.num_fused_shared_experts:
            return "shared experts are among the routed ones"
        config = get_current_vllm_config()
        if config.parallel_config.enable_elastic_ep:
            return "the ranks may change (elastic expert parallelism)"
        if config.load_config.load_format not in CHECKPOINTS:
            return f"weights that are loaded as {config.load_config.load_format} may have been converted already"
        if not isinstance(get_offloader(), NoopOffloader):
            return "weights are offloaded"
        keys = None, None
        if isinstance(method, Fp8MoEMethod):
            if method.moe_block_shape is None:
                return "fp8 weights have no block scales"
            shape = GroupShape(*method.moe_block_shape)
            keys = create_fp8_quant_key(static=True, group_shape=shape), kFp8Dynamic128Sym
        standard = FusedMoEActivationFormat.Standard
        return RampExperts.is_supported_config(RampExperts, moe, *keys, standard)[1]  # type: ignore[no-any-return]


def install() -> None:
    """Have vLLM make our routed experts instead of its own; not where somebody else's are made."""
    other = op_registry_oot.get(NAME)
    if other is None:
        PluggableLayer.register_oot(name=NAME)(DispatchedRoutedExperts)
    elif other is not DispatchedRoutedExperts:
        _leave(f"another plugin has replaced {NAME} by {other.__module__}.{other.__qualname__}")


def _leave(reason: str) -> None:
    _logger.warning_once("ramp_moe leaves experts to vLLM: %s", reason)


def _layer_of(layer: Any, moe: Any) -> MoELayer | None:
    """Of what was loaded, which the layer then holds alone; None, with a line in the log, where there can be none."""
    said = len(_builder.notes)
    try:
        found = _builder.layer(_weights(layer, moe), layer.top_k, moe.num_experts // moe.num_local_experts)
    except RampMoEError as e:
        _leave(str(e))
        return None
    for note in _builder.notes[said:]:
        _logger.warning("ramp_moe: %s", note)
    kernels, layouts = ", ".join(found.configs()), " and ".join(found.layouts)
    _logger.info_once("ramp_moe: %s by %s; weights in %s", found.shape.slug, kernels, layouts)
    held = found.held[0]
    moved = {"w13_weight": held.gate_up, f"w13_{SCALE}": held.gate_up_scale, "w13_bias": held.gate_up_bias}
    for name, tensor in moved.items():
        if tensor is not None:
            getattr(layer, name).data = tensor
    return found


def _weights(layer: Any, moe: Any) -> MoEWeights:
    """The layer's parameters themselves. Raises KernelError or ShapeError where they cannot be used."""
    padded = moe.hidden_dim, moe.intermediate_size_per_partition
    if padded != (moe.hidden_dim_unpadded, moe.intermediate_size_per_partition_unpadded):
        raise KernelError(f"vLLM has padded the weights to {padded[0]} and {padded[1]}")
    kind = layer.w13_weight.dtype
    if kind.itemsize > 1 and kind != moe.in_dtype:
        raise KernelError(f"weights are {kind}, activations {moe.in_dtype}")

    def of(name: str) -> Tensor | None:
        found = getattr(layer, name, None)
        return None if found is None else found.detach()

    gate_up, down = layer.w13_weight.detach(), layer.w2_weight.detach()
    scales, biases = (of(f"w13_{SCALE}"), of(f"w2_{SCALE}")), (of("w13_bias"), of("w2_bias"))
    return MoEWeights(gate_up, down, *scales, *biases, ACTIVATIONS[layer.activation])
