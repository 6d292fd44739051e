"""Checks whether ramp_moe computes all that Transformers' experts interface says of a module.

The flags are those of the installed version. One that is unknown here, and differs from its decorator's default, is
refused by its name.
"""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import KernelError

if TYPE_CHECKING:
    from torch.nn import Module

COMPUTED = frozenset(
    {"config", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel", "_apply_gate"}
)
"""Attributes that the decorator sets, and that the adapter reads or may ignore. Ids past the last expert are skipped
whether experts are parallel or not, so `_is_expert_parallel` may be ignored."""
FP8_COMPUTED = frozenset(
    {"config", "block_size", "activation_scheme", "scale_fmt", "has_bias", "has_gate", "expert_dtype"}
)
"""Arguments of Transformers' fp8 experts that are not refused here. The adapter reads what they chose from the module's
tensors and attributes."""
TENSORS = frozenset(
    f"{name}{of}"
    for name in ("gate_up_proj", "down_proj", "up_proj")
    for of in ("", "_bias", "_scale_inv", "_activation_scale")
)
"""Parameters of experts that the adapter reads, or that are refused elsewhere by what they mean."""
CHILDREN = frozenset({"act_fn", "parametrizations"})
"""Modules that experts may contain: the activation, which is found by running it, and torch's parametrizations."""


def check_flags(module: Module) -> None:
    """Raises KernelError that names what the module has beyond gate, up, activation and down."""
    version = metadata.version("transformers")
    unknown = {
        name: getattr(module, name, default)
        for name, default in _defaults().items()
        if name not in COMPUTED and not _same(getattr(module, name, default), default)
    }
    if hasattr(module, "block_size"):
        unknown |= {
            name: getattr(module, name, default)
            for name, default in _fp8_defaults().items()
            if name not in FP8_COMPUTED and not _same(getattr(module, name, default), default)
        }
    if unknown:
        said = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise KernelError(f"its experts have {said} (transformers {version}), which ramp_moe does not compute")
    own = [name for name, _ in module.named_parameters(recurse=False) if name not in TENSORS]
    own += [name for name, _ in module.named_buffers(recurse=False)]
    own += [name for name, _ in module.named_children() if name not in CHILDREN]
    if own:
        raise KernelError(f"its experts have {', '.join(own)} of their own, which ramp_moe does not compute")


def check_count(module: Any, experts: int) -> None:
    """Raises KernelError if the module's number of experts is not that of its weights.

    Transformers skips ids from the module's number on; ramp_moe would skip them from the weights' number on.
    """
    if module.num_experts != experts:
        raise KernelError(f"num_experts is {module.num_experts}, but gate_up_proj holds {experts} experts")


@functools.cache
def _defaults() -> dict[str, Any]:
    """Attributes that the decorator, without arguments, sets on a class and its modules."""
    import torch
    from transformers.integrations.moe import use_experts_implementation

    class Plain(torch.nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()

        def forward(self) -> None: ...

    class_before, before = set(vars(Plain)), set(vars(Plain(None)))
    decorated = use_experts_implementation(Plain)
    found = {**vars(decorated), **vars(decorated(None))}
    return {name: value for name, value in found.items() if name not in class_before | before}


@functools.cache
def _fp8_defaults() -> dict[str, Any]:
    """Arguments of Transformers' fp8 experts, with their defaults."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    arguments = list(inspect.signature(FP8Experts.__init__).parameters.values())[1:]
    return {argument.name: argument.default for argument in arguments}


def _same(value: Any, default: Any) -> bool:
    """Whether a flag has its default. Only plain values are compared by value."""
    return value is default or (isinstance(value, bool | int | float | str) and bool(value == default))
