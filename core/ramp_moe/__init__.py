"""ramp-moe: pick the fastest MoE kernel for every batch from its expert histogram.

`import ramp_moe` needs none of the GPU libraries; what does imports them when it is used.
"""

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
