"""Chooses in which layouts a layer holds its weights, and has the kernels prepare what they launch with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cost_model.model import CostModel
from ..dispatch.weight_layouts import choose_layouts, kernel_times, weighed_batches, why_not_served
from ..errors import HardwareError, KernelError, RampMoEError, ShapeError
from ..spec.hardware import Hardware
from ..spec.kernel import layouts_of
from ..spec.launchable import LaunchableKernel, MoEWeights, obstacle
from ..spec.shapes import MoEShape
from .relayout import relayout, to_give

HALVES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""Names of the dtypes of hidden states, by `str(torch.dtype)`."""


@dataclass
class HeldWeights:
    """What a layer holds of its weights.

    layouts: names of the layouts. held: the weights, by the layout of each copy.
    kernels: those that read one of the layouts, by name, each with what its `prepare` returned.
    derived: kernels that launch with something that they derived from the weights, in memory of its own.
    dropped: why other kernels do not take part, by name.
    """

    layouts: tuple[str, ...] = ()
    held: dict[str, MoEWeights] = field(default_factory=dict)
    kernels: dict[str, tuple[LaunchableKernel, Any]] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)


def hold(
    weights: MoEWeights,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[LaunchableKernel],
    copies: int,
    cost_model: CostModel | None,
) -> HeldWeights:
    """Hold the weights for these kernels; the arguments are as of `LayerRuntime`.

    Raises KernelError if no kernel computes the shape here, or if two have one name. Raises ShapeError or HardwareError
    if the cost model is for another shape or GPU.
    """
    if cost_model is not None:
        _check(cost_model, shape, hardware)
    dropped: dict[str, str] = {}
    usable = _usable(kernels, shape, hardware, dropped)
    # A kernel that refuses the weights once they are in its layout leaves the choice of layouts to the others.
    while usable:
        found = _tried(weights, shape, usable, copies, cost_model, dropped)
        if isinstance(found, HeldWeights):
            return found
        usable.remove(found)
    reasons = "; ".join(f"{k}: {r}" for k, r in dropped.items()) or "none was given"
    raise KernelError(f"no kernel can compute {shape.label} on {hardware.name} ({reasons})")


def _usable(
    kernels: Sequence[LaunchableKernel], shape: MoEShape, hardware: Hardware, dropped: dict[str, str]
) -> list[LaunchableKernel]:
    """The kernels that say that they can compute the shape here. The others go to `dropped`."""
    usable: dict[str, LaunchableKernel] = {}
    for kernel in kernels:
        if kernel.name in usable:
            raise KernelError(f"two of the layer's kernels are named {kernel.name!r}; give one of them")
        try:
            if reason := obstacle(kernel, shape, hardware):
                raise KernelError(reason)
            if shape.dtype in HALVES.values() and shape.dtype not in kernel.hidden_dtypes:
                raise KernelError(f"takes hidden states in {' and '.join(kernel.hidden_dtypes)} only")
            layouts_of(kernel, shape)
            usable[kernel.name] = kernel
        except RampMoEError as e:
            dropped[kernel.name] = str(e)
    return list(usable.values())


def _tried(
    weights: MoEWeights,
    shape: MoEShape,
    usable: Sequence[LaunchableKernel],
    copies: int,
    cost_model: CostModel | None,
    dropped: dict[str, str],
) -> HeldWeights | LaunchableKernel:
    """Choose the layouts, and prepare the kernels that read one of them.

    Returns a kernel that refuses the weights, as soon as there is one.
    """
    from .update import prepare  # torch

    times = None
    if cost_model is not None:
        names = [k.name for k in usable]
        times = kernel_times(cost_model.restrict(names), names, weighed_batches(cost_model))
    chosen = choose_layouts(shape, usable, copies, times, weights.layout)
    found = HeldWeights(chosen.layouts, dropped=dropped)
    for kernel in usable:
        if kernel.name not in chosen.kernels:
            continue
        layout = to_give([key for key in layouts_of(kernel, shape) if key in chosen.layouts])
        try:
            if layout not in found.held:
                found.held[layout] = relayout(weights, layout)
            prepared, derives = prepare(kernel, found.held[layout])
            found.kernels[kernel.name] = kernel, prepared
            found.derived |= {kernel.name} if derives else set()
        except RampMoEError as e:
            dropped[kernel.name] = str(e)
            return kernel
    dropped |= {
        kernel.name: why_not_served(shape, usable, kernel, copies, times, weights.layout)
        for kernel in usable
        if kernel.name not in chosen.kernels
    }
    return found


def _check(cost_model: CostModel, shape: MoEShape, hardware: Hardware) -> None:
    """Raises ShapeError or HardwareError for a model of another shape or GPU."""
    if cost_model.shape != shape:
        raise ShapeError(f"the cost model is for {cost_model.shape.slug}, the weights are {shape.slug}")
    if cost_model.hardware != hardware:
        raise HardwareError(f"the cost model was fitted on {cost_model.hardware.name}, the layer is on {hardware.name}")
