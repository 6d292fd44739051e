"""The layers of a model, over every kernel that runs here: one plan for each kind of layer, one workspace for all."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ..cost_model.model import CostModel
from ..dispatch.load_model import load_model
from ..dispatch.profile_store import ProfileStore
from ..dispatch.weight_layouts import choose_layouts, kernel_times, weighed_batches
from ..errors import HardwareError, KernelError, ProfileError
from ..registry.detect import detect
from ..registry.registry import Registry, get_registry
from ..spec.hardware import Hardware
from ..spec.launchable import LaunchableKernel, MoEWeights, Workspace, obstacle
from ..spec.shapes import MoEShape
from .layer import LayerRuntime
from .on_demand import OnDemand, on_demand
from .options import DispatchOptions

if TYPE_CHECKING:
    import torch

UNMEASURED = "triton"
"""The kernel to run if none was measured: it takes any layout, and needs nothing but Triton."""
INTERPRET = "TRITON_INTERPRET"
HOST_SYNC_US = 300.0
"""Default of `DispatchOptions.host_sync_us` on a GPU.

While the host waits it launches nothing further, and the GPU then waits for the host. A development run lost 0.4 to
0.5 ms per layer by that (OLMoE, eager, on an H200). No file here records it.
"""


class LayerKind(NamedTuple):
    """What layers must share to be made by one plan: kernels take weights by all of it."""

    shape: MoEShape
    activation: str
    limit: float | None
    layout: str
    scale_block: int | None
    biases: tuple[bool, bool]


def kind_of(weights: MoEWeights, top_k: int) -> LayerKind:
    biases = weights.gate_up_bias is not None, weights.down_bias is not None
    return LayerKind(
        weights.shape(top_k), weights.activation, weights.limit, weights.layout, weights.scale_block, biases
    )


@dataclass
class LayerPlan:
    """How the layers of one kind are made.

    model: of all that may be chosen. compiling: what of it is still being compiled; None if nothing is.
    """

    hardware: Hardware
    kernels: list[LaunchableKernel]
    model: CostModel | None
    compiling: OnDemand | None = None


class Builder:
    """Makes layers from weights. `notes` collects what a person should know about them.

    device: name of the hardware, or `auto` to detect it.

    `layer` raises HardwareError for weights on a device where no kernel runs. It raises UnknownNameError for a device
    or a kernel that nobody registered, KernelError if no kernel takes the weights, and ProfileError for a damaged
    profile.
    """

    def __init__(self, device: str = "auto", options: DispatchOptions | None = None) -> None:
        if not isinstance(device, str):
            raise HardwareError(f"the device is named by a string, 'auto' or 'h200', not {device!r:.60}")
        if not (options is None or isinstance(options, DispatchOptions)):
            raise KernelError(
                f"options must be a DispatchOptions, not {options!r:.60}; write DispatchOptions(copies=2)"
            )
        self.device, self.options = device, options or DispatchOptions()
        self.notes: list[str] = []
        self._plans: dict[tuple[LayerKind, torch.device, Hashable], LayerPlan] = {}
        self._workspaces: dict[torch.device, Workspace] = {}

    def layer(
        self,
        weights: MoEWeights,
        top_k: int,
        ep_size: int | None = None,
        refine: Callable[[LayerPlan], LayerPlan] | None = None,
        group: Hashable = None,
    ) -> LayerRuntime:
        """Make a layer of the weights, which are not copied if a kernel reads them as they are.

        ep_size: that of the options if None.
        refine: makes another plan from a kind's, before its first layer is made.
        group: layers of one kind share a plan within it.
        """
        if not isinstance(weights, MoEWeights):
            raise KernelError(
                f"weights must be a MoEWeights, not {type(weights).__name__}; write MoEWeights(gate_up, down)"
            )
        options = self.options
        if options.activations is not None and weights.stored.scale is not None:
            weights = replace(weights, activations=options.activations)
        kind, device = kind_of(weights, top_k), weights.gate_up.device
        plan = self._plans.get((kind, device, group))
        first = plan is None
        if plan is None:
            plan = self._plan(kind.shape, self._hardware(device))
            plan = plan if refine is None else refine(plan)
        wait = options.host_sync_us
        if wait is None:
            wait = HOST_SYNC_US if device.type == "cuda" else 0.0
        found = LayerRuntime(
            weights,
            top_k,
            plan.hardware,
            plan.kernels,
            plan.model,
            checked=options.checked,
            copies=options.copies,
            mode=options.mode,
            host_sync_us=wait,
            ep_size=options.ep_size if ep_size is None else ep_size,
        )
        found.workspace = self._workspaces.setdefault(device, Workspace())
        if first:
            plan = self._plans[kind, device, group] = self._shared(plan, found)
        if plan.compiling is not None:
            found.follow(plan.compiling)
        return found

    def _hardware(self, device: torch.device) -> Hardware:
        import torch

        if device.type == "cuda":
            if (device.index or 0) != torch.cuda.current_device():
                raise HardwareError(
                    f"the experts' weights are on {device}, the current device is cuda:{torch.cuda.current_device()}, "
                    f"where kernels would run; torch.cuda.set_device({device.index}) first"
                )
            return detect(index=device.index or 0) if self.device == "auto" else get_registry().device(self.device)
        if device.type != "cpu":
            raise HardwareError(f"the experts' weights are on {device}; load the model, and move it to a GPU")
        if self.device == "auto" or os.environ.get(INTERPRET) != "1":
            raise HardwareError(
                "the experts' weights are on the CPU; move the model to a GPU. To try it without one, slowly: set "
                f"{INTERPRET}=1 before anything imports Triton, and name the device to stand in for, as device='h200'"
            )
        return get_registry().device(self.device)

    def _plan(self, shape: MoEShape, hardware: Hardware) -> LayerPlan:
        """The plan of a shape: those kernels of the options that run here, and the cost model of their profiles."""
        registry = copy.copy(get_registry())
        kernels = self._asked_for(registry)
        usable = usable_kernels(shape, hardware, kernels)
        if self.options.cost_model is not None:
            return self._known(hardware, usable, self.options.cost_model)
        registry.kernels = {k.name: k for k in usable}
        store = ProfileStore([Path(p) for p in self.options.profiles], registry.profile_dirs)
        if self.options.profiles:
            store.check(registry.kernels, shape, hardware)
        try:
            model, notes = load_model(registry, store, named(shape), hardware)
        except ProfileError:
            if any(store.find(k.name, shape, hardware) for k in usable):
                raise  # there is a profile, and something is wrong with it
            self.notes.append(
                f"nothing was measured in {shape.dtype} on {hardware.name}: the batch size alone decides; measure with "
                f"`ramp-moe profile --model {named(shape).label} --dtype {shape.dtype}`"
            )
            if self.options.kernels is None:
                usable = sorted(usable, key=lambda k: k.name != UNMEASURED)[:1]
            return LayerPlan(hardware, usable, None)
        self.notes += notes
        return self._known(hardware, usable, model)

    def _asked_for(self, registry: Registry) -> list[LaunchableKernel]:
        if self.options.kernels is None:
            return [k for k in registry.kernels.values() if isinstance(k, LaunchableKernel)]
        found = [registry.kernel(k) if isinstance(k, str) else k for k in self.options.kernels]
        if strays := [k for k in found if not isinstance(k, LaunchableKernel)]:
            name = getattr(strays[0], "name", repr(strays[0])[:60])
            raise KernelError(f"{name} is no kernel that can be launched; `ramp-moe kernels` lists those that can")
        return cast("list[LaunchableKernel]", found)

    def _known(self, hardware: Hardware, usable: list[LaunchableKernel], model: CostModel) -> LayerPlan:
        """The plan with the kernels that the model predicts. Raises KernelError if none of them runs here."""
        known = {c.kernel for c in model.candidates}
        if not (kernels := [k for k in usable if k.name in known]):
            raise KernelError(
                f"the cost model predicts {', '.join(sorted(known))}, none of which is among the kernels that run here "
                f"({', '.join(k.name for k in usable)}); give a model of these, or leave it out"
            )
        return LayerPlan(hardware, kernels, model)

    def _shared(self, plan: LayerPlan, first: LayerRuntime) -> LayerPlan:
        """What the first layer of a kind made of its plan, for the others: nothing is decided twice, and a model that
        needs no further restriction is one object, which shares what is derived from it."""
        self.notes += [f"{kernel} left out: {reason}" for kernel, reason in first.dropped.items()]
        if plan.model is None:
            return plan
        if gain := self._gain(plan.model, first.shape, plan.kernels):
            self.notes.append(gain)
        kept = [k for k in plan.kernels if k.name not in first.dropped]
        model = plan.model.restrict([k.name for k in kept])
        model, compiling = on_demand(model, kept, self.options.ep_size, self.notes)
        first.choose_among(model)
        if compiling is not None:
            compiling.begin()
        return replace(plan, kernels=kept, model=model, compiling=compiling)

    def _gain(self, model: CostModel, shape: MoEShape, kernels: Sequence[LaunchableKernel]) -> str | None:
        """A note on what one more copy of the weights would gain; None if less than 0.1%."""
        copies = self.options.copies
        times = kernel_times(model, [k.name for k in kernels], weighed_batches(model))
        now, then = (choose_layouts(shape, kernels, n, times) for n in (copies, copies + 1))
        gain = (1 + now.loss) / (1 + then.loss) - 1
        if gain < 0.001:
            return None
        return (
            f"copies={copies + 1} would hold the weights in {' and '.join(then.layouts)}, "
            f"{(then.bytes - now.bytes) / 2**20:,.0f} MiB more a layer, for a predicted gain of {gain:.1%}"
        )


def usable_kernels(
    shape: MoEShape, hardware: Hardware, kernels: Sequence[LaunchableKernel] | None = None
) -> list[LaunchableKernel]:
    """The kernels that compute the shape here.

    kernels: to choose from; None: all registered ones that can be launched. Raises KernelError with the reasons if none
    computes the shape.
    """
    if kernels is None:
        kernels = [k for k in get_registry().kernels.values() if isinstance(k, LaunchableKernel)]
    reasons = {k.name: obstacle(k, shape, hardware) for k in kernels}
    usable = [k for k in kernels if reasons[k.name] is None]
    if not usable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise KernelError(f"no kernel can compute {shape.slug} on {hardware.name} ({why or 'none was named'})")
    return usable


def named(shape: MoEShape) -> MoEShape:
    """The shape with the name of the registered model that has it; without a name if none has it."""
    models = get_registry().models.values()
    name = next((m.name for m in models if replace(m.shape, dtype=shape.dtype) == shape), None)
    return replace(shape, name=name)
