"""vLLM 0.33's own Triton experts on the weights that a layer holds, as vLLM would run them. Needs vLLM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.plugin import MoEWeights
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

from ...kernels.vllm_triton.launch import PACKAGE, quant_config

if TYPE_CHECKING:
    from torch import Tensor


class Stock:
    """Runs them with one launch sequence, vLLM's, and nothing beside it.

    moe: vLLM's configuration of the layer. weights: gate-first, which are read in place: what is written to them later
    is computed with.
    """

    def __init__(self, moe: Any, weights: MoEWeights) -> None:
        quantised = quant_config(weights, importlib.import_module(f"{PACKAGE}.config"))
        self._experts = TritonExperts(moe, quantised or FUSED_MOE_UNQUANTIZED_CONFIG)
        self._weights = weights

    def workspace_shapes(self, *sizes: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of vLLM's two workspaces and of the output, for the sizes that vLLM gives its experts."""
        found: tuple[tuple[int, ...], ...] = self._experts.workspace_shapes(*sizes)
        return found

    def run(
        self,
        output: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        apply_router_weight_on_input: bool = False,
    ) -> None:
        """Write output `[T, H]`; the arguments are those of `FusedMoEExpertsModular.apply`, hidden_states not quantised
        yet."""
        experts = self._experts
        x, scale = moe_kernel_quantize_input(
            hidden_states, None, experts.quant_dtype, experts.per_act_token_quant, experts.block_shape
        )
        experts.apply(
            output=output,
            hidden_states=x,
            w1=self._weights.gate_up,
            w2=self._weights.down,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            a1q_scale=scale,
            a2_scale=None,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_tokens_meta=None,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )

    def workspaces(self, num_tokens: int, top_k: int, activation: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two of its own, as vLLM would give for `num_tokens`."""
        experts, rows, hidden = self._weights.gate_up.shape
        sizes = (num_tokens, rows, hidden, top_k, experts, experts, None, activation)
        first, second, _ = self.workspace_shapes(*sizes)
        device = self._weights.gate_up.device
        return torch.empty(first, dtype=dtype, device=device), torch.empty(second, dtype=dtype, device=device)
