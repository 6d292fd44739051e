"""Leaves the choice of experts to the kernel that computes them: one launch fewer around each layer of a graph.

vLLM's router runs before the experts. In a captured graph of a size that one kernel routes itself, the router is asked
for nothing: it returns empty ids and weights, and the experts are given the logits. Needs vLLM 0.33.

A size is routed so only after it was tried outside of captures. The kernel then chose the experts of random logits as
vLLM's operator does, and computed the same output.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import vllm._custom_ops as ops
from ramp_moe.plugin import Batch, KernelError, RouterLogits
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.routed import forward_routed, routing_candidate
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter, _get_padding_mask

from . import recorder

SCORINGS = {"softmax": ops.topk_softmax, "sigmoid": ops.topk_sigmoid}
WEIGHTS_APART, OUTPUTS_APART = 1e-5, 1e-2
"""How far weights, relative to each, and outputs, relative to their norm, may lie from those with vLLM's router."""
_tried: dict[Hashable, str | None] = {}
"""Why a size is not routed by a kernel, by what that depends on; None if it is. Layers of a model are alike."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch whose experts are still to be chosen. ids int32 and weights float32 `[T, k]` are not written yet."""

    router: RouterLogits
    ids: Tensor
    weights: Tensor
    hidden_states: Tensor


