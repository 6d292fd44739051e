"""A MoE layer as one opaque operator, so that `torch.compile` keeps it whole in a model's graph, and a gradient that
goes through it is an error, not a silent zero.

The operator takes the layer's number, as operators take tensors and numbers alone. Numbers keep no layer alive. Where
one compiled block is to serve the layers of several modules, torch takes the number for a part of the program unless
`torch._dynamo.config.allow_unspec_int_on_nn_module` is set, and compiles the block once for each.

With `mode="reduce-overhead"` call `LayerRuntime.warm_up` for the batch sizes first: torch captures what the operator
launches, and the device then chooses at every replay. Without it such a graph holds the choice of a run before it.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import KernelError
from .protocols import Layer

_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Layer, number: int | None = None) -> int:
    """The layer's number: a new one, or that of a layer whose place it takes in what was compiled."""
    number = next(_numbers) if number is None else number
    _layers[number] = layer
    return number


# The schema is spelt out, since some versions of torch cannot read one from annotations that are strings. The layer's
# number may be symbolic: one compiled block then serves all the layers of a model.
@torch.library.custom_op(
    "ramp_moe::moe",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, SymInt layer, Tensor? num_valid) -> Tensor",
)
def moe(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int, num_valid: Tensor | None) -> Tensor:
    """`LayerRuntime.forward` of the layer of this number. Raises what that does; KernelError if the layer is gone."""
    found: Layer | None = _layers.get(layer)
    if found is None:
        raise KernelError(f"MoE layer {layer} is gone; keep it for as long as what was compiled with it runs")
    if found.owner is not None and (owner := found.owner()) is not None:
        found = owner.current()
    found.ready(len(hidden_states), hidden_states.dtype)
    return found.forward(hidden_states, topk_ids, topk_weights, num_valid=num_valid)


@moe.register_autograd
def _(ctx: Any, gradient: Tensor) -> None:
    raise KernelError(
        "a ramp_moe layer computes no gradients; run the model under torch.no_grad(), or ramp_moe.unwrap it to train"
    )


@moe.register_fake
def _(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int, num_valid: Tensor | None) -> Tensor:
    return torch.empty_like(hidden_states)
