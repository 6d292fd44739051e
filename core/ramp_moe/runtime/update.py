"""Gives a layer new weights, written to the addresses of the old ones, so that captured CUDA graphs stay valid.

What a kernel derived from the weights in `prepare` is derived again, and copied into the tensors that it launches with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import KernelError, ShapeError
from ..spec.launchable import LaunchableKernel, MoEWeights
from .relayout import ROWS, copy_rows

if TYPE_CHECKING:
    from .protocols import Holding

FIELDS = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
"""Fields of MoEWeights that are tensors."""


def update(layer: Holding, weights: MoEWeights) -> None:
    """Have `layer` compute with `weights` from now on; see `LayerRuntime.update`."""
    if not isinstance(weights, MoEWeights):
        raise ShapeError(f"the new weights must be a MoEWeights, not {type(weights).__name__}")
    check_fits(layer.held[0], weights)
    with writing(layer):
        for name in FIELDS:
            if (tensor := getattr(weights, name)) is not None:
                put(layer, name, tensor, weights.layout)


@contextmanager
def writing(layer: Holding) -> Iterator[None]:
    """Change the weights held within this context; at its end, kernels derive again what they derived from them.

    If anything fails, the layer raises KernelError in every `forward` until an update succeeds.
    """
    layer.stale = "an update of the layer's weights failed; update it again, or build another layer"
    yield
    refresh(layer)
    layer.stale = None


def check_fits(held: MoEWeights, weights: MoEWeights) -> None:
    """Raises ShapeError if `weights` cannot replace `held`.

    Shapes, dtypes, formats, devices, activation and limit must be equal. So must the presence of each scale and bias.
    """
    if held.stored.weights != weights.stored.weights and held.gate_up.dtype == weights.gate_up.dtype:
        raise ShapeError(
            f"the layer holds {held.stored.weights} weights, the new ones are {weights.stored.weights}; build a layer "
            "of the new weights"
        )
    for what in ("activation", "limit"):
        old, new = getattr(held, what), getattr(weights, what)
        if old != new:
            raise ShapeError(f"the layer has the {what} {old}, the new weights {new}; build a layer of them")
    for name in FIELDS:
        old, new = getattr(held, name), getattr(weights, name)
        if (old is None) != (new is None):
            raise ShapeError(f"the layer has {'no' if old is None else 'a'} {name}, the new weights differ")
        if old is None:
            continue
        for what in ("shape", "dtype", "device"):
            if getattr(old, what) != getattr(new, what):
                raise ShapeError(
                    f"the layer's {name} has the {what} {_shown(old, what)}, the new one {_shown(new, what)}; "
                    "build a layer of the new weights"
                )


def put(layer: Holding, name: str, tensor: Tensor, layout: str, experts: slice = slice(None)) -> None:
    """Write the field `name` for these experts into every layout that is held. Call it within `writing`.

    tensor: the values as MoEWeights describes the field, rows in the order `layout`. It may share the held memory.
    """
    places = [(getattr(held, name)[experts], held.layout) for held in layer.held]
    if name not in ROWS:
        places = [(place, layout) for place, _ in places]
    others = [p for p in places if not (p[1] == layout and _same(p[0], tensor))]
    if any(storage(place) == storage(tensor) for place, _ in others):
        tensor = tensor.clone()
    with torch.no_grad():
        for place, order in others:
            if order == layout:
                place.copy_(tensor)
            else:
                copy_rows(tensor, layout, place, order, layer.shape.intermediate_size)


def refresh(layer: Holding, given: MoEWeights | None = None) -> None:
    """Derive again what kernels derived from the held weights, after a change, and copy it in place.

    given: the weights to derive it from, in place of those held.

    Raises KernelError if a kernel now derives something that does not fit in the place of the old.
    """
    for name in layer.derived:
        kernel, prepared = layer.kernel(name)
        weights = layer.weights_of(kernel) if given is None else given
        held = {storage(t) for t in tensors(weights)}
        old, new = list(leaves(prepared)), list(leaves(kernel.prepare(weights)))
        if [path for path, _ in old] != [path for path, _ in new]:
            raise KernelError(f"{name} prepares the new weights in another form; build a layer of them")
        pairs = [(path, a, b) for (path, a), (_, b) in zip(old, new, strict=True)]
        for path, a, b in pairs:
            if not _fits(a, b):
                raise KernelError(f"{name} prepares another {path} of the new weights; build a layer of them")
        with torch.no_grad():
            for _, a, b in pairs:
                if isinstance(a, Tensor) and storage(a) not in held:
                    _distinct(a).copy_(_distinct(b))


def prepare(kernel: LaunchableKernel, weights: MoEWeights) -> tuple[Any, bool]:
    """Call `kernel.prepare`. Also tells whether it derived anything that does not share the weights' memory."""
    with _Constants() as constants:
        prepared = kernel.prepare(weights)
    shared = {storage(t) for t in tensors(weights)} | {storage(t) for t in constants.made}
    return prepared, constants.read or any(storage(t) not in shared for t in tensors(prepared))


class _Constants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the tensors that are made from no other tensor, and notes whether values of tensors were read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []  # kept alive, so that no other tensor takes their memory
        self.read = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given, found = ({storage(t) for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), out))
        constant = given <= {storage(t) for t in self.made} and "empty" not in func._schema.name
        if constant:
            self.made += [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        elif func._schema.is_mutable:
            self.made = [t for t in self.made if storage(t) not in given]
        self.read |= not constant and not found
        return out


def tensors(x: Any) -> Iterator[Tensor]:
    """Yield the tensors in an object, at any depth of containers and attributes."""
    return (leaf for _, leaf in leaves(x) if isinstance(leaf, Tensor))


def leaves(x: Any, path: str = "value", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for all leaves of containers, dataclasses and other objects with attributes."""
    if id(x) in seen:
        return
    parts: Iterable[tuple[str, Any]]
    if isinstance(x, Mapping):
        parts = ((f"{path}[{key!r}]", value) for key, value in x.items())
    elif isinstance(x, (list, tuple)):
        parts = ((f"{path}[{i}]", value) for i, value in enumerate(x))
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        parts = ((f"{path}.{f.name}", getattr(x, f.name)) for f in dataclasses.fields(x))
    elif hasattr(x, "__dict__") and not isinstance(x, (Tensor, ModuleType, type, Callable)):  # type: ignore[arg-type]
        parts = ((f"{path}.{name}", value) for name, value in vars(x).items())
    else:
        yield path, x
        return
    for at, value in parts:
        yield from leaves(value, at, seen | {id(x)})


def storage(t: Tensor) -> int:
    """The address of a tensor's storage, equal for tensors that share memory."""
    return t.untyped_storage().data_ptr()


def _fits(old: Any, new: Any) -> bool:
    """Whether `new` can be copied into `old`, or does not depend on the weights."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return callable(old) or old is new or bool(type(old) is type(new) and old == new)


def _distinct(t: Tensor) -> Tensor:
    """The view with each element of memory once: an expanded dimension is cut to its first element."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _shown(t: Tensor, what: str) -> Any:
    return list(t.shape) if what == "shape" else getattr(t, what)
