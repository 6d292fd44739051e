"""The name `ramp_moe` in the experts interfaces of Transformers 5.

Importing this raises KernelError if Transformers has no experts interface.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from ramp_moe.plugin import ExpertsAdapter, KernelError
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.wrap import attach
from ramp_moe.runtime.wrapped_experts import WrappedExperts, experts_of

from . import NAME

try:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface
except ImportError as e:
    raise KernelError(f"ramp_moe needs the experts interface of transformers 5.17 or newer of 5 ({e})") from e

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_logger = logging.getLogger("ramp_moe")
_builder = Builder()
"""Of layers that are wrapped when they first run: they share profiles and workspaces while the process lives."""
_adapters: list[ExpertsAdapter] = []
"""The one that was registered."""


def experts_forward(module: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of the experts `[T, H]` of hidden_states `[T, H]`, top_k_index int64 `[T, k]`, where num_experts
    is skipped, and top_k_weights `[T, k]`."""
    experts = experts_of(module) or _attached(module, top_k_index.shape[-1])
    return experts(hidden_states, top_k_index, top_k_weights)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attached(module: Module, top_k: int) -> WrappedExperts:
    said = len(_builder.notes)
    found = attach(module, _adapters[0], top_k, _builder)
    for note in _builder.notes[said:]:
        _logger.warning("%s", note)
    return found


def register(adapter: ExpertsAdapter) -> None:
    """Make the name a choice of `experts_implementation=`, for modules that `adapter` knows. Again, it does nothing."""
    if not _adapters:
        _adapters.append(adapter)
        for interface in (ExpertsInterface, FP8ExpertsInterface):  # the second's lack of a name shows in a call only
            interface.register(NAME, experts_forward)
