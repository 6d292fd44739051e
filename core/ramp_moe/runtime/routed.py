"""Runs a layer from router logits, if the kernel that computes a batch size in graphs chooses the experts itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cost_model.model import Candidate
from ..errors import KernelError, RoutingError, ShapeError
from ..spec.launchable import Batch, RouterLogits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .layer import LayerRuntime


def routing_candidate(layer: LayerRuntime, num_tokens: int, dtype: torch.dtype) -> Candidate | None:
    """The candidate that computes graphs of this size from router logits; None if none does.

    dtype: of the hidden states. A graph with several bodies takes ids: the choice among them reads those.
    """
    plan = None if layer.graphs is None else layer.graphs.plans.get(num_tokens)
    if plan is None or plan.dtype is not dtype or len(plan.bodies) > 1 or layer.ep_size > 1:
        return None
    found, most = plan.bodies[0], layer.max_tokens(plan.bodies[0])
    kernel, _ = layer.kernel(found.kernel)
    fits = most is None or num_tokens <= most
    return found if fits and kernel.routes(found.config, layer.shape, num_tokens) else None


def forward_routed(
    layer: LayerRuntime,
    hidden_states: Tensor,
    router: RouterLogits,
    topk_ids: Tensor,
    topk_weights: Tensor,
    out: Tensor,
) -> None:
    """Compute a batch whose experts the kernel chooses, with the layer's `routing_candidate`.

    hidden_states: bf16 or fp16 `[T, H]`.
    topk_ids: int32 `[T, k]`, which is written; -1 for padding.
    topk_weights: float32 `[T, k]`, which is written.
    out: `[T, H]`, as hidden_states.

    Raises KernelError if no candidate takes the batch, RoutingError or ShapeError for tensors that do not fit together.
    """
    import torch

    if layer.stale is not None:
        raise KernelError(layer.stale)
    batch, logits, padding = Batch(hidden_states, topk_ids, topk_weights), router.logits, router.padding
    shape, tokens = layer.shape, batch.num_tokens
    if logits.shape != (tokens, shape.num_experts) or logits.stride(1) != 1 or logits.device != hidden_states.device:
        raise RoutingError(
            f"router logits must be [{tokens}, {shape.num_experts}] with contiguous rows, beside the hidden states, "
            f"not {list(logits.shape)} on {logits.device}"
        )
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise RoutingError(f"router logits must be bf16, fp16 or float32, not {logits.dtype}")
    if padding is not None:
        fits = padding.shape == (tokens,) and padding.dtype is torch.bool and padding.is_contiguous()
        if not fits or padding.device != logits.device:
            raise RoutingError(
                f"padding must be contiguous bool [{tokens}], beside the logits, not {padding.dtype} "
                f"{list(padding.shape)} on {padding.device}"
            )
    if out.shape != hidden_states.shape or out.dtype is not hidden_states.dtype or not out.is_contiguous():
        raise ShapeError(f"out must be contiguous {hidden_states.dtype} {list(hidden_states.shape)}")
    candidate = routing_candidate(layer, tokens, hidden_states.dtype)
    if candidate is None:
        raise KernelError(f"no kernel of the layer chooses the experts of {tokens} tokens itself")
    kernel, prepared = layer.kernel(candidate.kernel)
    with layer.workspace.lock:
        kernel.launch_routed(candidate.config, prepared, router, batch, out, layer.workspace)
