"""Refuses tensors of a module that cannot be a layer's, for what changes them or for their kind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..errors import KernelError
from ..registry.experts_adapter import HOOK
from .placeholder import Placeholder

if TYPE_CHECKING:
    from torch.nn import Module

    from ..registry.experts_adapter import ExpertsAdapter
    from .layer import LayerRuntime


def _function(kind: type[Tensor]) -> Any:
    return getattr(kind.__torch_function__, "__func__", kind.__torch_function__)


FUNCTIONS = (_function(Tensor), _function(torch.nn.Parameter))


def check(module: Module, adapter: ExpertsAdapter, own: LayerRuntime | None = None) -> None:
    """Raises KernelError, with the reason, if the module's tensors cannot be a layer's.

    own: the layer that some of them are placeholders of already; None if there is none.
    """
    if hook := next(_offloading(getattr(module, HOOK, None)), None):
        raise KernelError(f"accelerate's {hook} moves its weights at each call; load the whole model onto the GPU")
    for name in filter(partial(parametrize.is_parametrized, module), adapter.names(module).values()):
        first = type(module.parametrizations[name][0]).__name__  # type: ignore[index]
        raise KernelError(f"{name} is parametrised ({first}): merge or remove the parametrisation, then wrap the model")
    for name in adapter.names(module).values():
        tensor = getattr(module, name, None)
        if isinstance(tensor, Placeholder) and tensor._source.layer is own:
            continue
        if isinstance(tensor, Tensor):  # the adapter refuses anything else, and missing names
            _check(module, name, tensor)


def check_parents(model: Module, module: Module) -> None:
    """Raises KernelError if another module of the model changes the weights of `module` at each call.

    PEFT does that for `target_parameters`.
    """
    for parent in model.modules():
        name = getattr(parent, "parameter_name", None)
        if name is not None and getattr(parent, "base_layer", None) is module:
            raise KernelError(f"{name} is adapted by {type(parent).__name__}; merge that into the weights first")


def storages(model: Module) -> dict[int, list[tuple[str, Tensor]]]:
    """Names and tensors of a model, by the address of their storage."""
    found: dict[int, list[tuple[str, Tensor]]] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta:
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    return found


def _check(module: Module, name: str, tensor: Tensor) -> None:
    kind = type(tensor)
    if isinstance(tensor, Placeholder):
        raise KernelError(f"{name} is also a weight of another wrapped module, which has moved it; untie them first")
    if hasattr(tensor, "device_mesh"):
        raise KernelError(f"{name} is sharded over several devices; ramp_moe takes whole experts")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or _function(kind) not in FUNCTIONS:
        raise KernelError(
            f"{name} is a {kind.__name__}, whose values only its own code knows; ramp_moe takes plain tensors"
        )
    if tensor.is_meta:
        raise KernelError(f"{name} is not loaded (it is on the device meta)")
    if tensor.layout is not torch.strided:
        raise KernelError(f"{name} is {tensor.layout}; ramp_moe takes dense tensors")
    if name not in module._parameters and name not in module._buffers and module._forward_pre_hooks:
        raise KernelError(f"{name} is no parameter, and may be computed before each call by one of the module's hooks")


def _offloading(hook: object) -> Iterator[str]:
    """Yield the names of accelerate's hooks that do more than move inputs."""
    for one in getattr(hook, "hooks", [hook]):
        if one is not None and (getattr(one, "offload", False) or not hasattr(one, "offload")):
            yield type(one).__name__
