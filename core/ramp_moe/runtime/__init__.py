"""Layers that compute with torch. Importing this package does not import torch; using a layer does."""

from .layer import LayerRuntime
from .relayout import relayout

__all__ = ["LayerRuntime", "relayout"]
