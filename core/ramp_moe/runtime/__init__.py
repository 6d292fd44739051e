"""Layers that run with torch. Only their use imports torch, not the import of this package."""

from .layer import LayerRuntime
from .relayout import relayout

__all__ = ["LayerRuntime", "relayout"]
