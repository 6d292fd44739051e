"""Experts for vLLM 0.33's modular kernel, computed by a dispatched layer. Needs vLLM.

If a batch fails, vLLM's own Triton path computes it. So the server goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.plugin import KernelError, MoEWeights
from ramp_moe.runtime.calibrated_plan import Calibrated
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.routed import forward_routed
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat, FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    create_fp8_quant_key,
    kFp8Dynamic128Sym,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from ...kernels.vllm_triton.launch import prepare
from ..engine_errors import both_failed, why
from ..engine_weights import LAYOUT, Parameters, Repacked
from . import recorder
from .stock import Stock

if TYPE_CHECKING:
    from torch import Tensor

    from .routing import KernelRouting

ACTIVATIONS = {MoEActivation.SILU: "swiglu", MoEActivation.GELU_TANH: "gelu_tanh"}
BLOCK_SCALES = [create_fp8_quant_key(static=True, group_shape=GroupShape(side, side)) for side in (128, 64, 32)]
"""Sides of a scale's block. If 128 does not divide a tensor-parallel shard, vLLM repeats scales for smaller blocks."""
PARAMETERS = {
    "w13_weight": "gate_up",
    "w2_weight": "down",
    "w13_weight_packed": "gate_up",
    "w2_weight_packed": "down",
    "w13_weight_scale_inv": "gate_up_scale",
    "w2_weight_scale_inv": "down_scale",
    "w13_weight_scale": "gate_up_scale",
    "w2_weight_scale": "down_scale",
    "w13_bias": "gate_up_bias",
    "w2_bias": "down_bias",
}
"""Names of vLLM's parameters, with the fields of MoEWeights that they become. Of several names, the last counts."""
logger = init_logger("vllm.ramp_moe")


def say(message: str, reason: str) -> None:
    """Log a warning, once per process and reason."""
    logger.warning_once(f"ramp_moe {message}: %s", reason)


