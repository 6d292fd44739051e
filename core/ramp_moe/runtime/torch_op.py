"""Makes a MoE layer one opaque operator of torch.

`torch.compile` then keeps the layer whole in a model's graph. A gradient through it is an error instead of a silent
zero.

Operators take only tensors and numbers, so this one takes the layer's number, which keeps no layer alive. If one
compiled block serves several modules, torch compiles it once per layer number. With
`torch._dynamo.config.allow_unspec_int_on_nn_module` it compiles the block once for all.

With `mode="reduce-overhead"`, call `LayerRuntime.warm_up` for the batch sizes first. torch then captures launches with
which the device chooses at every replay. Without it, the graph keeps the choice of an earlier run.
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
    """Register a layer and return its number. number: that of the layer that it replaces; None for a new one."""
    number = next(_numbers) if number is None else number
    _layers[number] = layer
    return number


# The schema is spelt out, since some versions of torch cannot infer it from annotations that are strings. The layer's
# number may be symbolic, so that one compiled block serves all layers of a model.
@torch.library.custom_op(
    "ramp_moe::moe",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, SymInt layer, Tensor? num_valid) -> Tensor",
)
def moe(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int, num_valid: Tensor | None) -> Tensor:
    """Run `LayerRuntime.forward` of the layer with this number.

    Raises what that raises, and KernelError if the layer is gone.
    """
    found: Layer | None = _layers.get(layer)
    if found is None:
        raise KernelError(f"MoE layer {layer} is gone; keep it alive as long as code that was compiled with it runs")
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
