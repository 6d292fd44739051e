"""Layers that run with torch. Only their use imports torch, not the import of this package."""

from .layer import MoELayer
from .relayout import relayout

__all__ = ["MoELayer", "relayout"]
