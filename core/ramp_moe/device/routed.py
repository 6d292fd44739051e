"""What a wrapped module calls instead of its own experts, and what it records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..experts import ExpertsAdapter
from .layer import MoELayer
from .layouts import relayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

KEY = "_ramp_moe"
"""Attribute of a wrapped module that holds its RoutedExperts."""


class RoutedExperts:
    """One module's layer, called as frameworks call their experts.

    Parameters of the module that the layer holds in another order, and does not read as they are, are released: until
    `remove` they are placeholders on the device `meta`, so that there is one copy, and saving the model is an error.
    """

    def __init__(self, module: Module, adapter: ExpertsAdapter, layer: MoELayer) -> None:
        self.layer, self.adapter = layer, adapter
        self.recorded: list[tuple[int, Tensor]] | None = None
        """Tokens and expert histogram int64 `[num_experts]` of each batch, on the device, while something records."""
        self._before = adapter.install(module)
        module.__dict__[KEY] = self
        names = (adapter.gate_up, adapter.down)
        self._released = [name for name in names if not is_held(getattr(module, name), layer)]
        for name in self._released:
            _replace(module, name, getattr(module, name).to("meta"))
        self._parameters = [getattr(module, name) for name in names]

    def __call__(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum of the experts `[T, H]` in the dtype of hidden_states `[T, H]`, any float, which the layer
        takes in the dtype of its weights, as Transformers does: topk_ids `[T, k]` int32 or int64, where num_experts and
        -1 are skipped, topk_weights `[T, k]` of any float. Raises what `MoELayer.forward` does; KernelError in a
        backward pass."""
        import torch

        if not torch.compiler.is_compiling():
            self._record(topk_ids)
            trains = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
            if trains and not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_()  # their gradients, too, are refused
        # The layer itself would need two launches for int64, since it allows for ids that 32 bits do not hold.
        x = hidden_states.to(self.taken(hidden_states.dtype)).contiguous()
        return self.layer(x, topk_ids.int().contiguous(), topk_weights.float().contiguous()).to(hidden_states.dtype)

    def taken(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the layer takes hidden states of this one: its weights', or bf16 if fp8 weights come with
        neither bf16 nor fp16."""
        import torch

        weights = self.layer.held[0].gate_up.dtype
        if weights.itemsize > 1:
            return weights
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16

    def remove(self, module: Module) -> None:
        """Leave the module as it was."""
        self.adapter.uninstall(module, self._before)
        del module.__dict__[KEY]
        if self._released:
            given = self.adapter.restored(module, relayout(self.layer.held[0], "gate-first"))
            for name, tensor in zip((self.adapter.gate_up, self.adapter.down), given, strict=True):
                if name in self._released:
                    _replace(module, name, tensor.contiguous())

    def _record(self, topk_ids: Tensor) -> None:
        import torch

        if self.recorded is None or (topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        experts = self.layer.shape.num_experts
        ids = topk_ids.flatten().long()
        ids = ids.masked_fill((ids < 0) | (ids > experts), experts)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
        self.recorded.append((len(topk_ids), counts.scatter_add_(0, ids, torch.ones_like(ids))[:experts]))


def experts_of(module: Module) -> RoutedExperts | None:
    """Those of a wrapped module."""
    found = getattr(module, KEY, None)
    return found if isinstance(found, RoutedExperts) else None


def is_held(parameter: Tensor, layer: MoELayer) -> bool:
    """Whether the layer reads this memory."""
    place = parameter.untyped_storage().data_ptr()
    return any(place == t.untyped_storage().data_ptr() for held in layer.held for t in (held.gate_up, held.down))


def _replace(module: Module, name: str, tensor: Tensor) -> None:
    import torch

    old = getattr(module, name)
    new: Tensor = tensor
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(tensor, old.requires_grad)
    new.__dict__.update(old.__dict__)  # what frameworks note on their parameters
    setattr(module, name, new)
