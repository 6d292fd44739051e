"""ramp-moe: pick the fastest MoE kernel for every batch from its expert histogram.

`import ramp_moe` needs no GPU library. Each public name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cost_model.fitting import fit_sweep
    from .cost_model.model import FORMS, Candidate, CostModel, Prediction
    from .dispatch.dispatcher import Choice, Dispatcher
    from .dispatch.profile_store import ProfileStore
    from .errors import (
        HardwareError,
        KernelError,
        ProfileError,
        RampMoEError,
        RoutingError,
        ShapeError,
        UnknownNameError,
    )
    from .measurements.sweep import Sweep, load_sweep
    from .measurements.trace import Trace, load_trace
    from .registry.detect import detect
    from .registry.diagnostics import Diagnostic
    from .registry.experts_adapter import ExpertsAdapter
    from .registry.hookspecs import hookimpl
    from .registry.registry import Registry, get_registry
    from .runtime.module import MoELayer
    from .runtime.options import DispatchOptions
    from .runtime.own_experts import Experts
    from .runtime.wrap import Wrapped, unwrap, wrap
    from .spec.geometry import GridGeometry
    from .spec.hardware import Hardware
    from .spec.kernel import BuildableKernel, Built, Kernel, KernelConfig, Stage, WeightLayout
    from .spec.routing import expert_histogram, generate
    from .spec.shapes import Model, MoEShape
    from .version import __version__

_NAMES = {
    "cost_model.fitting": "fit_sweep",
    "cost_model.model": "Candidate CostModel FORMS Prediction",
    "dispatch.dispatcher": "Choice Dispatcher",
    "dispatch.profile_store": "ProfileStore",
    "errors": "HardwareError KernelError ProfileError RampMoEError RoutingError ShapeError UnknownNameError",
    "measurements.sweep": "Sweep load_sweep",
    "measurements.trace": "Trace load_trace",
    "registry.detect": "detect",
    "registry.diagnostics": "Diagnostic",
    "registry.experts_adapter": "ExpertsAdapter",
    "registry.hookspecs": "hookimpl",
    "registry.registry": "Registry get_registry",
    "runtime.module": "MoELayer",
    "runtime.options": "DispatchOptions",
    "runtime.own_experts": "Experts",
    "runtime.wrap": "Wrapped unwrap wrap",
    "spec.geometry": "GridGeometry",
    "spec.hardware": "Hardware",
    "spec.kernel": "BuildableKernel Built Kernel KernelConfig Stage WeightLayout",
    "spec.routing": "expert_histogram generate",
    "spec.shapes": "MoEShape Model",
    "version": "__version__",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "FORMS",
    "BuildableKernel",
    "Built",
    "Candidate",
    "Choice",
    "CostModel",
    "Diagnostic",
    "DispatchOptions",
    "Dispatcher",
    "Experts",
    "ExpertsAdapter",
    "GridGeometry",
    "Hardware",
    "HardwareError",
    "Kernel",
    "KernelConfig",
    "KernelError",
    "MoELayer",
    "MoEShape",
    "Model",
    "Prediction",
    "ProfileError",
    "ProfileStore",
    "RampMoEError",
    "Registry",
    "RoutingError",
    "ShapeError",
    "Stage",
    "Sweep",
    "Trace",
    "UnknownNameError",
    "WeightLayout",
    "Wrapped",
    "__version__",
    "detect",
    "expert_histogram",
    "fit_sweep",
    "generate",
    "get_registry",
    "hookimpl",
    "load_sweep",
    "load_trace",
    "unwrap",
    "wrap",
]


if not TYPE_CHECKING:  # a type checker would take every name to exist

    def __getattr__(name: str) -> Any:
        home = _HOME.get(name)
        try:
            module = importlib.import_module(f"{__name__}.{home or name}")
        except ModuleNotFoundError as e:
            if e.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        found = globals()[name] = getattr(module, name) if home else module
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