class RampExperts(FusedMoEExpertsModular):  # type: ignore[misc]
    """This rank's experts of one layer. They compute the weighted sum over each token's experts of this rank.

    The modular kernel gives them hidden states that are not quantised.
    """

    layer: LayerRuntime
    """The layer of the loaded weights, which `take` sets."""
    local_ids: Tensor | None = None
    """int32 `[global experts + 1]`: by global id, the id on this rank, or -1 for experts of other ranks.

    The last entry is -1, too: the ids -1 and `global experts` refer to it. None without expert parallelism.
    """
    stock: Stock | None = None
    """vLLM's own path, if it keeps some batch sizes."""
    routing: KernelRouting | None = None
    """The layer's router, if kernels may choose the experts themselves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._asked = False
        """Whether `routing` was looked for."""
        self._failed: set[int] = set()
        """Batch sizes at which a batch has failed. In the capture of a graph, vLLM's Triton path computes them."""
        self._keeps: Callable[[int], bool] = lambda num_tokens: False
        """Whether vLLM's own path computes batches of this size."""

    def take(self, module: Any, parameters: Parameters | Repacked, calibrated: Calibrated | None = None) -> None:
        """Compute with the layer that was made from vLLM's parameters.

        module: has the parameters. calibrated: times of its shape, by which vLLM's own path may keep batch sizes.
        """
        self._module, self._parameters, self.layer = weakref.ref(module), parameters, parameters.layer
        self.local_ids = local_ids(module)
        recorder.take(self.moe_config)
        held = next((held for held in self.layer.held if held.layout == LAYOUT), None)
        if calibrated is not None and held is not None and calibrated.keeps_any:
            self._keeps, self.stock = cache(calibrated.keeps), Stock(self.moe_config, held)

    def load(self, module: Any) -> None:
        """Compute with what vLLM has loaded into its parameters since.

        Raises RampMoEError if it does not fit. The layer then computes no batch until fitting weights are loaded.
        """
        self._parameters.load(parameters_of(module))
        here = local_ids(module)
        if self.local_ids is not None and here is not None:
            self.local_ids.copy_(here)  # a server that sleeps may lose this memory, too

    @staticmethod
    def activation_format() -> Any:
        return FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @property
    def post_gemm2_hook(self) -> None:
        return None

    @post_gemm2_hook.setter
    def post_gemm2_hook(self, hook: Any) -> None:
        if hook is not None:
            raise KernelError("ramp_moe's experts run no hook before the weighted sum; unset RAMP_MOE_VLLM to have one")

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # the device of the weights decides, once they are loaded

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        if weight_key in BLOCK_SCALES:
            return bool(activation_key == kFp8Dynamic128Sym)
        return (weight_key, activation_key) in ((None, None), (kFp8StaticChannelSym, kFp8DynamicTokenSym))

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        """Whether tokens are gathered unchanged, or not at all, and experts do not move between ranks."""
        config = moe_parallel_config
        gathered = not config.use_all2all_kernels or config.use_ag_rs_all2all_kernels
        return gathered and not config.use_passthrough_all2all and not config.enable_eplb

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *rest: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of vLLM's two workspaces and of the output `[M, K]`.

        The workspaces are those of vLLM's own path if it keeps any size. Otherwise they are empty, since layers have a
        workspace of their own.
        """
        return ((0,), (0,), (M, K)) if self.stock is None else self.stock.workspace_shapes(M, N, K, *rest)

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
        """Compute a batch.

        output: `[T, H]`, which is written.
        hidden_states: bf16 or fp16 `[T, H]`.
        topk_ids: int32 or int64 `[T, k]`, global ids if there is an expert_map.
        topk_weights: `[T, k]` of any float dtype.
        apply_router_weight_on_input: whether hidden_states were multiplied by topk_weights already.

        Weights, scales and workspaces are the layer's own, but for batch sizes that vLLM's own path keeps.

        If a batch fails, vLLM's Triton path computes it, unless the weights are packed. Raises KernelError with both
        reasons if that fails, too.
        Raises RampMoEError if parameters were exchanged for others that do not fit, or if a reload failed.
        """
        self._parameters.meet(parameters_of(self._module()))
        if recorder.recording.current is not None:
            recorder.recording.current.sample(id(self), topk_ids, global_num_experts)
        if self.stock is not None and self._keeps(len(hidden_states)):
            self._parameters.check()
            self.stock.run(
                output, hidden_states, topk_weights, topk_ids, activation, global_num_experts, expert_map,
                workspace13, workspace2, apply_router_weight_on_input,
            )  # fmt: skip
            return
        if expert_map is not None:
            assert self.local_ids is not None
            topk_ids = self.local_ids[topk_ids]
        if self.routing is not None and (pending := self.routing.take(topk_ids, topk_weights)) is not None:
            x, ids, weights = hidden_states.contiguous(), pending.ids, pending.weights
            try:
                forward_routed(self.layer, x, pending.router, ids, weights, output)
                return
            except Exception as e:  # whatever a kernel raises
                say("leaves the routing of a batch to vLLM", why(e))
                self.routing.choose(pending)
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        batch = hidden_states.contiguous(), topk_ids.int().contiguous(), topk_weights.float().contiguous()
        if self._failed and len(hidden_states) in self._failed and _capturing(output):
            by_vllm(self._parameters.values(), *batch, output)
            return
        try:
            self.layer(*batch, out=output)
            # Afterwards, since a kernel that fails in this batch takes the prepared plans with it.
            if self._warm_up(len(hidden_states), hidden_states.dtype) and not apply_router_weight_on_input:
                self._warm_up_routing(topk_ids, topk_weights, hidden_states.dtype)
        except Exception as e:  # whatever a kernel raises; a server must not end by it
            if self.layer.shape.format.packed:
                raise  # vLLM's Triton path does not take them, and what others take is not held
            say("leaves a batch to vLLM's Triton path", why(e))
            self._failed.add(len(hidden_states))
            try:
                by_vllm(self._parameters.values(), *batch, output)
            except Exception as other:
                raise both_failed(e, "vLLM's Triton path", other) from e

    def _warm_up(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """Prepare the capture of a batch size, and say so. False if captures are over, or do not hold this size.

        vLLM runs each size once before its capture, on the stream of the capture. It locks its workspaces when all
        sizes are captured.
        """
        graphs, moe = self.layer.graphs, self.moe_config
        if graphs is None or not 0 < num_tokens <= moe.max_capture_size * moe.dp_size * moe.pcp_size:
            return False
        started = is_workspace_manager_initialized() and current_workspace_manager().is_locked()
        if started or torch.cuda.is_current_stream_capturing():
            return False
        graphs.prepare(num_tokens, dtype)
        self.layer.ready(num_tokens, dtype)
        return True

    def _warm_up_routing(self, topk_ids: Tensor, topk_weights: Tensor, dtype: torch.dtype) -> None:
        """Let the kernel choose the experts in captures of this size, if it does that as vLLM's router does."""
        try:
            if not self._asked:
                from .routing import KernelRouting  # names of vLLM's that another version may not have

                self._asked, self.routing = True, KernelRouting.of(self.layer, self._module())
            if self.routing is not None:
                self.routing.warm_up(topk_ids, topk_weights, dtype)
        except Exception as e:  # whatever is not as in the vLLM that is known: its router goes on
            self._asked = True
            say("leaves routing to vLLM", why(e))


def by_vllm(experts: MoEWeights, x: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> None:
    """Compute a batch with vLLM's Triton path.

    experts: with rows in vLLM's order.
    x: `[T, H]`.
    ids: int32 `[T, k]` of this rank's experts; those out of range are skipped.
    weights: float32 `[T, k]`.
    output: `[T, H]`, which is written.
    """
    prepared = prepare(experts)
    here = (ids >= 0) & (ids < len(experts.gate_up))
    # An id out of range becomes another of its token's: an expert that it does not visit could overflow for it.
    another = ids.masked_fill(~here, 0).amax(-1, keepdim=True)
    found = prepared.fused_experts(
        hidden_states=x,
        topk_weights=weights.masked_fill(~here, 0.0),
        topk_ids=ids.where(here, another),
        **prepared.arguments,
    )
    output.copy_(found.masked_fill(~here.any(-1, keepdim=True), 0.0))


def parameters_of(module: Any) -> dict[str, Tensor]:
    """vLLM's parameters of a module of routed experts, by field of MoEWeights."""
    found = module._parameters
    return {field: t for name, field in PARAMETERS.items() if (t := found.get(name)) is not None}


def local_ids(module: Any) -> Tensor | None:
    """Make `RampExperts.local_ids` from the module's expert_map; None without expert parallelism."""
    here = module.expert_map
    return None if here is None else torch.cat((here, here.new_full((1,), -1))).to(parameters_of(module)["down"].device)


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()