class KernelRouting:
    """The router of one layer of vLLM, which may leave batches to the kernel."""

    def __init__(self, layer: LayerRuntime, router: Any) -> None:
        self._layer, self._router, self._select = layer, router, router.select_experts
        self._pending: Pending | None = None
        self._logits: torch.dtype | None = None
        """Dtype of the logits that the router was last given."""
        self._passed: tuple[int, int] | None = None
        """Addresses of the ids and weights that the router last returned."""
        self._sizes = set[int]()

    @classmethod
    def of(cls, layer: LayerRuntime, module: Any) -> KernelRouting | None:
        """Take the router of a module of routed experts; None if its experts are chosen in a way that no kernel has.

        Call it while vLLM runs the module.
        """
        if not is_forward_context_available() or layer.ep_size > 1 or module.expert_map is not None:
            return None
        runner: Any = get_forward_context().no_compile_layers.get(module.layer_name)
        router: Any = getattr(runner, "router", None)
        prepare = getattr(getattr(module.quant_method, "moe_kernel", None), "prepare_finalize", None)
        if getattr(runner, "routed_experts", None) is not module or type(router) is not FusedTopKRouter:
            return None
        if type(prepare) is not MoEPrepareAndFinalizeNoDPEPModular or "select_experts" in vars(router):
            return None
        if router.scoring_func not in SCORINGS or router.top_k != layer.shape.top_k:
            return None
        found = cls(layer, router)
        router.select_experts = found.select
        return found

    def select(self, hidden_states: Tensor, router_logits: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """vLLM's weights and ids `[T, k]`; empty ones, for `take`, if the kernel routes the batch."""
        self._pending, tokens = None, len(hidden_states)
        if tokens in self._sizes and self._plain(router_logits) and torch.cuda.is_current_stream_capturing():
            shape = tokens, self._router.top_k
            ids = torch.empty(shape, dtype=torch.int32, device=hidden_states.device)
            weights = torch.empty(shape, dtype=torch.float32, device=hidden_states.device)
            router = self._given(router_logits, _get_padding_mask(tokens))
            self._pending = Pending(router, ids, weights, hidden_states)
            return weights, ids
        weights, ids = self._select(hidden_states, router_logits, *rest, **options)
        self._logits, self._passed = router_logits.dtype, (ids.data_ptr(), weights.data_ptr())
        return weights, ids

    def take(self, topk_ids: Tensor, topk_weights: Tensor) -> Pending | None:
        """The batch that the kernel has to route, if the experts are given its empty ids. None if ids are written.

        Raises KernelError if vLLM has put other tensors in their place.
        """
        found, self._pending = self._pending, None
        if found is None:
            return None
        if (topk_ids.data_ptr(), topk_weights.data_ptr()) != (found.ids.data_ptr(), found.weights.data_ptr()):
            raise KernelError("vLLM has copied ids that were not chosen yet; unset RAMP_MOE_VLLM and report this")
        return found

    def choose(self, pending: Pending) -> None:
        """Write the ids and weights of a batch after all, as vLLM's router does."""
        weights, ids = self._select(pending.hidden_states, pending.router.logits)
        pending.ids.copy_(ids)
        pending.weights.copy_(weights)

    def warm_up(self, topk_ids: Tensor, topk_weights: Tensor, dtype: torch.dtype) -> None:
        """Try a batch size outside of captures, after its plan was made; from then on the kernel routes it in captures.

        topk_ids and topk_weights: what the experts were given. dtype: of the hidden states.
        """
        tokens = len(topk_ids)
        if tokens in self._sizes or self._logits is None:
            return
        if self._passed != (topk_ids.data_ptr(), topk_weights.data_ptr()) or topk_ids.dtype is not torch.int32:
            return  # something between router and experts changes them
        candidate = routing_candidate(self._layer, tokens, dtype)
        if candidate is None:
            return
        router = self._router
        key = self._layer.shape, candidate.name, tokens, dtype, self._logits, router.scoring_func, router.renormalize
        if key not in _tried:
            _tried[key] = self._apart(candidate, tokens, dtype)
        if _tried[key] is None:
            self._sizes.add(tokens)

    def _plain(self, logits: Tensor) -> bool:
        """Whether logits are as those that were tried, and nothing else reads the ids: no hook, and no recorder."""
        router = self._router
        hooks = router.capture_fn, router.eplb_state, router._routing_replay_out, recorder.recording.current
        tried = logits.dtype is self._logits and logits.is_contiguous() and logits.data_ptr() % 16 == 0
        return tried and all(hook is None for hook in hooks)

    def _given(self, logits: Tensor, padding: Tensor | None) -> RouterLogits:
        sigmoid = self._router.scoring_func == "sigmoid"
        return RouterLogits(logits, sigmoid, self._router.renormalize, padding)

    def _apart(self, candidate: Any, tokens: int, dtype: torch.dtype) -> str | None:
        """How the kernel differs from vLLM's operator and our layer on random logits; None if it does not."""
        shape, top_k, device = self._layer.shape, self._router.top_k, self._layer.held[0].gate_up.device
        generator = torch.Generator(device).manual_seed(tokens)
        options: dict[str, Any] = {"device": device, "generator": generator}
        x = torch.randn(tokens, shape.hidden_size, dtype=dtype, **options)
        logits = torch.randn(tokens, shape.num_experts, dtype=torch.float32, **options).to(self._logits)
        padded = torch.arange(tokens, device=device) >= max(1, tokens - tokens // 4)
        for padding in (None, padded):
            ids, chosen = (torch.empty(tokens, top_k, dtype=torch.int32, device=device) for _ in range(2))
            weights, weighed = (torch.empty(tokens, top_k, dtype=torch.float32, device=device) for _ in range(2))
            SCORINGS[self._router.scoring_func](
                weights, ids, torch.empty_like(ids), logits, self._router.renormalize, is_padding=padding
            )
            expected, out = torch.empty_like(x), torch.empty_like(x)
            self._layer.launch(candidate, Batch(x, ids, weights), expected)
            forward_routed(self._layer, x, self._given(logits, padding), chosen, weighed, out)
            if not torch.equal(ids, chosen):
                return "other experts"
            there = ids >= 0
            if not torch.allclose(weights[there], weighed[there], rtol=WEIGHTS_APART, atol=0):
                return "other weights"
            apart = (out.float() - expected.float()).norm() / expected.float().norm()
            if not apart < OUTPUTS_APART:
                return f"another output ({float(apart):.2g})"
        return None
