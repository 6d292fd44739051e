"""The names that a kernel plugin imports: `from ramp_moe.plugin import Kernel, KernelConfig, Stage, ...`.

To describe a kernel, a plugin needs Kernel or LaunchableKernel, KernelConfig, Stage, GridGeometry and WeightLayout. To
run one, it also needs Batch, MoEWeights and Workspace. `hookimpl` marks the function through which the library finds
the kernel. This module does not import torch.
"""

from .errors import (
    HardwareError,
    KernelError,
    ProfileError,
    RampMoEError,
    RoutingError,
    ShapeError,
    UnknownNameError,
)
from .registry.experts_adapter import ExpertsAdapter
from .registry.hookspecs import hookimpl
from .spec.formats import FORMATS, Format
from .spec.geometry import GridGeometry
from .spec.hardware import Hardware
from .spec.kernel import (
    LAYOUTS,
    BuildableKernel,
    Built,
    Kernel,
    KernelConfig,
    Progress,
    Stage,
    WeightLayout,
    fp8_unsupported,
    is_installed,
    version_of,
)
from .spec.launchable import (
    ACTIVATIONS,
    ROW_CHUNK,
    Batch,
    LaunchableKernel,
    MoEWeights,
    RouterLogits,
    Workspace,
    check_layout,
)
from .spec.shapes import SCALE_BLOCK, Model, MoEShape, scale_blocks
from .spec.versions import Place, digest_of

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "LAYOUTS",
    "ROW_CHUNK",
    "SCALE_BLOCK",
    "Batch",
    "BuildableKernel",
    "Built",
    "ExpertsAdapter",
    "Format",
    "GridGeometry",
    "Hardware",
    "HardwareError",
    "Kernel",
    "KernelConfig",
    "KernelError",
    "LaunchableKernel",
    "MoEShape",
    "MoEWeights",
    "Model",
    "Place",
    "ProfileError",
    "Progress",
    "RampMoEError",
    "RouterLogits",
    "RoutingError",
    "ShapeError",
    "Stage",
    "UnknownNameError",
    "WeightLayout",
    "Workspace",
    "check_layout",
    "digest_of",
    "fp8_unsupported",
    "hookimpl",
    "is_installed",
    "scale_blocks",
    "version_of",
]
