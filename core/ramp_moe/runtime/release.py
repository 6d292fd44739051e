"""Gives up a layer's weights as they were given, if its kernels hold them in formats of their own.

So kernels that repack take no second copy. What needs the weights themselves, such as the check of a candidate before
its capture, compares with an output that was right.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import KernelError
from ..spec.launchable import Batch, MoEWeights
from .reference import misfit, reference
from .update import FIELDS, check_fits, refresh, storage, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cost_model.model import Candidate
    from .protocols import Holding, Running

WEIGHTS = ("gate_up", "down", "gate_up_scale", "down_scale")
"""Fields of MoEWeights that are given up. Kernels read biases where they are."""
CHECKED_TOKENS = 8
"""Tokens of the batch whose output is compared with the float32 layer."""


def repacked(layer: Running) -> bool:
    """Whether no kernel reads the weights as they were given."""
    given = {storage(t) for held in layer.held for name in WEIGHTS if (t := getattr(held, name)) is not None}
    return not any(storage(t) in given for name in layer.kernels for t in tensors(layer.kernel(name)[1]))


def checked(layer: Running, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    """Compare a candidate's output with the float32 layer, on a random batch of hidden states of this dtype.

    Returns what computes batches with it. Raises KernelError if the output is wrong.
    """
    batch = _drawn(layer, dtype)
    candidate = layer.choose(batch)
    compute = partial(_computed, layer, candidate)
    if wrong := misfit(compute(batch), reference(layer.held[0], batch), layer.shape.dtype):
        raise KernelError(f"{candidate.name}: {wrong}")
    return compute


def derive_again(layer: Holding, weights: MoEWeights) -> None:
    """Have the kernels of a released layer derive again what they hold, from new weights, in place.

    Raises ShapeError for weights that do not fit, before anything is written.
    """
    check_fits(layer.held[0], on_meta(weights))
    layer.stale = "an update of the layer's weights failed; update it again, or build another layer"
    refresh(layer, weights)
    layer.stale = None


def on_meta(weights: MoEWeights) -> MoEWeights:
    """The weights without their values, which take no memory."""
    moved = {name: t.to("meta") for name in FIELDS if (t := getattr(weights, name)) is not None}
    return replace(weights, **moved)


def _computed(layer: Running, candidate: Candidate, batch: Batch) -> Tensor:
    out = torch.empty_like(batch.hidden_states)
    layer.launch(candidate, batch, out)
    return out.float()


def _drawn(layer: Running, dtype: torch.dtype) -> Batch:
    """A random batch with even routing."""
    shape, device = layer.shape, layer.held[0].gate_up.device
    generator = torch.Generator(device).manual_seed(0)
    size = CHECKED_TOKENS, shape.hidden_size
    x = torch.randn(size, dtype=torch.float32, device=device, generator=generator)
    scores = torch.rand(CHECKED_TOKENS, shape.num_experts, dtype=torch.float32, device=device, generator=generator)
    weights, ids = scores.topk(shape.top_k, -1)
    return Batch(x.to(dtype), ids.int(), weights / weights.sum(-1, keepdim=True))
