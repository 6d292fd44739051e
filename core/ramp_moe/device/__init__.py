"""The part of the library that touches tensors. Importing it needs no torch; using it does."""

from .contract import Batch, LaunchableKernel, MoEWeights, Workspace
from .layer import MoELayer
from .layouts import relayout

__all__ = ["Batch", "LaunchableKernel", "MoELayer", "MoEWeights", "Workspace", "relayout"]
