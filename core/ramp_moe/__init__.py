"""ramp-moe: pick the fastest MoE kernel for every batch from its expert histogram.

`import ramp_moe` needs none of the GPU libraries, and imports nothing by itself: a name is imported when it is first
used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cost_model import FORMS, Candidate, CostModel, Prediction
    from .device.wrap import Wrapped, unwrap, wrap
    from .dispatch import Choice, Dispatcher
    from .errors import (
        HardwareError,
        KernelError,
        ProfileError,
        RampMoEError,
        RoutingError,
        ShapeError,
        UnknownNameError,
    )
    from .experts import Experts, ExpertsAdapter
    from .fitting import fit_sweep
    from .geometry import GridGeometry
    from .hardware import Hardware, detect
    from .hookspecs import hookimpl
    from .kernel import BuildableKernel, Built, Kernel, KernelConfig, Stage, WeightLayout
    from .plugins import Registry, get_registry
    from .routing import expert_histogram, generate
    from .shapes import Model, MoEShape
    from .store import ProfileStore
    from .sweep import Sweep, load_sweep
    from .trace import Trace, load_trace

_NAMES = {
    "cost_model": "FORMS Candidate CostModel Prediction",
    "device.wrap": "Wrapped unwrap wrap",
    "dispatch": "Choice Dispatcher",
    "errors": "HardwareError KernelError ProfileError RampMoEError RoutingError ShapeError UnknownNameError",
    "experts": "Experts ExpertsAdapter",
    "fitting": "fit_sweep",
    "geometry": "GridGeometry",
    "hardware": "Hardware detect",
    "hookspecs": "hookimpl",
    "kernel": "BuildableKernel Built Kernel KernelConfig Stage WeightLayout",
    "plugins": "Registry get_registry",
    "routing": "expert_histogram generate",
    "shapes": "Model MoEShape",
    "store": "ProfileStore",
    "sweep": "Sweep load_sweep",
    "trace": "Trace load_trace",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "FORMS",
    "BuildableKernel",
    "Built",
    "Candidate",
    "Choice",
    "CostModel",
    "Dispatcher",
    "Experts",
    "ExpertsAdapter",
    "GridGeometry",
    "Hardware",
    "HardwareError",
    "Kernel",
    "KernelConfig",
    "KernelError",
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


if not TYPE_CHECKING:  # to which every name would then seem to exist

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
