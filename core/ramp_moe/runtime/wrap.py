"""`ramp_moe.wrap`: has dispatched layers compute the MoE layers of an existing model. `unwrap` undoes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import KernelError, RampMoEError, RoutingError
from ..measurements.trace import write_batches
from ..registry.experts_adapter import ExpertsAdapter
from ..registry.registry import get_registry
from .layer import LayerRuntime
from .layer_factory import Builder, named
from .options import DispatchOptions
from .wrapped_experts import WrappedExperts, experts_of

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


@dataclass(frozen=True)
class Wrapped:
    """What `wrap` did. As a context manager it unwraps the model at the end of the block, also after an error.

    experts: by the names of their modules.
    notes: for a person to read, on kernels left out, missing profiles, and what another copy of the weights would gain.
    model: the wrapped model.

    `str` gives a text of layers, kernels and notes.
    """

    experts: dict[str, WrappedExperts]
    notes: tuple[str, ...]
    model: Module = field(repr=False, compare=False)

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *raised: object) -> None:
        """Unwrap the model, unless it was unwrapped already or wrapped anew."""
        mine = list(self.experts.values())
        if any(experts_of(module) in mine for module in self.model.modules()):
            unwrap(self.model)

    @property
    def layers(self) -> dict[str, LayerRuntime]:
        return {name: experts.layer for name, experts in self.experts.items()}

    def __str__(self) -> str:
        first = next(iter(self.layers.values()))
        shapes = dict.fromkeys(f"{named(layer.shape).label} ({layer.shape.dtype})" for layer in self.layers.values())
        lines = [
            f"{len(self.layers)} MoE layers of {', '.join(shapes)} on {first.hardware.name}",
            f"kernels: {', '.join(first.configs())}; weights in {' and '.join(first.layouts)}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def warm_up(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Call `LayerRuntime.warm_up` of every layer, before CUDA graphs of `num_tokens` are captured."""
        for experts in self.experts.values():
            experts.layer.warm_up(num_tokens, experts.taken(dtype))

    @contextmanager
    def record(self) -> Iterator[RoutingRecording]:
        """Record what is routed while the context lasts.

        Batches in CUDA graphs, or in code that torch has compiled, are not recorded. For graphs there is
        `layer.graphs.record`. Raises RoutingError within another recording of the same layers.
        """
        if any(experts.recorded is not None for experts in self.experts.values()):
            raise RoutingError("the model is being recorded already; one recording at a time")
        recording = RoutingRecording(list(self.experts.values()))
        for experts in self.experts.values():
            experts.recorded = []
        try:
            yield recording
        finally:
            recording.stop()


class RoutingRecording:
    """Records the batches that wrapped layers route, one per layer and call."""

    def __init__(self, experts: list[WrappedExperts]) -> None:
        self._experts = experts
        self._batches: list[tuple[int, list[int]]] = []

    def stop(self) -> None:
        for experts in self._experts:
            self._batches += [(tokens, counts.tolist()) for tokens, counts in experts.recorded or () if tokens]
            experts.recorded = None

    def write(self, path: str | Path, source: str = "") -> None:
        """Write a trace of batches (see `measurements.trace`), whole or not at all.

        source: a note on where the batches are from. Raises RoutingError if nothing was recorded, or if the layers
        differ in experts or top-k. Raises ProfileError if the file cannot be written.
        """
        shapes = {(e.layer.shape.num_experts, e.layer.shape.top_k) for e in self._experts}
        if len(shapes) > 1:
            raise RoutingError("a trace is of layers that are alike; these differ in their number of experts or top-k")
        if not self._batches:
            raise RoutingError("nothing was recorded; run the model, uncompiled, while it records")
        write_batches(path, *shapes.pop(), self._batches, source)


