"""Layers that run with torch. Importing this imports no torch; using it does."""

from .layer import LayerRuntime
from .relayout import relayout

__all__ = ["LayerRuntime", "relayout"]
