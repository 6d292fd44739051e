"""The part of the library that touches tensors. Importing it needs no torch; using it does."""

from ..spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace
from .layer import MoELayer
from .relayout import relayout

__all__ = ["Batch", "LaunchableKernel", "MoELayer", "MoEWeights", "Workspace", "relayout"]