def wrap(
    model: Module,
    *adapters: ExpertsAdapter,
    device: str = "auto",
    copies: int = 1,
    activations: str | None = None,
) -> Wrapped:
    """Have every MoE layer of `model` computed by the kernel that is predicted to be fastest for each batch.

    The effect lasts until `unwrap(model)`, or for a block: `with ramp_moe.wrap(model) as wrapped:`.

    adapters: of modules of your own (`ramp_moe.Experts`), before those of the frameworks that are known. device: the
    hardware's name where it is not to be detected. copies: of the weights, in as many layouts; with one, a weight is
    either used as it lies in the model or moved, never doubled. activations: "fp8" or "bf16", as in `DispatchOptions`.

    Parameters stay the same objects. A moved one is read and written as before, in the model's own order, but it has no
    address (`runtime.placeholder`). `state_dict()` has copies of it; writing to those does not reach the model. If a
    module's weights are replaced, its next call computes with the new ones, or raises KernelError.

    Inference only: a backward pass through a wrapped layer raises KernelError.

    Raises KernelError if the model has no MoE layer, is wrapped already, or has experts on several devices. Raises
    KernelError, too, if no kernel takes the weights, activation or layout, and for any other failure, out of memory
    included. Raises HardwareError for weights on the CPU. Whatever is raised, the model is then as it was.
    """
    _check_module(model)
    if strays := [adapter for adapter in adapters if not isinstance(adapter, ExpertsAdapter)]:
        raise KernelError(f"an adapter is a ramp_moe.Experts, or another ExpertsAdapter, not {strays[0]!r:.60}")
    found = _find(model, [*adapters, *get_registry().experts.values()])
    builder, done = (
        Builder(device, DispatchOptions(copies=copies, activations=activations)),
        dict[str, WrappedExperts](),
    )
    devices = {str(tensor.device) for _, module, _ in found for tensor in module.parameters()}
    if len(devices) > 1:
        raise KernelError(f"the experts' weights lie on {', '.join(sorted(devices))}; wrap a model on one device")
    from .refusals import check_parents, storages  # torch

    others = storages(model)
    with _undone(model):
        for name, module, adapter in found:
            with _named(name):
                check_parents(model, module)
                done[name] = WrappedExperts(module, adapter, adapter.top_k_of(module, _parent(model, name)), builder)
                done[name].take(module, others)
        for name, module, _ in found:
            with _named(name):
                done[name].install(module)
    return Wrapped(done, tuple(dict.fromkeys(builder.notes)), model)


def unwrap(model: Module) -> None:
    """Undo `wrap`. The model keeps the weights that it has now.

    Raises KernelError if the model is not wrapped, or if there is no memory to move weights back. The modules that are
    not unwrapped by then stay wrapped.
    """
    _check_module(model)
    if not _remove(model):
        raise KernelError(f"{type(model).__name__} is not wrapped")


def attach(module: Module, adapter: ExpertsAdapter, top_k: int, builder: Builder) -> WrappedExperts:
    """Wrap one module. Raises RampMoEError if no layer can be made of its experts; the module is then as it was."""
    with _undone(module), _named(type(module).__name__):
        experts = WrappedExperts(module, adapter, top_k, builder)
        experts.take(module)
        experts.install(module)
    return experts


def _parent(model: Module, name: str) -> Module:
    return model.get_submodule(name.rpartition(".")[0])


@contextmanager
def _undone(model: Module) -> Iterator[None]:
    """Unwrap again what the context wrapped, if anything in it fails. What was wrapped before stays wrapped."""
    before = {id(module) for module in model.modules() if experts_of(module)}
    try:
        yield
    except BaseException:
        _remove(model, before)
        raise


def _remove(model: Module, kept: Collection[int] = ()) -> bool:
    """Unwrap the model's modules, the last one first, since modules may share what `install` changed.

    kept: ids of modules that stay wrapped. Returns whether anything was unwrapped.
    """
    from .module import MoELayer  # torch

    every = [(name, m) for name, m in model.named_modules() if not isinstance(m, MoELayer)]
    wrapped = [(name, m) for name, m in every if experts_of(m) and id(m) not in kept]
    for name, module in reversed(wrapped):
        experts = experts_of(module)
        assert experts is not None
        with _named(name or type(module).__name__):
            experts.remove(module)
    return bool(wrapped)


def _check_module(model: object) -> None:
    """Raises KernelError for anything but a module: for a model's name, or its class."""
    if not callable(getattr(model, "named_modules", None)) or isinstance(model, type):
        raise KernelError(f"a model is a torch.nn.Module, not {model!r:.60}; load it first")


def _find(model: Module, adapters: list[ExpertsAdapter]) -> list[tuple[str, Module, ExpertsAdapter]]:
    found = []
    for name, module in model.named_modules():
        adapter = next((a for a in adapters if a.finds(module)), None)
        if adapter is not None:
            found.append((name or type(module).__name__, module, adapter))
    if any(experts_of(module) for _, module, _ in found):
        raise KernelError(f"{type(model).__name__} is wrapped already; ramp_moe.unwrap(model) first")
    if not found:
        hints = [hint for a in adapters if (hint := a.hint(model))]
        reason = hints[0] if hints else "name the experts of a module of your own with ramp_moe.Experts"
        raise KernelError(f"{type(model).__name__} has no MoE layer that ramp_moe knows: {reason}")
    return found


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the module's name before the message of an error, and turn errors of other kinds into KernelErrors."""
    try:
        yield
    except RampMoEError as e:
        e.args = (f"{name}: {e}",)
        raise
    except Exception as e:
        raise KernelError(f"{name}: {type(e).__name__}: {e}") from e
